"""Runs random combinations of settings, and compares all that they log with a float64 recomputation.

    python benchmarks/combinations.py --runs 300

Writes benchmarks/results/combinations.json: how many agreed, the largest gaps, and what opsd refused and why.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: fastest for models this small

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from demo import hardware  # noqa: E402
from run_combinations import draw  # noqa: E402
from run_twin import BOUNDS, gaps  # noqa: E402

from opsd.errors import OPSDError  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "combinations.json"


def main() -> None:
    """Run the combinations and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="combinations that opsd accepts")
    parser.add_argument("--first", type=int, default=10_000, help="the first seed; `make test` runs others")
    args = parser.parse_args()
    start, seed, values = time.time(), args.first, 0
    refused: Counter[str] = Counter()
    wrong: list[dict[str, object]] = []
    largest = {name: {"mean": 0.0, "grad_norm": 0.0} for name in BOUNDS}
    runs: Counter[str] = Counter()
    accepted = 0
    while accepted < args.runs:
        combination = draw(seed)
        seed += 1
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                found = gaps(combination, Path(folder))
        except OPSDError as error:
            refused[str(error).split(". ")[0][:120]] += 1
            continue
        accepted += 1
        runs[combination.rounding] += 1
        values += len(found)
        for gap in found:
            sizes = largest[combination.rounding]
            kind = "grad_norm" if gap.name == "grad_norm" else "mean"
            sizes[kind] = max(sizes[kind], gap.size)
            if not gap.within(combination.rounding):
                wrong.append({"combination": vars(combination), **vars(gap)})
                print(f"{combination}: {gap}", flush=True)
        if accepted % 20 == 0:
            print(f"{accepted} of {args.runs} runs, {len(wrong)} values out of bounds", flush=True)
    result = {
        "what": "values that a run of 3 steps and an evaluation log, against a float64 recomputation from its rollouts",
        "command": f"python benchmarks/combinations.py --runs {args.runs} --first {args.first}",
        "hardware": hardware(),
        "runs": {"all": accepted, **runs},
        "values": values,
        "out_of_bounds": wrong,
        "bounds": {name: {"mean": mean, "grad_norm": norm} for name, (mean, norm) in BOUNDS.items()},
        "largest_gap": largest,
        "refused": sum(refused.values()),
        "why_refused": dict(refused.most_common()),
        "minutes": round((time.time() - start) / 60, 1),
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{RESULT.name}: {accepted} runs, {values} values, {len(wrong)} out of bounds")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
