"""`opsd score ROLLOUTS -o FOLDER`: a teacher's likeliest tokens at every token of rollouts, for a cached teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.errors import ConfigError

if TYPE_CHECKING:
    from opsd.commands.run_file import Run
    from opsd.teachers import Teacher

ROWS = 128  # of a shard


def write_scores(run: Run, teacher: Teacher, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Score rows that have completions, and write shards; those that are there already are not computed again.

    Args:
        run: settings of the student, of the divergence (`support_k`) and of precision.
        teacher: whose scores.
        rows: rollouts, with `completion_ids` or `completion`.
        folder: of the scores.

    Raises:
        ConfigError: a row has no completion; the folder has scores of something else.
    """
    from rich.progress import Progress

    from opsd.data.rows import completion_of
    from opsd.models.digests import digest_of, tokenizer_digest
    from opsd.serving.store import ScoreStore, megabytes
    from opsd.training.score import RolloutScorer

    bare = [number for number, row in enumerate(rows) if completion_of(row) is None]
    if bare:
        raise ConfigError(
            f"row {bare[0]} has no completion, as have {len(bare)} of {len(rows)} rows. A folder of scores is for "
            "rollouts that exist. Write them first: opsd rollout."
        )
    count = run.args.support_k
    scorer = RolloutScorer(run.model.model_name_or_path or "", run.args, run.model.model_revision)
    scorer.prepare(teacher)
    count = min(count, teacher.lists or count)
    names = scorer.asked(rows)
    tokens = sum(len(asked.ids) - asked.start for asked in names)
    print(
        f"scores      {len(rows):,} rollouts, {tokens:,} tokens, {count} likeliest tokens each: "
        f"{megabytes(tokens, count):,.0f} MB at most ({megabytes(10**6, count):,.0f} MB per million tokens)",
        flush=True,
    )
    shown = json.dumps(teacher.prompts.description, sort_keys=True, default=str)
    manifest = {
        "format": 1, "teacher": teacher.strategy, "settings": json.dumps(teacher.settings, sort_keys=True),
        "context": teacher.prompts.describe(), "template": digest_of([shown]), "precision": scorer.precision,
        "tokenizer": tokenizer_digest(scorer.tokenizer), "top_k": count,
    }  # fmt: skip
    store = ScoreStore.begin(folder, manifest, teacher.describe())
    with Progress(transient=True) as bar:
        task = bar.add_task("scoring", total=len(rows))
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            left = [row for row, asked in zip(part, names[start : start + ROWS], strict=True) if asked not in store]
            if left:
                store.write(list(scorer.lists(left, teacher, count)))
            bar.update(task, advance=len(part))
    print(
        f"scores      {folder}: {len(store):,} rollouts. Train on them: teacher: {{strategy: cached, path: {folder}}}"
    )
