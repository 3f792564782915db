"""Comparisons of runs: which runs are one arm, what is paired with what, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsd.cli import main
from opsd.errors import CheckpointError, ConfigError, DataError
from opsd.evaluation import Answer, EvaluationResult
from opsd.evaluation.compare import RunResult, compare, read_runs
from opsd.evaluation.statistics import adjusted, over_seeds, paired_difference
from opsd.evaluation.verdict import beats

N = 400


def result(right: np.ndarray, **changes: Any) -> EvaluationResult:
    answers = [Answer("x", bool(each), 5, True) for each in right]
    questions = [f"question {number}" for number in range(len(right))]
    return replace(EvaluationResult(questions, "exact", answers, []), **changes)


def card(control: str | None, seed: int, **settings: Any) -> dict[str, Any]:
    budget = {"max_steps": 24, "learning_rate": 1e-5, "output_dir": f"runs/{control}-{seed}"}
    return {
        "settings": {**budget, "control": control, "seed": seed, **settings},
        "hashes": {"questions": f"q{seed}", "data": f"{control}{seed}"},
        "seeds": {"seed": seed},
        "teacher": {"description": str(control)},
        "prompts": [f"{seed}"],
        "hardware": {"cpu": f"cpu {seed}"},
    }


def run(
    control: str | None, seed: int, right: np.ndarray, before: np.ndarray | None = None, **settings: Any
) -> RunResult:
    name = f"{control or 'method'}-{seed}"
    results = {"after": result(right), **({} if before is None else {"before": result(before)})}
    return RunResult(f"runs/{name}", control or "method", seed, card(control, seed, **settings), results)


def answers(share: float, seed: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < share


def arms(*shares: tuple[str | None, list[float]]) -> list[RunResult]:
    """Runs whose shares are exact: the first questions are right, in a question order of each seed's own."""
    runs = []
    for control, each in shares:
        for seed, share in enumerate(each):
            order = np.random.default_rng(seed).permutation(N)
            runs.append(run(control, seed, order < round(share * N)))
    return runs


def test_runs_that_differ_in_seed_questions_place_and_machine_are_one_arm() -> None:
    comparison = compare(arms(("sft", [0.3, 0.3]), (None, [0.5, 0.5, 0.5])))
    assert [(arm.name, [each.seed for each in arm.runs]) for arm in comparison.arms] == [
        ("method", [0, 1, 2]),
        ("sft", [0, 1]),
    ]


def test_methods_with_other_settings_are_arms_of_their_own_named_by_their_folders() -> None:
    slow = [
        replace(run(None, seed, answers(0.4, seed), learning_rate=1e-6), folder=f"runs/slow-{seed}") for seed in (0, 1)
    ]
    fast = [replace(run(None, seed, answers(0.4, seed)), folder=f"runs/fast_seed{seed}") for seed in (0, 1)]
    comparison = compare([*slow, *fast])
    assert [arm.name for arm in comparison.arms] == ["slow", "fast"]
    assert comparison.warnings == ["not the same budget: learning_rate is 1e-06 in slow and 1e-05 in fast"]


def test_two_runs_of_one_seed_are_refused() -> None:
    twice = arms((None, [0.5]))
    with pytest.raises(DataError, match="has the seed 0 of another run of its arm"):
        compare([*twice, replace(twice[0], folder="again")])


def test_differences_are_paired_by_question_and_seed() -> None:
    runs = [
        run(c, s, answers(share, 10 * s + len(c or ""))) for c, share in ((None, 0.5), ("sft", 0.4)) for s in (0, 1, 2)
    ]
    (pair,) = compare(runs).pairwise
    sides = [np.array([r.after.values("accuracy") for r in runs if r.arm == arm]) for arm in ("sft", "method")]
    wanted = paired_difference(sides[0].mean(0), sides[1].mean(0))
    assert (pair.difference, pair.p_value) == (wanted, wanted.p_value)
    assert pair.spread == over_seeds((sides[1] - sides[0]).mean(1))


def test_only_seeds_that_both_have_are_in_a_difference() -> None:
    runs = arms((None, [0.5, 0.5]), ("sft", [0.4, 0.4, 0.9]))
    comparison = compare(runs)
    assert comparison.pairwise[0].difference.difference == pytest.approx(0.1)
    assert comparison.warnings == ["sft has seed 2, and method has not: it is in no difference"]


def test_p_values_are_adjusted_for_the_number_of_arms() -> None:
    runs = [run(c, 0, answers(0.5, i)) for i, c in enumerate((None, "sft", "seq-kd", "off-policy"))]
    raw = [paired_difference(r.after.values("accuracy"), runs[0].after.values("accuracy")).p_value for r in runs[1:]]
    assert [each.p_value for each in compare(runs).pairwise] == adjusted(raw) != raw


