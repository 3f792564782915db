"""The scripts of examples/: each runs as a user runs it, in small and offline, and leaves weights that have moved.

What they teach a real model is not tested here: two steps on a model of random weights teach nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = ("quickstart", "ema_with_lora", "sibling", "sharpen_after_sft")
MAX_LINES = 60
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def sibling_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A wider model with other weights and the same tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-sibling")
    make_llama(seed=1, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def run(name: str, output: Path, *arguments: str) -> str:
    """Run a script for two steps, in a folder that is not the checkout, and return what it printed."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--steps", "2", "--output", str(output), *arguments]
    # The checkout need not be installed for its tests to run.
    path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=output.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Tell whether the same tensors are there, finite, and some hold other numbers."""
    assert before.keys() == after.keys()
    assert all(bool(t.isfinite().all()) for t in after.values())
    return any(not torch.equal(t, after[name]) for name, t in before.items())


def adapter_has_learned(weights: dict[str, Tensor]) -> bool:
    """Tell whether some LoRA factor B, all of which start at zero, is not zero; A starts at random and says nothing."""
    assert all(bool(t.isfinite().all()) for t in weights.values())
    return any(bool(t.any()) for name, t in weights.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "sibling"])
def test_full_fine_tuning_scripts_run_and_save_a_model_that_moved(
    name: str, llama_folder: str, sibling_folder: str, tmp_path: Path
) -> None:
    run(name, tmp_path / "out", "--model", llama_folder, *(["--teacher", sibling_folder] if name == "sibling" else []))
    assert moved(load_file(Path(llama_folder) / MODEL), load_file(tmp_path / "out" / MODEL))


@pytest.mark.slow
def test_ema_script_saves_the_adapter_and_not_the_average(llama_folder: str, tmp_path: Path) -> None:
    run("ema_with_lora", tmp_path / "out", "--model", llama_folder)
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == [ADAPTER]
    student = load_file(tmp_path / "out" / ADAPTER)
    assert adapter_has_learned(student)
    average = load_file(tmp_path / "out" / "checkpoint-2" / "opsd_teacher.safetensors")
    assert int(average.pop("opsd.progress")) == 2
    # PEFT leaves the adapter's name out of its file.
    average = {name.replace(".default.", "."): t for name, t in average.items()}
    assert moved(average, student)


@pytest.mark.slow
def test_sharpening_goes_on_with_the_adapter_of_sft(llama_folder: str, tmp_path: Path) -> None:
    printed = run("sharpen_after_sft", tmp_path / "out", "--model", llama_folder)
    assert "a frozen copy of its trainable weights" in printed, "the teacher must be the SFT checkpoint, not its base"
    sft, final = (load_file(tmp_path / "out" / stage / ADAPTER) for stage in ("sft", "opsd"))
    assert adapter_has_learned(sft)
    assert moved(sft, final)
    # Adam moves a number by the learning rate per step at most: 1e-4, then half of it. A fresh adapter is further away.
    assert max(float((final[name] - t).abs().max()) for name, t in sft.items()) < 2e-4
    folder = tmp_path / "out" / "opsd"
    # PEFT gives any other adapter a folder of its own; the teacher's files stay in the checkpoints.
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"checkpoint-2", "traces"}
    assert [p.name for p in folder.glob("*.safetensors")] == [ADAPTER]
    assert [p.name for p in folder.glob("*teacher*")] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short_enough_to_read_at_once(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= MAX_LINES


def test_every_script_is_tested_here_and_told_of_in_the_readme() -> None:
    assert sorted(p.stem for p in FOLDER.glob("*.py")) == sorted(SCRIPTS)
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in SCRIPTS if f"{name}.py" not in readme] == []
