"""Monitors: each names its failure and is content with a healthy run; none ends a run by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_trainer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from opsd import EMATeacher
from opsd.cli import main
from opsd.errors import ConfigError
from opsd.evaluation.run_folder import read_card
from opsd.health.monitor import FINE, Monitor, Values, Verdict
from opsd.health.monitors import MONITORS, as_markdown
from opsd.health.rollout import Step, TracedRollout
from opsd.health.statistics import copied, statistics_of
from opsd.health.thresholds import THRESHOLDS
from opsd.health.tokens import class_of
from opsd.health.traces import read_traces
from opsd.health.watch import FILE, Monitors, Watch, replay

PROMPT, CONTEXT = "What is 3 + 4?", "What is 3 + 4? Reference: add the three ones to the four ones and call it 7."


def rollout(text: str = "The sum is 7 .", nats: float | list[float] = 0.1, **changes: Any) -> TracedRollout:
    tokens = [f" {word}" for word in text.split()]
    ids = [sum(map(ord, token)) for token in tokens]
    values = nats if isinstance(nats, list) else [nats] * len(tokens)
    given = {"step": 1, "prompt": PROMPT, "context": CONTEXT, **changes}
    return TracedRollout(
        ids=ids, tokens=tokens, text=text, divergence=values, entropy=[1.0] * len(ids), logprob=[-1.0] * len(ids),
        teacher_logprob=[-1.0] * len(ids), **given,
    )  # fmt: skip


HEALTHY: dict[str, Any] = {
    "grad_norm": 1.0, "divergence": 0.5, "entropy": 2.0, "completions/mean_length": 20.0, "ref_kl": 0.05,
    "completions/clipped_ratio": 0.2, "tools/call_frequency": 2.0, "importance/truncated": 0.0, "importance/ratio": 1.0,
    "unscored": 0.0, "group/unused": 0.1, "group/right": 0.5, "context/shortened": 0.0, "context/tokens_cut": 0.0,
    "support/teacher": 0.99, "clipped/tokens": 0.01, "eval_accuracy": 0.4,
    "epoch": 1.0,
}  # fmt: skip
SPOKEN = "Let me check , maybe it is 7 : wait , three and four make 7 , so the sum of both is 7 ."
PLAIN = [
    rollout(SPOKEN),
    rollout("One might say that it makes seven , perhaps"),
    rollout("I add three ones to four ones , perhaps , and find 7 .", prompt="Another"),
    rollout("It is 7 .", on_policy=False),
]
LOOP = "go on and on and on and on and on and on and on and on and on"
# monitor -> what changes in the log, and the rollouts, of a run that fails
FAILS: dict[str, tuple[dict[str, Any], list[TracedRollout]]] = {
    "gradient": ({"grad_norm": 1e-9}, PLAIN),
    "finite": ({"divergence": float("nan")}, PLAIN),
    "length": ({"completions/mean_length": 5.0}, PLAIN),
    "truncation": ({"completions/clipped_ratio": 0.97}, PLAIN),
    "entropy": ({"entropy": 0.1}, PLAIN),
    "tools": ({"tools/call_frequency": 0.2}, PLAIN),
    "drift": ({"ref_kl": 3.0}, PLAIN),
    "engine": ({"importance/truncated": 0.4}, PLAIN),
    "idle": ({"group/unused": 1.0, "group/right": 0.0}, PLAIN),
    "unscored": ({"unscored": 0.1}, PLAIN),
    "context": ({"context/shortened": 0.9, "context/tokens_cut": 300.0}, PLAIN),
    "support": ({"support/teacher": 0.4}, PLAIN),
    "clip": ({"clipped/tokens": 0.8}, PLAIN),
    "task": ({"eval_accuracy": 0.2, "divergence": 0.1}, PLAIN),
    "lift": ({"divergence": 0.1}, PLAIN),
    "overfit": ({"divergence": 0.1, "eval_accuracy": 0.3, "epoch": 30.0}, PLAIN),
    "repetition": ({}, [rollout(LOOP)]),
    "diversity": ({}, [rollout("7 7 7 7 7 7 7 7 7 7 7")]),
    "siblings": ({"eval_accuracy": 0.4}, [rollout("the sum of both is 7"), rollout("the sum of both is 7")]),
    "lmbda": ({}, [*PLAIN[:3], rollout("It is 7 .", 0.01, on_policy=False)]),
    "style": ({}, [rollout(". , . , wait , maybe", 1.0)]),
    "opening": ({}, [rollout("Sure that is an easy one it is 7", [9.0] * 3 + [0.01] * 6)]),
    "leak": ({}, [rollout("The reference solution says it is 7")]),
    "large_kl": ({}, [rollout("the words are quite other ones here", 5.0)]),
    "thinking": ({}, [rollout("seven is the sum of three and four and that is that")] * 3),
}  # fmt: skip


def watched(logs: dict[str, Any], rollouts: list[TracedRollout], entries: int = 12) -> Watch:
    """A run that is healthy for four entries, and then as given."""
    watch = Watch()
    for number in range(1, entries + 1):
        changed = number > 4
        entry = {**HEALTHY, **(logs if changed else {})}
        watch.look(Step(number, entry, rollouts if changed else PLAIN))
    return watch


def test_every_monitor_has_a_file_a_threshold_with_its_source_and_a_failure_here() -> None:
    names = [monitor.name for monitor in MONITORS]
    assert sorted(names) == sorted(THRESHOLDS) == sorted(FAILS) and len(set(names)) == len(names)
    assert all(monitor.__module__ == f"opsd.health.monitors.{monitor.name}" for monitor in MONITORS)
    assert all(threshold.source and threshold.unit for threshold in THRESHOLDS.values())


def test_the_document_has_the_table_and_a_word_on_every_monitor() -> None:
    text = (Path(__file__).parents[1] / "docs" / "health.md").read_text("utf-8")
    assert as_markdown() in text
    assert all(f"**{monitor.name}**" in text for monitor in MONITORS)


@pytest.mark.parametrize("name", FAILS)
def test_a_failure_is_named_by_its_monitor(name: str) -> None:
    watch = watched(*FAILS[name])
    verdict = watch.verdicts[name]
    assert verdict.level == "act", (verdict, watch.verdicts)
    assert verdict.saw and verdict.do.endswith(".") and not watch.broken
    assert [change.verdict.level for change in watch.history if change.monitor == name][-1] == "act"


def test_a_healthy_run_hears_nothing() -> None:
    watch = watched({}, PLAIN, entries=40)
    assert watch.history == [] and watch.level == 0 and not watch.broken
    assert len(watch.verdicts) == len(MONITORS)
    assert watch.summary == [f"health      {len(MONITORS)} of {len(MONITORS)} monitors that could look are content"]


def test_one_noisy_entry_is_no_failure() -> None:
    watch = Watch()
    for number in range(1, 30):
        noisy = {"completions/mean_length": 15.0, "entropy": 1.3} if number % 7 == 0 else {}
        watch.look(Step(number, {**HEALTHY, **noisy}, PLAIN))
    assert watch.history == []


QUIET: dict[str, tuple[dict[str, Any], list[TracedRollout], list[TracedRollout]]] = {
    # name -> the log, and rollouts at the start and later: what a healthy run may look like
    "short limits cut every rollout": ({"completions/clipped_ratio": 1.0}, PLAIN, PLAIN),
    "a model that names a given answer by itself": (
        {}, [rollout("the given answer is not known to me , so I add and get 7")] * 2,
        [rollout("the given answer is not known to me , so I add and get 7")] * 2,
    ),
    "answers in another script": ({}, [rollout("שבע הוא הסכום של שלוש וארבע 😀 �", 1.0)], [rollout("שבע �� הוא", 1.0)]),
    "empty answers": ({}, [rollout("<|im_end|>", 1.0)], [rollout("<|im_end|>", 1.0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIET)
def test_what_is_no_failure_stops_no_run(name: str) -> None:
    logs, first, later = QUIET[name]
    watch = Watch()
    for number in range(1, 13):
        watch.look(Step(number, {**HEALTHY, **logs}, first if number < 5 else later))
    assert watch.level < 2, watch.verdicts


def test_a_look_by_chance_is_worth_a_watch_only() -> None:
    watch = Watch()
    for number, accuracy in enumerate((0.625, 0.75, 0.625)):
        watch.look(Step(number, {"eval_accuracy": accuracy}))
    assert watch.verdicts["task"].level == "watch"


@pytest.mark.parametrize(("questions", "level"), [(60, "fine"), (600, "act")])
def test_a_loss_of_accuracy_is_judged_by_its_number_of_questions(questions: int, level: str) -> None:
    watch = Watch()
    for number, accuracy in enumerate((0.5, 0.38, 0.37)):
        watch.look(Step(number, {"eval_accuracy": accuracy, "eval_questions": questions}))
    assert watch.verdicts["task"].level == level


def looked(*looks: tuple[float, float | None]) -> str:
    """The level of `task` after looks, each (accuracy, p-value)."""
    watch = Watch()
    for number, (accuracy, p_value) in enumerate(looks):
        tested = {} if p_value is None else {"eval_p_value": p_value}
        watch.look(Step(5 * number, {"eval_accuracy": accuracy, "eval_questions": 400, **tested}))
    return watch.verdicts["task"].level


@pytest.mark.parametrize(("p_value", "level"), [(0.2, "fine"), (0.03, "watch"), (0.001, "act")])
def test_a_loss_of_accuracy_is_judged_question_by_question_where_that_is_logged(p_value: float, level: str) -> None:
    """400 questions at 12.8 % and 8.2 %: unpaired, that may be chance; of the same questions it mostly is not."""
    assert looked((0.1275, None), (0.0825, p_value), (0.0825, p_value)) == level


def test_a_third_of_the_odds_at_one_look_is_worth_a_watch_and_half_of_them_an_act() -> None:
    """A healthy run of the demo went from 40 to 30 % at one look, and on to 52 %."""
    assert looked((0.4, None), (0.3, 1e-4)) == "watch"
    assert looked((0.4, None), (0.3, 1e-4), (0.36, 0.09)) == "fine"
    assert looked((0.4, None), (0.3, 1e-4), (0.3, 1e-4)) == "act"
    assert looked((0.4, None), (0.2, 1e-4)) == "act"


@pytest.mark.parametrize(
    ("first", "last", "level"),
    [(0.128, 0.08, "act"), (0.5, 0.47, "fine"), (0.5, 0.45, "watch"), (0.5, 0.38, "act"), (0.95, 0.9, "act")],
)
def test_the_same_points_are_more_where_less_was_right(first: float, last: float, level: str) -> None:
    assert looked((first, None), (last, 1e-4), (last, 1e-4)) == level


@pytest.mark.parametrize("name", ["length", "entropy", "diversity", "siblings"])
@pytest.mark.parametrize(("later", "level"), [(0.7, "watch"), (0.3, "act")])
def test_what_is_lost_while_accuracy_rises_is_worth_a_watch(name: str, later: float, level: str) -> None:
    """The demo's student: its entropy falls to a twelfth while it learns to answer."""
    logs, rollouts = FAILS[name]
    watch = watched({**logs, "eval_accuracy": later}, rollouts)
    assert watch.verdicts[name].level == level