def test_gain_is_over_before_and_missing_where_nothing_was_measured_before() -> None:
    before = answers(0.2, 9)
    measured = compare([run(None, seed, answers(0.6, seed), before) for seed in (0, 1)])
    assert measured.arms[0].gain is not None and measured.before is not None
    after = np.mean([answers(0.6, seed) for seed in (0, 1)], axis=0)
    assert measured.arms[0].gain == paired_difference(before.astype(float), after)
    assert compare([run(None, 0, answers(0.6, 0))]).arms[0].gain is None


@pytest.mark.parametrize(
    ("method", "control", "verdict"),
    [
        ([0.5, 0.51, 0.49], [0.3, 0.31, 0.3], "method beat sft: +19.7 ("),
        ([0.3, 0.31, 0.3], [0.5, 0.51, 0.49], "method LOST to sft: -19.7 ("),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "method and sft cannot be distinguished: +0.0 ("),
        ([0.5, 0.9, 0.4], [0.3, 0.31, 0.3], "method is ahead of sft on these seeds; about"),
        ([0.3, 0.31, 0.3], [0.5, 0.9, 0.4], "method is behind sft on these seeds; about"),
        ([0.5], [0.3], "method is ahead of sft with one pair of seeds; another seed may differ"),
        ([0.3], [0.5], "method is behind sft with one pair of seeds; another seed may differ"),
    ],
)
def test_words_say_what_the_numbers_do(method: list[float], control: list[float], verdict: str) -> None:
    (pair,) = compare(arms((None, method), ("sft", control))).pairwise
    assert pair.verdict.startswith(verdict)
    assert ("train two more" in pair.verdict) == (len(method) == 1)


def test_what_n_would_settle_it_is_said_of_a_difference_too_small_to_see() -> None:
    rng = np.random.default_rng(0)
    control = rng.random(N) < 0.5
    method = control.copy()
    method[rng.choice(N, 60, replace=False)] ^= True
    (pair,) = compare([run(None, 0, method), run("sft", 0, control)]).pairwise
    assert pair.difference.low < 0 < pair.difference.high
    change = paired_difference(control, method)
    from opsd.evaluation.power import questions_needed

    assert f"about {questions_needed(change.difference, change.deviation):,} questions would settle" in pair.verdict


def test_the_verdict_names_the_controls_that_were_not_beaten() -> None:
    comparison = compare(arms((None, [0.5, 0.51]), ("sft", [0.2, 0.2]), ("off-policy", [0.5, 0.51])))
    assert comparison.verdict == "method beat 1 of 2; 400 questions and 2 seeds cannot tell it from off-policy"
    assert compare(arms((None, [0.5, 0.51]), ("sft", [0.2, 0.2]))).verdict == "method beat its control (sft)"
    assert "nothing to compare with" in compare(arms((None, [0.5]))).verdict


def test_folders_may_have_any_name() -> None:
    runs = [replace(run(None, 0, answers(0.4, 0), max_steps=n), folder=f"runs/{{n}}%s{n}x") for n in (1, 2)]
    assert compare(runs).pairwise[0].verdict.startswith("{n}%s1x and {n}%s2x cannot be distinguished: ")


def test_a_length_is_neither_won_nor_lost() -> None:
    runs = arms((None, [0.5] * 3), ("sft", [0.5] * 3))
    longer = [
        replace(
            each,
            results={
                "after": replace(each.after, greedy=[replace(a, length=9 + each.seed) for a in each.after.greedy])
            },
        )
        if each.arm == "method"
        else each
        for each in runs
    ]
    comparison = compare(longer, "length")
    assert comparison.pairwise[0].verdict.startswith("method has more than sft: +5.0 (")
    assert "neither better nor worse" in comparison.verdict


def test_unequal_training_questions_and_ungraded_answers_are_warned_of() -> None:
    runs = arms((None, [0.5]), ("sft", [0.4]))
    runs[1].card["hashes"]["questions"] = "others"  # type: ignore[index]
    broken = replace(runs[1].after, greedy=[replace(runs[1].after.greedy[0], correct=None), *runs[1].after.greedy[1:]])
    comparison = compare([runs[0], replace(runs[1], results={"after": broken})])
    assert "seed 0: sft and method were not trained on the same questions" in comparison.warnings[0]
    assert "1 of 400 questions have answers that the grader failed on; they are left out" in comparison.warnings[1]
    assert comparison.pairwise[0].difference.n == 399


def test_runs_on_different_questions_are_refused() -> None:
    other = replace(run("sft", 0, answers(0.5, 1)), results={"after": result(answers(0.5, 1), questions=["?"] * N)})
    with pytest.raises(DataError, match="same questions on both sides"):
        compare([run(None, 0, answers(0.5, 0)), other])


