"""Reports: what they say of good, bad, broken and old runs; the data of the heat-map; the live page."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from evaluation_runs import DEV, KEPT, PLAN, make
from outline import HOSTILE, Outline

from opsd.cli import main
from opsd.commands.report import comparison_with
from opsd.errors import ConfigError
from opsd.evaluation.compare import compare, read_runs
from opsd.evaluation.run_folder import read_card
from opsd.health.log import FILE as LOG
from opsd.health.log import read_lines
from opsd.health.rollout import Alternatives, TracedRollout
from opsd.health.traces import files_in, read_traces, write_rollouts
from opsd.report.build import report_of
from opsd.report.charts import POINTS, thin
from opsd.report.heatmap import as_plain, by_step, chosen
from opsd.report.live import HOST, LiveReport, make_server
from opsd.report.run import ReportedRun, read_run
from opsd.report.verdict import beats_controls, better, healthy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run with looks, retention, health and traces."""
    folder = tmp_path_factory.mktemp("report") / "run"
    plan = {**PLAN, "selection": DEV, "every": 2, "retention": {"kept": {"rows": KEPT, "grader": PLAN["grader"]}}}
    trainer = make(folder, evaluation=plan, max_steps=4, logging_steps=1)
    trainer.train()
    return folder


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control of it."""
    folder = tmp_path_factory.mktemp("control") / "run"
    make(folder, evaluation={**PLAN, "selection": DEV, "every": 2}, max_steps=2, control="off-policy").train()
    return folder


def page_of(run: Path) -> Outline:
    return Outline(report_of(read_run(run)))


def a_rollout(step: int = 1, text: str = "It is 7 .", nats: float = 0.1, **changes: Any) -> TracedRollout:
    tokens = [f" {word}" for word in text.split()]
    count = len(tokens)
    return TracedRollout(
        step, "asked", "asked and told", list(range(count)), tokens, text, [nats] * count, [1.0] * count,
        [-1.0] * count, [-2.0] * count, **changes,
    )  # fmt: skip


# ---- what a report says ----------------------------------------------------------------------------------------------


def test_a_report_has_verdict_curves_tokens_samples_and_card_and_loads_nothing(run: Path, capsys: Any) -> None:
    assert main(["report", str(run)]) == 0
    assert f"report      {run / 'report.html'}" in capsys.readouterr().out
    page = Outline((run / "report.html").read_text("utf-8"))
    for words in (
        "Did it get better?",
        "Did it beat its controls?",
        "Is it healthy?",
        "Curves",
        "Where the teacher",
        "What was gained, and what was kept",
        "The same questions before and after",
        "Run card",
    ):
        assert words in page.words, words
    assert page.outside == [] and page.tags.count("svg") >= 8 and "What is missing" not in page.words


def test_the_first_sentence_is_the_gain_with_its_interval() -> None:
    gain = {"difference": 0.2, "low": 0.1, "high": 0.3, "n": 50, "p_value": 0.01}
    metrics = {when: {"accuracy": {"value": value}} for when, value in (("before", 0.2), ("after", 0.4))}
    summary: dict[str, Any] = {"gain": gain, "metrics": metrics}
    empty = read_run_of({})
    assert better(empty).tone == "open" and "nothing was evaluated" in better(empty).text
    good = better(replace(empty, summary=summary))
    assert (
        good.tone == "good"
        and "from 20.0% to 40.0% of 50 held-out questions, +20.0 points (+10.0 to +30.0)" in good.text
    )
    bad = better(replace(empty, summary={**summary, "gain": {**gain, "low": -0.3, "high": -0.1}}))
    assert bad.tone == "bad" and bad.text.startswith("No, it got worse")
    chance = better(replace(empty, summary={**summary, "gain": {**gain, "p_value": 0.06}}))
    assert chance.tone == "open" and chance.text.startswith("Not shown")  # as the run's own verdict
    lost = {"general": {"difference": {"low": -0.2, "high": -0.01, "p_value": 0.01}}}
    assert better(replace(empty, summary={**summary, "retention": lost})).text.endswith("But it lost on general.")


def read_run_of(card: dict[str, Any]) -> ReportedRun:
    return ReportedRun(Path("run"), card)


def test_a_run_that_a_monitor_acts_on_is_not_called_healthy(run: Path) -> None:
    reported = read_run(run)
    assert healthy(reported).tone == "good"
    entries = [{**entry, "grad_norm": 0.0} for entry in reported.logs]
    (run.parent / "sick").mkdir()
    (run.parent / "sick" / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    sick = healthy(read_run(run.parent / "sick"))
    assert sick.tone == "bad" and "gradient" in sick.text


def test_controls_are_compared(run: Path, tmp_path: Path, capsys: Any) -> None:
    plan = {**PLAN, "selection": DEV, "every": 2}
    make(tmp_path / "sft", evaluation=plan, max_steps=2, control="off-policy").train()
    assert main(["report", str(run), "--against", str(tmp_path / "sft"), "-o", str(tmp_path / "r.html")]) == 0
    page = Outline((tmp_path / "r.html").read_text("utf-8"))
    assert "off-policy" in page.words and "no control was given" not in page.words
    assert main(["compare", str(run), str(tmp_path / "sft"), "--html", str(tmp_path / "c.html")]) == 0
    page = Outline((tmp_path / "c.html").read_text("utf-8"))
    assert "Compared on the test split" in page.words and page.outside == []


# ---- runs that broke off, old runs, odd runs -------------------------------------------------------------------------


@pytest.fixture
def broken(run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(run, folder)
    return folder


def test_a_run_that_broke_off_is_shown_and_says_what_is_missing(broken: Path) -> None:
    (broken / "trainer_state.json").unlink()
    text = (broken / LOG).read_text()
    (broken / LOG).write_text(text[: text.index('"step": 3')])  # killed while it wrote
    (broken / "evaluation" / "evaluation.json").write_text('{"metr')
    (broken / "evaluation" / "after.json").unlink()
    trace = files_in(broken / "traces")[0][2]
    trace.write_bytes(trace.read_bytes()[:500])
    card = read_card(str(broken))
    del card["outcome"]
    (broken / "run_card.json").write_text(json.dumps(card))
    page = page_of(broken)
    for words in (
        "the log: 1 line(s) are damaged",
        f"the trace {trace.name}",
        "the evaluation (evaluation/evaluation.json): the run's files are damaged",
        "the run has not",
    ):
        assert words in page.words, words
    assert "Curves" in page.words


def test_a_run_without_card_and_of_another_trainer_is_shown(run: Path, tmp_path: Path) -> None:
    logs = [{"step": step, "loss": 2.0 / step, "grad_norm": 1.0, "learning_rate": 1e-5} for step in (1, 2, 3)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    page = page_of(tmp_path)
    assert (
        "the run card (run_card.json): the folder has none" in page.words
        and "loss" in page.words
        and page.tags.count("svg") == 3
    )


def test_a_run_of_an_older_version_is_shown(broken: Path) -> None:
    """Before there was log.jsonl, and traces had no alternatives."""
    (broken / LOG).unlink()
    for _, _, path in files_in(broken / "traces"):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["alternatives"]), path)
    card = read_card(str(broken))
    del card["outcome"]["health"]
    (broken / "run_card.json").write_text(json.dumps(card))
    page = page_of(broken)
    assert "What is missing" not in page.words and "Where the teacher disagrees" in page.words


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def long_run() -> ReportedRun:
    """500 steps of 200 samples each."""
    values = random.Random(0)
    shown = Alternatives([" seven"] * 5, [-1.0] * 5, [" eight"] * 5, [-2.0] * 5, 1, 2)
    words = " ".join("word" for _ in range(40))
    rollouts = [
        replace(a_rollout(step, words), divergence=[values.random() for _ in range(40)], alternatives=[shown] * 40)
        for step in range(1, 501)
        for _ in range(200)
    ]
    logs = [{"step": step, "divergence": values.random(), "entropy": 1.0, "grad_norm": 1.0} for step in range(1, 501)]
    return replace(read_run_of({}), logs=logs, rollouts=rollouts)


def test_a_long_run_makes_a_small_page() -> None:
    run = long_run()
    assert len(report_of(run).encode()) < 10e6
    worst = max(range(len(run.rollouts)), key=lambda place: max(run.rollouts[place].divergence))
    kept = chosen(run.rollouts)
    assert worst in kept and run.rollouts[kept[0]].step == 1 and run.rollouts[kept[-1]].step == 500


@pytest.mark.parametrize("length", [1, 40, 2600, 30_000])
def test_a_page_holds_no_more_tokens_than_it_can(length: int) -> None:
    words = " ".join(["word"] * length)
    one = a_rollout(1, words)
    rollouts = [replace(one, step=step) for step in range(1, 31) for _ in range(2)]
    kept = chosen(rollouts, most=10_000)
    tokens = sum(len(rollouts[place].ids) for place in kept)
    assert kept and (tokens <= 10_000 or len(kept) == 1)
    if 2 * length <= 10_000:
        assert {1, 30} <= {rollouts[place].step for place in kept} | ({30} if length == 2600 else set())


def test_a_long_curve_is_thinned_to_means() -> None:
    thinned = thin([(float(step), 1.0 * (step % 2)) for step in range(1000)])
    assert len(thinned) <= POINTS and all(0 < value < 1 for _, value in thinned[:-1])
    assert thin([(1.0, 2.0)]) == [(1.0, 2.0)]


# ---- text is data ----------------------------------------------------------------------------------------------------


def test_text_of_models_and_datasets_never_becomes_markup(broken: Path) -> None:
    rollouts = [
        replace(r, prompt=HOSTILE, context=HOSTILE, tokens=[HOSTILE] * len(r.tokens)) for r in read_traces(broken)
    ]
    (path,) = [path for _, _, path in files_in(broken / "traces")]
    write_rollouts(path, [(rollout, {}) for rollout in rollouts])
    for name in ("before", "after"):
        result = json.loads((broken / "evaluation" / f"{name}.json").read_text())
        result["questions"][0], result["greedy"][0]["text"] = HOSTILE, HOSTILE
        (broken / "evaluation" / f"{name}.json").write_text(json.dumps(result))
    card = json.loads((broken / "run_card.json").read_text())
    card["model"] = card["contexts"][0] = card["prompts"][0]["student"] = HOSTILE
    (broken / "run_card.json").write_text(json.dumps(card))
    html = report_of(read_run(broken))
    assert "<script>alert" not in html and "</textarea>" not in html
    assert "\x1b" not in html and "\u202e" not in html and "😀" in html
    assert page_of(broken).tags.count("script") == 2  # our own: the data and what draws it


# ---- the heat-map's data ---------------------------------------------------------------------------------------------


def test_the_data_of_a_heat_map_is_what_was_traced() -> None:
    top = Alternatives([" 7", " 8"], [-0.1, -2.5], [" 19"], [-0.2], 1, 0)
    rollout = replace(a_rollout(3), divergence=[0.1, math.nan, 0.5, 2.0], alternatives=[top, None, None, None])
    plain = as_plain(by_step([a_rollout(3), rollout]), "step", "rollout", "reverse KL")
    assert [(each["first"], each["second"]) for each in plain["rollouts"]] == [("3", "1"), ("3", "2")]
    shown = plain["rollouts"][1]
    assert shown["nats"] == [0.1, None, 0.5, 2.0] and shown["top"][1] is None and shown["reward"] is None
    assert shown["top"][0] == {
        "student": [[" 7", -0.1], [" 8", -2.5]], "teacher": [[" 19", -0.2]], "student_rank": 1, "teacher_rank": 0,
    }  # fmt: skip
    json.dumps(plain, allow_nan=False)


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_has_every_entry_and_a_resumed_run_continues_it(tmp_path: Path) -> None:
    settings = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    make(tmp_path, max_steps=3, **settings).train()
    trainer = make(tmp_path, max_steps=4, allow_changes=["max_steps"], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    entries, damaged = read_lines(tmp_path / LOG)
    assert [entry["step"] for entry in entries if "divergence" in entry] == [1, 2, 3, 4] and damaged == 0
    of_state = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert [entry["divergence"] for entry in entries if "divergence" in entry] == [e["divergence"] for e in of_state]


# ---- live ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(broken: Path) -> Iterator[tuple[str, Path]]:
    report = LiveReport(broken)
    server = make_server(report, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://{HOST}:{server.server_address[1]}/{report.key}", broken
    server.shutdown()


def fetch(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
        return str(answer.read().decode())


def test_a_run_that_was_stopped_has_not_ended(broken: Path) -> None:
    card = read_card(str(broken))
    del card["outcome"]
    card["settings"]["max_steps"] = 9
    (broken / "run_card.json").write_text(json.dumps(card))
    assert any("train_runtime" in entry for entry in read_run(broken).logs) and not read_run(broken).has_ended


def test_a_part_that_cannot_be_made_leaves_the_others(broken: Path) -> None:
    card = read_card(str(broken))
    del card["teacher"]
    (broken / "run_card.json").write_text(json.dumps(card))
    summary = json.loads((broken / "evaluation" / "evaluation.json").read_text())
    summary["drift"] = {"per_token": {}}
    (broken / "evaluation" / "evaluation.json").write_text(json.dumps(summary))
    page = page_of(broken)
    for words in ("the run card: the run's files have no 'teacher'", "drift: the run's files have no", "Curves"):
        assert words in page.words, words


def test_the_page_of_a_control_does_not_claim_the_methods_success(run: Path, control: Path) -> None:
    comparison = compare(read_runs([str(run), str(control)]))
    assert beats_controls(comparison, str(control)).text.startswith("This run is one: off-policy.")
    assert not beats_controls(comparison, str(run)).text.startswith("This run is one")


def test_a_live_page_follows_the_run(served: tuple[str, Path]) -> None:
    address, folder = served
    version = fetch(f"{address}/version")
    assert f'data-version="{version}"' in fetch(f"{address}/")
    with (folder / LOG).open("a") as log:
        log.write(json.dumps({"step": 5, "divergence": 0.123}) + "\n")
    newer = fetch(f"{address}/version")
    assert newer != version and f'data-version="{newer}"' in fetch(f"{address}/")


def test_a_live_page_waits_for_a_run_that_has_not_begun(tmp_path: Path) -> None:
    page = Outline(LiveReport(tmp_path).page())
    assert "Nothing to show yet" in page.words and "holds no run" in page.words


def test_a_live_page_compares_when_the_run_has_ended(broken: Path, control: Path) -> None:
    def words() -> str:
        return Outline(LiveReport(broken, comparison_with([str(control)])).page()).words

    assert "cannot tell it from off-policy" in words() and "minus it" in words()
    (broken / "evaluation" / "after.json").unlink()
    assert "could not be compared" in words() and "was not measured after training" in words()
    card = read_card(str(broken))
    del card["outcome"]
    (broken / "run_card.json").write_text(json.dumps({**card, "settings": {**card["settings"], "max_steps": 9}}))
    assert "compared when it has ended" in words()
    assert main(["watch", str(broken), "--against", str(broken)]) == 2  # before anything is served


def test_only_this_machine_is_answered(served: tuple[str, Path]) -> None:
    address, _, key = served[0].rpartition("/")
    for path, headers in (
        (f"/{key}/", {"Host": "elsewhere.example"}),
        ("/", {}),  # without the key of the address, which other users of the machine do not know
        (f"/{key}/../run_card.json", {}),
        ("/run_card.json", {}),
    ):
        with pytest.raises(urllib.error.HTTPError):
            fetch(address + path, **headers)
    port = int(address.rpartition(":")[2])
    with pytest.raises(ConfigError, match="--port"):
        make_server(LiveReport(served[1]), port)


def test_watch_prints_the_lines_of_a_run(run: Path, capsys: Any) -> None:
    assert main(["watch", str(run), "--terminal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 0/4  evaluation  accuracy ") and lines[1].startswith("step 1/4  reverse KL ")
    assert lines[-1].startswith("done ")
    assert main(["watch", str(run / "nothing"), "--terminal"]) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("run_card.json", text) for text in ("[]", "null", '{"settings": null}', '{"settings": {"max_steps": "x"}}')),
        *(("evaluation/evaluation.json", text) for text in ("[]", "null", '{"metrics": null}', '{"gain": {}}')),
        *(
            (LOG, text)
            for text in ("", "\x00\x01", '{"step": Infinity}\n', '{"step": 1, "divergence": "x"}\n{"step": null}')
        ),
        ("traces/steps-000001-000004.parquet", ""),
    ],
)
def test_no_damage_leaves_a_run_without_a_page(broken: Path, name: str, content: str) -> None:
    (broken / name).write_text(content)
    page = page_of(broken)
    assert "Is it healthy?" in page.words and page.words.count("Nobody knows: what it is read from") <= 1


def test_a_run_whose_loss_is_no_number_is_not_healthy(broken: Path) -> None:
    entries, _ = read_lines(broken / LOG)
    spoilt = [{**entry, **({"divergence": math.nan} if entry.get("divergence") else {})} for entry in entries]
    (broken / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in spoilt))
    sentence = healthy(read_run(broken))
    assert sentence.tone == "bad" and "finite: the loss, the divergence or the entropy was NaN" in sentence.text


def test_few_monitors_prove_nothing_and_what_the_run_recorded_is_said(broken: Path) -> None:
    card = read_card(str(broken))
    card["outcome"]["health"]["now"] = {"length": {"level": "act", "saw": "rollouts are short"}}
    (broken / "run_card.json").write_text(json.dumps(card))
    assert "its own monitors said act (length)" in healthy(read_run(broken)).text
    shutil.rmtree(broken / "traces")
    (broken / LOG).write_text('{"step": 1, "loss": 1.0, "grad_norm": 1.0}\n')
    few = healthy(read_run(broken))
    assert few.tone == "open" and few.text.startswith("Not shown: only 2 of")


@pytest.mark.parametrize("output", ["folder", "file/page.html", "x" * 300 + ".html"])
def test_an_output_that_cannot_be_written_is_named_and_a_device_stays(
    run: Path, tmp_path: Path, capsys: Any, output: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    assert main(["report", str(run), "-o", str(tmp_path / output)]) == 2
    assert "could not be written" in capsys.readouterr().err and (tmp_path / "file").read_text() == "kept"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["report", str(run), "-o", str(pipe)]) == 2
    assert stat.S_ISFIFO(pipe.stat().st_mode)