def test_few_words_of_thinking_are_no_measure() -> None:
    """Eight rollouts of twenty tokens have one such word or none, by chance."""
    first, later = [rollout("perhaps it is 7 , as three and four make 7")], [rollout("it is 7 , as three and four")]
    watch = Watch()
    for number in range(1, 13):
        watch.look(Step(number, HEALTHY, first if number < 4 else later))
    assert watch.verdicts["thinking"].level == "fine" and watch.values.start("thinking") > 50


def test_what_was_read_of_rollouts_is_logged(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=1)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "divergence" in entry]
    expected = statistics_of([each for each in read_traces(tmp_path) if each.step == 2])
    assert {name: entries[1][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert replay(entries).values.all("kl/mean") == pytest.approx(trainer.health.watch.values.all("kl/mean"))


# ---- what they read --------------------------------------------------------------------------------------------------


def test_statistics_of_rollouts_from_their_definitions() -> None:
    one = rollout("a b c d a b c d e", [0.0] * 8 + [2.0])
    values = statistics_of([one])
    assert values["repetition"] == pytest.approx(1 / 6)  # of six stretches of four, "a b c d" comes twice
    assert values["distinct_2"] == pytest.approx(5 / 8)
    assert values["kl/mean"] == pytest.approx(2 / 9) and values["kl/opening"] == 0.0
    assert "kl/opening" not in statistics_of([rollout("It is 7", 3.0)])  # of a short answer it is most
    assert values["kl/large"] == 0.0  # 2 nats is not above 2
    assert sum(values[f"kl/{name}"] for name in ("digits", "words", "hedges", "punctuation", "space", "special")) == 1.0
    assert statistics_of([]) == {} and statistics_of([rollout("")]) == {}


@pytest.mark.parametrize(
    ("token", "name"),
    [(" 12", "digits"), ("x2", "digits"), (" Wait", "hedges"), ("...", "punctuation"), ("\n", "space"), ("", "space"),
     ("<|im_end|>", "special"), ("[INST]", "special"), (" sum", "words"), (" día", "words"), ("学", "words"),
     ("�", "words"), ("😀", "words"), ("。", "punctuation")],
)  # fmt: skip
def test_tokens_have_a_class(token: str, name: str) -> None:
    assert class_of(token) == name


def test_a_leak_is_what_the_teacher_alone_was_told() -> None:
    copies = rollout("so add the three ones to the four ones")
    assert copied(copies) == ["add the three ones to the", "the three ones to the four", "three ones to the four ones"]
    assert copied(rollout("so add the three ones to the four ones", prompt=CONTEXT)) == []
    asked = rollout("According to the document it is 7", prompt="What does the given solution say?")
    assert statistics_of([asked])["leak/phrases"] == 0.0
    assert statistics_of([rollout("According to the document it is 7")])["leak/phrases"] == 1.0


def test_rollouts_of_others_say_nothing_of_the_student() -> None:
    """SFT begins with a large divergence at the first token of its texts."""
    assert statistics_of([rollout(LOOP, [9.0] + [0.1] * 20, on_policy=False)]) == {}


def test_looking_costs_little() -> None:
    """Eight rollouts of 200 tokens in well below a fiftieth of the shortest step of a real model, some 3 s on a CPU."""
    rollouts = [rollout(" ".join(f"w{(7 * n * m) % 97}" for n in range(200)), step=m) for m in range(1, 9)]
    watch = Watch()
    watch.look(Step(1, HEALTHY, rollouts))
    began = time.process_time()
    for number in range(2, 12):
        watch.look(Step(number, HEALTHY, rollouts))
    assert (time.process_time() - began) / 10 < 0.06


# ---- in runs ---------------------------------------------------------------------------------------------------------


class Broken(Monitor):
    name, needs = "broken", ("grad_norm",)

    def judge(self, values: Values) -> Verdict:
        raise ZeroDivisionError("by mistake")


def test_a_monitor_that_raises_is_switched_off_and_reported() -> None:
    watch = Watch([Broken, *MONITORS])
    for number in range(3):
        watch.look(Step(number, HEALTHY, PLAIN))
    assert "broken was not looked at: ZeroDivisionError: by mistake" in "\n".join(watch.summary)
    assert watch.verdicts["gradient"] == FINE


class Reports(TrainerCallback):
    """Stands for a callback that reports, such as TensorBoard's."""

    def __init__(self) -> None:
        self.levels: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.levels += [logs["health"]] if "health" in logs else []


def failing(folder: Path, **settings: Any) -> Any:
    """A run whose teacher is the student from step 4 on: a learning rate of 0 and a teacher that keeps up."""
    trainer = make_trainer(folder, EMATeacher(0.9, context="answer_only"), **{"max_steps": 12, **settings})
    norm = trainer._get_grad_norm

    def nothing(model: Any, grad_norm: Any = None) -> Any:
        value = norm(model, grad_norm)
        return value * 0 if trainer.state.global_step >= 3 else value

    trainer._get_grad_norm = nothing
    return trainer


def test_a_run_says_it_once_writes_it_down_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, reports = failing(tmp_path), Reports()
    trainer.add_callback(reports)
    trainer.train()
    out = capsys.readouterr().out
    assert trainer.state.global_step == 12 and out.count("gradient: act: the gradient's norm is 0") == 2  # and the end
    changes = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [c["level"] for c in changes if c["monitor"] == "gradient"][-1] == "act"
    assert reports.levels[0] == 0 and reports.levels[-1] == 2
    health = read_card(str(tmp_path))["outcome"]["health"]
    assert health["now"]["gradient"]["level"] == "act" and health["stopped_by"] is None
    assert "act: gradient" in next(line for line in out.splitlines() if line.startswith("step 12/12"))


def test_stop_ends_the_run_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = failing(tmp_path, health_action="stop", save_strategy="steps", save_steps=100)
    trainer.train()
    step = trainer.state.global_step
    assert 4 < step < 12 and (tmp_path / f"checkpoint-{step}").is_dir()
    assert "stopped     by the monitor gradient (health_action: stop)" in capsys.readouterr().out
    assert read_card(str(tmp_path))["outcome"]["health"]["stopped_by"] == "gradient"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"health_action": "roll_back"}, "no evaluation says which that is"),
        ({"health_action": "pause"}, "health_action is 'pause', and must be one of none, stop"),
    ],
)
def test_an_action_that_cannot_be_taken_is_refused_before_a_model_loads(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path, "ema", "no model", **settings)