def test_models_that_were_shown_different_things_are_refused() -> None:
    told = replace(run("sft", 0, answers(0.5, 1)), results={"after": result(answers(0.5, 1), context="answer_only")})
    with pytest.raises(DataError, match=r"only with the same context in their prompts.*answer_only"):
        compare([run(None, 0, answers(0.5, 0)), told])


def test_what_was_measured_before_is_paired_by_question_too() -> None:
    before = answers(0.2, 9)
    turned = result(before[::-1], questions=[f"question {number}" for number in reversed(range(N))])
    runs = [
        replace(run(None, 0, answers(0.6, 0), before), results={"after": result(answers(0.6, 0)), "before": turned})
    ]
    assert compare(runs).arms[0].gain == compare([run(None, 0, answers(0.6, 0), before)]).arms[0].gain


def test_intervals_without_the_adjusted_test_beat_nobody() -> None:
    (pair,) = compare(arms((None, [0.5, 0.51, 0.49]), ("sft", [0.3, 0.31, 0.3]))).pairwise
    assert beats(pair) and not beats(replace(pair, p_value=0.06))


def test_one_pair_of_seeds_is_no_victory_and_none_in_common_is_said() -> None:
    one = compare(arms((None, [0.5]), ("sft", [0.3])))
    assert one.verdict.startswith("method beat 0 of 1")
    method = [run(None, seed, answers(0.6, seed)) for seed in (0, 1, 2)]
    others = [run("sft", seed, answers(0.3, seed)) for seed in (3, 4, 5)]
    comparison = compare([*method, *others])
    assert comparison.pairwise[0].spread.seeds == 1 and comparison.verdict.startswith("method beat 0 of 1")
    assert comparison.warnings == ["sft and method have no seed in common: their difference includes that of the seeds"]


def test_another_number_of_training_rows_within_an_arm_is_warned_of() -> None:
    runs = arms((None, [0.5, 0.5]))
    runs[0].card["rows"], runs[1].card["rows"] = 384, 5  # type: ignore[index]
    assert compare(runs).warnings == ["method: seed 1 was trained on 5 rows, and seed 0 on 384"]


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'accuracy'"):
        compare(arms((None, [0.5])), "acuracy")
    with pytest.raises(ConfigError, match="cannot read answers"):
        compare(arms((None, [0.5])), "format")
    with pytest.raises(ConfigError, match="--samples 8"):
        compare(arms((None, [0.5])), "pass@8")
    with pytest.raises(ConfigError, match="no runs"):
        compare([])


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    paths = []
    before = result(answers(0.2, 9))
    for each in arms((None, [0.5, 0.52]), ("sft", [0.3, 0.31])):
        folder = tmp_path / Path(each.folder).name
        each.after.save(folder / "evaluation" / "after.json")
        before.save(folder / "evaluation" / "before.json")
        (folder / "run_card.json").write_text(json.dumps(each.card))
        paths.append(str(folder))
    return paths


def test_command_prints_a_table_and_its_words_and_writes_both(folders: list[str], tmp_path: Path, capsys) -> None:
    files = ["--json", str(tmp_path / "new" / "c.json"), "--markdown", str(tmp_path / "new" / "c.md")]
    assert main(["compare", *folders, *files]) == 0
    out = capsys.readouterr().out
    assert "method beat sft: +20.5" in out and "grader exact" in out and "before " in out
    assert "51.0 (" in out and "30.5 (" in out
    stored, table = json.loads((tmp_path / "new" / "c.json").read_text()), (tmp_path / "new" / "c.md").read_text()
    assert stored["pairwise"][0]["difference"]["difference"] == pytest.approx(0.205)
    assert [each["seed"] for each in stored["arms"][0]["runs"]] == [0, 1]
    assert "| method | 0, 1 | 51.0 (" in table and "method beat sft" in table


def test_command_takes_what_opsd_eval_wrote(folders: list[str], tmp_path: Path, capsys) -> None:
    for name, share in (("base", 0.2), ("tuned", 0.6)):
        result(answers(share, 1)).save(tmp_path / f"{name}.json")
    assert main(["compare", str(tmp_path / "tuned.json"), str(tmp_path / "base.json")]) == 0
    out = capsys.readouterr().out
    assert "tuned is ahead of base: +" in out and "careful" not in out and "single models" in out
    (tmp_path / "b").mkdir()
    result(answers(0.4, 1)).save(tmp_path / "b" / "tuned.json")
    assert main(["compare", str(tmp_path / "tuned.json"), str(tmp_path / "b" / "tuned.json"), folders[0]]) == 0
    assert "careful" not in capsys.readouterr().out


def test_a_folder_that_was_not_measured_is_refused_with_the_way_out(folders: list[str], tmp_path: Path, capsys) -> None:
    (Path(folders[0]) / "evaluation" / "after.json").unlink()
    assert main(["compare", *folders]) == 2
    assert "was not measured after training" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="opsd eval"):
        read_runs([str(tmp_path)])
