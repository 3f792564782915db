"""Two real processes on the CPU, started as users start them; accelerate's CPU launcher would silently run one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_rows
from helpers import LEAVE, RUNS

from opsd.evaluation.summary import results_of

WORKER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from helpers import make_args, make_rollouts, make_student, make_trainer
from opsd import EMATeacher, SameCheckpointTeacher
from dataclasses import replace
from datasets import Dataset
from conftest import make_rows

folder, kind = sys.argv[1:]
shown = dict(context="answer_only")
teacher = EMATeacher(0.9, **shown) if kind == "ema" else SameCheckpointTeacher(**shown)
trainer = make_trainer(folder, teacher, "lora" if kind == "ema" else "full", max_steps=2, save_steps=1,
                       per_device_train_batch_size=2, gradient_accumulation_steps=1, save_strategy="steps",
                       **(dict(support="teacher_top_k", support_k=5, keep_fraction=0.5, ref_kl_coef=0.1)
                          if kind == "uneven" else {}))
trainer.train()
world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index

# Gradients of replayed rollouts: each process takes its share of the same eight rows.
rows = list(range(8))[rank::world]
rollouts = trainer.scorer.prepare_rollouts(make_rollouts(8))
if kind == "uneven":  # nothing of the second process's rows is scored
    masks = [m if b % 2 == 0 else [0] * len(m) for b, m in enumerate(rollouts.loss_mask)]
    rollouts = replace(rollouts, loss_mask=masks)
trainer.model.train(); trainer.model.zero_grad()
share = rollouts.with_num_loss_tokens(rollouts.num_scorable).select(rows)
loss = trainer.compute_loss(trainer.model_wrapped, trainer._scored(share))
trainer.accelerator.backward(loss)
total = sum(float(p.grad.double().pow(2).sum()) for p in trainer.model.parameters() if p.grad is not None)
check = sum(float(p.double().abs().sum()) for p in trainer.model.parameters())
result = json.dumps(dict(world=world, rank=rank, grad=total, check=check,
      divergence=[e["divergence"] for e in trainer.state.log_history if "divergence" in e],
      tokens=[e["scored_tokens"] for e in trainer.state.log_history if "scored_tokens" in e]))
open(os.path.join(folder, f"result-{world}-{rank}.json"), "w").write(result)
"""


MEANS = """
import json, os, sys
sys.path.insert(0, {tests!r})
from helpers import MAKE_TEACHER, make_trainer
from datasets import Dataset
from conftest import make_rows

folder, kind = sys.argv[1:]
rows = [dict(row, value=float(number)) for number, row in enumerate(make_rows(11))]
def value_of(value, **kwargs):  # known for some rows only
    return [None if v % 4 == 3 else v for v in value]
trainer = make_trainer(folder, MAKE_TEACHER["ema"](), rows=Dataset.from_list(rows[:8]), max_steps=1, logging_steps=1,
                       eval_rows=Dataset.from_list(rows[8:]), per_device_eval_batch_size=2, reward_funcs=value_of,
                       per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
                       gradient_accumulation_steps=1, mask_tokens=["e"])
trainer.train()
evaluated = trainer.evaluate()
world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
entry = dict([(k, v) for e in trainer.state.log_history for k, v in e.items()])
json.dump(entry, open(os.path.join(folder, f"result-{world}-{rank}.json"), "w"))
"""


EVERY_TEACHER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
from helpers import MAKE_TEACHER, RUNS, make_rollouts, make_trainer, move

folder = sys.argv[1]
found = {}
for number, (teacher, student) in enumerate(RUNS):
    trainer = make_trainer(os.path.join(folder, str(number)), MAKE_TEACHER[teacher](), student)
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    model = trainer.accelerator.prepare_model(trainer.model)
    # The student moves twice and its teacher follows: gates, averages and copies have done something by then.
    for step in (1, 2):
        move(trainer.model)
        trainer.teacher.after_step(step)
        history = [{"step": n + 1, "entropy": 5.0, "completions/mean_length": 6.0} for n in range(step)]
        trainer.teacher.before_step(step, history)
    rollouts = trainer.scorer.prepare_rollouts(make_rollouts(8).mask_rows([n in (1, 3, 5, 7) for n in range(8)]))
    share = rollouts.with_num_loss_tokens(rollouts.num_scorable).select(list(range(8))[rank::world])
    trainer.model.train(); trainer.model.zero_grad()
    trainer.accelerator.backward(trainer.compute_loss(model, trainer._scored(share)))
    found[f"{teacher} {student}"] = [
        sum(float(p.grad.double().pow(2).sum()) for p in trainer.model.parameters() if p.grad is not None),
        sum(float(v.double().abs().sum()) for v in trainer.teacher.state_dict().values()),
    ]