def questions(kind: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(make_rows(4)):
        yield {**row, "prompt": [{"role": "user", "content": f"{kind} {number}?"}]}


def test_roll_back_gives_the_best_checkpoint(tmp_path: Path) -> None:
    plan = {"test": list(questions("test")), "selection": list(questions("selection")), "grader": "last_number"}
    plan |= {"every": 2, "rule": "best", "max_new_tokens": 4}
    trainer = failing(tmp_path, health_action="roll_back", evaluation=plan)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and trainer.state.global_step < 12
    assert int(best.rpartition("-")[2]) < trainer.state.global_step


def test_a_replay_says_what_the_run_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = failing(tmp_path, reward_funcs=lambda completion_ids, **_: [float(len(c)) for c in completion_ids])
    trainer.train()
    capsys.readouterr()
    assert main(["health", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 1
    out = capsys.readouterr().out
    assert all(change.line in out for change in trainer.health.watch.history)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [c["step"] for c in written["changes"]] == [c.step for c in trainer.health.watch.history]
    assert f"{12 * 4} traced rollouts" in out


def test_a_resumed_run_goes_on_where_its_monitors_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8}
    failing(tmp_path, **settings).train()
    for path in (tmp_path / "checkpoint-12").iterdir():
        path.unlink()
    capsys.readouterr()
    again = failing(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    out = capsys.readouterr().out
    assert out.count("health      step") == 0 and again.health.watch.verdicts["gradient"].level == "act"


def test_another_trainer_gets_the_monitors_whose_metrics_it_logs(tmp_path: Path) -> None:
    monitors, lines = Monitors(say=None), list[str]()
    monitors._say = lines.append
    rows = Dataset.from_list([{"prompt": "What is 1 + 1?", "completion": " 2"}] * 8)
    args = SFTConfig(
        str(tmp_path), max_steps=8, logging_steps=1, learning_rate=0.0, report_to="none", use_cpu=True, bf16=False,
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        make_llama(), args=args, train_dataset=rows, processing_class=make_tokenizer(), callbacks=[monitors]
    )
    trainer.train()
    assert "gradient" in monitors.watch.verdicts and not monitors.watch.broken
    # On texts that are given, entropy should fall.
    assert not {"length", "entropy"} & set(monitors.watch.verdicts)
    assert lines == [monitors.watch.summary[0]]


def test_a_log_of_another_trainer_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"loss": 1.0, "grad_norm": 1.0, "completions/mean_length": 20.0}
    log = [{"step": n, "entropy": 2.0 if n < 5 else 0.1, **same} for n in range(1, 13)]
    (tmp_path / "checkpoint-best").mkdir()
    folder = tmp_path / "checkpoint-12"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert main(["health", str(tmp_path)]) == 1
    assert "entropy: act: the student's entropy is 0.10" in capsys.readouterr().out
    assert replay(log).verdicts["gradient"] == FINE


@pytest.mark.parametrize("text", [None, "{}", "no json", '{"log_history": [{"step": null}]}', '{"log_history": [3]}'])
def test_a_folder_without_a_log_is_named(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "trainer_state.json").write_text(text)
    assert main(["health", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert ("holds no log.jsonl or trainer_state.json" if text is None else "is no log of a trainer") in error


def test_evaluations_take_no_rollouts_and_a_resume_repeats_no_line(tmp_path: Path) -> None:
    """Each evaluation used the rollouts up, and live and replay counted other windows."""
    others = Dataset.from_list(list(questions("other")))
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6, "logging_steps": 3, "eval_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_rows": others}
    trainer = failing(tmp_path, **settings)
    trainer.train()
    assert trainer.health.watch.values.count("kl/style") == 4
    before = (tmp_path / FILE).read_text()
    for path in (tmp_path / "checkpoint-12").iterdir():
        path.unlink()
    again = failing(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / FILE).read_text() == before


def test_files_that_cannot_be_written_or_read_end_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).mkdir()
    trainer = failing(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    assert trainer.state.global_step == 12 and f"{FILE} was not looked at" in capsys.readouterr().out
    for path in [*(tmp_path / "checkpoint-12").iterdir()]:
        path.unlink()
    next((tmp_path / "traces").glob("*.parquet")).write_bytes(b"PAR1")
    again = failing(tmp_path, save_strategy="steps", save_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12 and "is damaged" in capsys.readouterr().out
