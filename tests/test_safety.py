"""Safe by default: no call that was not asked for, no code from weights, no secret in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUIET_RUN = """
import socket, sys
calls = []
def refuse(*args, **kwargs):
    calls.append(args)
    raise OSError("no network in this test")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
sys.path.insert(0, {tests!r})
from helpers import make_trainer
from opsd import EMATeacher
from transformers import AutoModelForCausalLM, AutoTokenizer
from opsd.models.loading import load_model
model, tokenizer = load_model(sys.argv[2])
trainer = make_trainer(sys.argv[1], EMATeacher(0.9, context="answer_only"), model, save_strategy="steps", save_steps=1)
trainer.train()
trainer.save_model()
import time; time.sleep(1)
print("CALLS", calls)
"""


@pytest.mark.slow
def test_a_local_run_makes_no_network_call_even_where_ci_is_unset(tmp_path: Path, llama_folder: str) -> None:
    """TRL reports at construction unless CI is set, so CI would hide it; the hub is not told to stay offline either."""
    hidden = ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    code = QUIET_RUN.replace("{tests!r}", repr(str(Path(__file__).parent)))
    code = code.replace("from helpers", "import os\nfrom helpers", 1)
    # conftest sets HF_HUB_OFFLINE when it is imported; take it away again before anything reads it.
    code = code.replace("import os\n", "import os\nos.environ['HF_HUB_OFFLINE'] = '0'\n", 1)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), llama_folder],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CALLS []" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_trls_own_telemetry_would_have_been_noticed(tmp_path: Path, llama_folder: str) -> None:
    """The check above can fail: with TRL's method back in place, a call is seen."""
    code = QUIET_RUN.replace("{tests!r}", repr(str(Path(__file__).parent)))
    back = (
        "import os\nos.environ['HF_HUB_OFFLINE'] = '0'\nfrom opsd import OPSDTrainer\nimport trl\n"
        "OPSDTrainer._send_telemetry = trl.DistillationTrainer._send_telemetry\nfrom helpers"
    )
    hidden = ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code.replace("from helpers", back, 1), str(tmp_path / "run"), llama_folder],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert "CALLS [(" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_pickled_model_is_refused(tmp_path: Path, llama_folder: str) -> None:
    import shutil

    import torch
    from conftest import make_llama, make_rows
    from datasets import Dataset
    from helpers import make_args

    from opsd import OPSDTrainer

    shutil.copytree(llama_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(make_llama().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        OPSDTrainer(
            str(tmp_path / "pickled"), args=make_args(tmp_path / "run"), train_dataset=Dataset.from_list(make_rows())
        )


def test_no_secret_of_the_environment_is_written(tmp_path: Path) -> None:
    from helpers import make_trainer

    os.environ["HF_TOKEN"] = "hf_averysecrettoken"
    try:
        trainer = make_trainer(tmp_path, None, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
    finally:
        del os.environ["HF_TOKEN"]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"hf_averysecrettoken" not in path.read_bytes(), path