json.dump(found, open(os.path.join(folder, f"result-{world}-{rank}.json"), "w"))
"""


RESUMED = """
import hashlib, json, os, sys
sys.path.insert(0, {tests!r})
import torch
from helpers import MAKE_TEACHER, logged, make_trainer

folder, resume = sys.argv[1], sys.argv[2] == "resume"
found = {}
for teacher, student, ahead in (("ema", "full", 1), ("routed", "lora", 1), ("snapshot", "full", 3)):
    trainer = make_trainer(os.path.join(folder, teacher), MAKE_TEACHER[teacher](), student, max_steps=5, save_steps=1,
                           save_strategy="steps", gradient_accumulation_steps=1, learning_rate=5e-3,
                           steps_per_generation=ahead)
    trainer.train(resume_from_checkpoint=resume)
    digest = hashlib.sha256()
    for name, value in [*trainer.model.named_parameters(), *sorted(trainer.teacher.state_dict().items())]:
        digest.update(name.encode() + value.detach().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    found[teacher] = [digest.hexdigest(), logged(trainer, "divergence")]
world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
json.dump(found, open(os.path.join(folder, f"result-{world}-{rank}.json"), "w"))
"""


EVALUATED = """
import json, os, sys
sys.path.insert(0, {tests!r})
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_args
from opsd import OPSDTrainer, SiblingTeacher

folder = sys.argv[1]
rows = make_rows(24)
for number, row in enumerate(rows):
    row["prompt"] = [{"role": "user", "content": f"Question {number}: what is it?"}]
split = [rows[start:start + 7] for start in (10, 17)]  # an odd number: one process answers more
plan = {"test": split[0], "grader": "contains", "selection": split[1], "every": 1, "samples": 2, "neutral": rows[:5]}
teacher = SiblingTeacher(make_llama(5), tokenizer=make_tokenizer(), context="answer_only")
args = make_args(os.path.join(folder, "run"), learning_rate=0.0, gradient_accumulation_steps=1)
trainer = OPSDTrainer(make_llama(0), teacher, args=args, train_dataset=Dataset.from_list(rows[:10]),
                      processing_class=make_tokenizer(), evaluation=plan)
trainer.train()
world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
logged = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
json.dump(logged, open(os.path.join(folder, f"result-{world}-{rank}.json"), "w"))
"""


FAILING = """
import json, os, sys, warnings
sys.path.insert(0, {tests!r})
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_args
from transformers import TrainerCallback
from opsd import OPSDTrainer, SameCheckpointTeacher
from opsd.errors import ConfigError
from opsd.training.together import failing_together

class Odd(Exception):  # cannot be rebuilt from its text
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

class Breaks(TrainerCallback):  # the student of the second process, after training
    def on_train_end(self, args, state, control, model, **kwargs):
        if args.process_index == 1:
            def generate(*args, **kwargs):
                raise RuntimeError("out of memory here")
            model.generate = generate

folder, rows = sys.argv[1], make_rows(24)
for number, row in enumerate(rows):
    row["prompt"] = [{"role": "user", "content": f"Question {number}: what is it?"}]
args = make_args(os.path.join(folder, "run"), ddp_timeout=60)
trainer = OPSDTrainer(make_llama(0), SameCheckpointTeacher(context="answer_only"), args=args,
                      train_dataset=Dataset.from_list(rows[:10]), processing_class=make_tokenizer(),
                      callbacks=[Breaks()], evaluation={"test": rows[10:14], "grader": "contains"})
rank, caught = trainer.accelerator.process_index, []
for error in (ConfigError("a wrong setting"), Odd("one", "two")):
    try:
        with failing_together():
            if rank == 0:
                raise error
    except Exception as raised:
        caught.append([type(raised).__name__, str(raised)])
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    trainer.train()
trainer.save_model()
texts = [str(each.message) for each in warned if "could not be evaluated" in str(each.message)]
json.dump([caught, texts], open(os.path.join(folder, f"result-2-{rank}.json"), "w"))
"""


SERVED = """
import json, os, sys
sys.path.insert(0, {tests!r})
from conftest import make_llama, make_tokenizer
from fault_server import FaultServer
from helpers import make_trainer
from opsd import ServedTeacher
from opsd.errors import ServerError

folder, kind = sys.argv[1:]
server = FaultServer(make_llama(5), make_tokenizer()).start()  # of this process alone
limits = dict(connect_timeout=2.0, read_timeout=5.0, patience=0.5)
teacher = ServedTeacher(server.url, top_k=20, context="answer_only", **limits)
trainer = make_trainer(os.path.join(folder, "run"), teacher, max_steps=3, support="teacher_top_k", support_k=20,
                       gradient_accumulation_steps=1, logging_steps=1)
rank, expect, error = trainer.accelerator.process_index, teacher.expect, ""
def failing(rollouts):
    if kind == "fails" and rank == 1 and trainer.state.global_step == 1:
        server.faults.extend(["503"] * 1000)
    expect(rollouts)
teacher.expect = failing
try:
    trainer.train(resume_from_checkpoint=kind == "resumed")
except ServerError as raised:
    error = str(raised)
check = sum(float(p.double().abs().sum()) for p in trainer.model.parameters())
losses = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
json.dump([error, check, losses], open(os.path.join(folder, f"result-2-{rank}.json"), "w"))
"""


def launch(script: Path, processes: int, folder: Path, kind: str) -> list[dict]:
    if not script.read_text().endswith(LEAVE):
        script.write_text(script.read_text() + LEAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, "--standalone", str(script), str(folder), kind],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"result-{processes}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER.replace("{tests!r}", repr(str(Path(__file__).parent))))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["same", "ema"])
def test_two_processes_train_one_model_and_log_what_both_saw(tmp_path: Path, script: Path, kind: str) -> None:
    results = launch(script, 2, tmp_path / "run", kind)
    assert [r["world"] for r in results] == [2, 2]
    assert results[0]["check"] == results[1]["check"] and results[0]["divergence"] == results[1]["divergence"]
    assert all(0 < tokens <= 2 * 2 * 6 for tokens in results[0]["tokens"])
    assert (tmp_path / "run" / "checkpoint-2" / "opsd_teacher.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["same", "uneven"])
def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path, script: Path, kind: str) -> None:
    """Invariant 7 on replayed rollouts, before any step moved the weights apart: lr 0.

    In "uneven" one process has no token at all to score: it must neither hang nor log other names than the rest.
    """
    text = script.read_text().replace('save_strategy="steps"', 'learning_rate=0.0, save_strategy="steps"')
    script.write_text(text)
    (one,) = launch(script, 1, tmp_path / "one", kind)
    two = launch(script, 2, tmp_path / "two", kind)
    assert one["check"] == two[0]["check"] == two[1]["check"]
    assert two[0]["grad"] == pytest.approx(one["grad"], rel=2e-5) and two[1]["grad"] == two[0]["grad"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_means_are_over_the_rows_of_all_processes_and_each_row_once(tmp_path: Path, processes: int) -> None:
    """accelerate fills the last batch of an evaluation with its first rows; means of two processes were averaged."""
    script = tmp_path / "means.py"
    script.write_text(MEANS.replace("{tests!r}", repr(str(Path(__file__).parent))))
    logged = launch(script, processes, tmp_path, "means")[0]
    assert logged["reward"] == pytest.approx((0 + 1 + 2 + 4 + 5 + 6) / 6), "3 and 7 are unknown"
    assert logged["eval_reward"] == pytest.approx((8 + 9 + 10) / 3)
    assert logged["eval_group/right"] == 1.0


@pytest.mark.slow
def test_every_teacher_agrees_between_one_process_and_two(tmp_path: Path) -> None:
    """Invariant 7, with a process that has no token to score: every collective must be reached by both."""
    script = tmp_path / "every.py"
    script.write_text(EVERY_TEACHER.replace("{tests!r}", repr(str(Path(__file__).parent))))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (one,) = launch(script, 1, tmp_path / "one", "")
    first, second = launch(script, 2, tmp_path / "two", "")
    assert first == second and first.keys() == one.keys() == {f"{t} {s}" for t, s in RUNS}
    for case, (gradient, state) in one.items():
        assert gradient > 0 and first[case] == pytest.approx([gradient, state], rel=2e-5), case


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Each process has a random state of its own; three steps make an epoch, so step 4 is in the next one."""
    script = tmp_path / "resumed.py"
    script.write_text(RESUMED.replace("{tests!r}", repr(str(Path(__file__).parent))))
    (tmp_path / "whole").mkdir()
    whole = launch(script, 2, tmp_path / "whole", "anew")
    for teacher in whole[0]:
        shutil.copytree(tmp_path / "whole" / teacher / "checkpoint-2", tmp_path / "again" / teacher / "checkpoint-2")
    assert launch(script, 2, tmp_path / "again", "resume") == whole
    assert all((tmp_path / "again" / "ema" / "checkpoint-5" / f"rng_state_{rank}.pth").is_file() for rank in (0, 1))


@pytest.mark.slow
def test_two_processes_answer_the_questions_of_a_plan_as_one_does(tmp_path: Path) -> None:
    """Each answers a share of seven; greedy answers, their order and what is logged are those of one process."""
    script = tmp_path / "evaluated.py"
    script.write_text(EVALUATED.replace("{tests!r}", repr(str(Path(__file__).parent))))
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        logs = launch(script, processes, folder, "")
        assert all(log == logs[0] and len(log) == 3 for log in logs)
        found[processes] = results_of(folder / "run" / "evaluation")
        assert list(found[processes]) == ["before", "teacher_without_context", "teacher", "after"]
    for when, one in found[1].items():
        assert found[2][when].greedy == one.greedy and found[2][when].questions == one.questions
        assert found[2][when].samples == 2 and len(found[2][when].sampled) == 7


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_all(tmp_path: Path) -> None:
    """The process that failed went on to save the model, and the others waited for its answers: no model."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.replace("{tests!r}", repr(str(Path(__file__).parent))))
    first, second = launch(script, 2, tmp_path, "")
    assert first[0] == [["ConfigError", "a wrong setting"], ["Odd", "one and two"]]
    assert second[0] == [["ConfigError", "a wrong setting"], ["RuntimeError", "Odd: one and two"]]
    assert len(first[1]) == len(second[1]) == 1
    assert all("RuntimeError: out of memory here" in text for (text,) in (first[1], second[1]))
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_server_that_fails_one_process_stops_both_with_a_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "served.py"
    script.write_text(SERVED.replace("{tests!r}", repr(str(Path(__file__).parent))))
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = launch(script, 2, tmp_path / "whole", "whole")
    first, second = launch(script, 2, tmp_path / "broken", "fails")
    assert all("checkpoint-1 is saved" in error for error, *_ in (first, second))
    assert "503" in second[0] and len(first[2]) == 1
    assert launch(script, 2, tmp_path / "broken", "resumed") == whole and len(whole[0][2]) == 3


@pytest.mark.slow
def test_the_command_line_trains_under_torchrun(tmp_path: Path, llama_folder: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    settings = {
        "model_name_or_path": llama_folder, "dataset_name": rows, "context": "answer_only", "max_steps": 1,
        "output_dir": tmp_path / "run", "per_device_train_batch_size": 2, "max_completion_length": 4,
        "bf16": "false", "gradient_checkpointing": "false",
    }  # fmt: skip
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "opsd"]
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "train", *options], capture_output=True, text=True, timeout=300, env=without_gpu)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved the trained model") == 1
    assert (tmp_path / "run" / "model.safetensors").is_file()
