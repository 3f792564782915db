"""`opsd rollout ROWS -o FILE`: the student's completions of rows, for scoring and for training without sampling."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError

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
    parser.add_argument("rows", metavar="ROWS|RUN.yaml", help="rows (.jsonl, .parquet, …, a hub id), or a run's YAML")
    parser.add_argument("--model_name_or_path", metavar="MODEL", help="the student")
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

    from opsd.commands.score import read_settings
    from opsd.evaluation.run_folder import check_output
    from opsd.training.score import RolloutScorer

    run = read_settings(options.rows, options.model_name_or_path, others)
    rows = [row for row in _rows(run) for _ in range(options.samples)]
    check_output(output)
    done = _lines(output)
    if done > len(rows):
        raise ConfigError(
            f"{output} has {done} rollouts, and {len(rows)} were asked for: it is of other rows. Choose another file."
        )
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


def _rows(run: Any) -> Iterator[Mapping[str, Any]]:
    from opsd.commands.build import rows_of
    from opsd.data.prepare import prepare_rows

    name, split = run.run.dataset_name or "", run.run.dataset_train_split
    yield from prepare_rows(rows_of(run, split), name=name, system_prompt=run.args.student_system_prompt)


def _without_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("completion", "completion_ids")}


def _lines(path: Path) -> int:
    """Return the whole lines of a file, and cut off one that broke off."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return whole.count(b"\n")
