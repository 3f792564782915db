"""`opsd rollout ROWS -o FILE`: the student's completions of rows, for scoring and for training without sampling."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.commands.score import add_rows, read_settings
from opsd.errors import ConfigError

if TYPE_CHECKING:
    from opsd.commands.run_file import Run

ROWS = 64  # that are sampled and written together


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd rollout`; every other option is a setting of a run."""
    parser = argparse.ArgumentParser(
        prog="opsd rollout",
        usage="opsd rollout ROWS|RUN.yaml -o FILE.jsonl [options] [--key value …]",
        allow_abbrev=False,
        description="Sample completions of rows from the student, as training would, and write them as rows with "
        "`completion_ids` and `completion`. A file that is there is gone on with. `opsd score FILE --teacher … -o "
        "scores/` scores them, and a run with `lmbda: 0` trains on them.",
        epilog="Example: opsd rollout rows.jsonl --model_name_or_path M -o rollouts.jsonl --samples 4 "
        "--max_completion_length 256",
    )
    add_rows(parser)
    parser.add_argument("-o", "--output", metavar="FILE.jsonl", required=True, help="where the rollouts go")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="completions per row (default: 1)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Sample and write."""
    options, others = make_parser().parse_known_args(arguments)
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}, and every row needs one completion at least.")
    output = Path(options.output)
    if output.suffix != ".jsonl":
        raise ConfigError(f"-o writes JSON lines, and {output} is named otherwise. Name it .jsonl.")
    from rich.progress import Progress

    from opsd.evaluation.run_folder import check_output
    from opsd.training.score import RolloutScorer

    run = read_settings(options.rows, options.model_name_or_path, others)
    rows = [row for row in _rows(run) for _ in range(options.samples)]
    check_output(output)
    done = _begin(output, _identity(run, rows), len(rows))
    scorer = RolloutScorer(run.model.model_name_or_path or "", run.args, run.model.model_revision)
    with output.open("a", encoding="utf-8") as file, Progress(transient=True) as bar:
        task = bar.add_task("sampling", total=len(rows), completed=done)
        for start in range(done, len(rows), ROWS):
            part = rows[start : start + ROWS]
            bare = {number: _without_completion(row) for number, row in enumerate(part)}
            # A seed of its own for each part, so that a run that goes on samples what it would have sampled.
            for row, ids in zip(part, scorer.completions(bare, seed=run.args.seed + start), strict=True):
                text = scorer.tokenizer.decode(ids, skip_special_tokens=True)
                line = {**_without_completion(row), "completion": text, "completion_ids": ids}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(task, completed=start + len(part))
    print(f"rollouts    {output}: {len(rows):,} of {len(rows) // options.samples:,} rows")
    return 0


def _rows(run: Run) -> Iterator[Mapping[str, Any]]:
    from opsd.commands.build import rows_of
    from opsd.data.prepare import prepare_rows

    name, split = run.run.dataset_name or "", run.run.dataset_train_split
    yield from prepare_rows(rows_of(run, split), name=name, system_prompt=run.args.student_system_prompt)


def _without_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("completion", "completion_ids")}


def _identity(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the rollouts of a file have in common."""
    from opsd.models.digests import digest_of
    from opsd.training.sampling import rollout_settings

    args = run.args
    return {
        "model": run.model.model_name_or_path, "revision": run.model.model_revision, "seed": args.seed,
        "temperature": args.temperature, "max_completion_length": args.max_completion_length,
        "sampling": json.dumps(rollout_settings(args), sort_keys=True, default=str),
        "rows": digest_of(json.dumps(_without_completion(row), sort_keys=True, default=str) for row in rows),
    }  # fmt: skip


def _begin(path: Path, identity: Mapping[str, Any], count: int) -> int:
    """Return how many rollouts of a file are there, in whole parts; what is behind these is cut off.

    Raises:
        ConfigError: the file is of other rows or settings.
    """
    from opsd.evaluation.run_folder import write_json

    settings = path.with_suffix(".settings.json")
    if not path.is_file() or not path.stat().st_size:
        write_json(settings, dict(identity))
        return 0
    before = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    if changed := [name for name in identity if before.get(name) != identity[name]]:
        raise ConfigError(
            f"{path} has rollouts of another {changed[0]} ({before.get(changed[0], 'unknown')!r}, and now "
            f"{identity[changed[0]]!r}). They would stand among these without a mark. Choose another file."
        )
    lines = path.read_bytes().splitlines(keepends=True)
    whole = sum(line.endswith(b"\n") for line in lines)
    done = whole if whole == count else whole // ROWS * ROWS  # a part is sampled together
    path.write_bytes(b"".join(lines[:done]))
    return done
