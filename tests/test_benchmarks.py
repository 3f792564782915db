"""The benchmarks run, and write what they say they write; whether we are fast is for `make evidence`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "losses.py"


@pytest.mark.slow
def test_the_loss_benchmark_measures_contenders_that_agree(tmp_path: Path) -> None:
    """Times of a contender that computes something else would say nothing."""
    (tmp_path / "losses.json").write_text('{"another device": {"cases": []}}')
    command = [sys.executable, str(BENCHMARK), "--quick", "--only", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "losses.json").read_text())
    assert "another device" in written and (tmp_path / "losses.svg").read_text().startswith("<?xml")
    found = written["cpu"]
    assert found["rounds"] == 1 and found["hardware"]["threads"] == 1 and len(found["targets"]) == 4
    assert len(found["cases"]) == 12 and {case["head"] for case in found["cases"]} == {"trained", "frozen"}
    for case in found["cases"]:
        limit = 2e-4 if case["dtype"] == "float32" else 0.1
        differences = case["largest relative difference from ours"]
        assert differences.keys() == case["seconds"].keys() - {"ours", "products alone"}
        expected = {"loss", "hidden"} | ({"head"} if case["head"] == "trained" else set())
        assert all(d.keys() == expected and max(d.values()) < limit for d in differences.values())
        ratios = case["ratio to ours, with 95 % interval"]
        assert ratios.keys() == case["seconds"].keys() - {"ours"}
        assert all(low <= middle <= high for middle, low, high in ratios.values())
    assert set(found["cases"][1]["peak MiB"]) == set(found["cases"][1]["seconds"])
