"""Recipes and `load_teacher`: the shipped files, what a name means, what is refused."""

from __future__ import annotations

import math
import re
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset

from opsd import OPSDTrainer, sources
from opsd.contexts.reading import as_context
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, OPSDWarning
from opsd.teachers import (
    TEACHERS,
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    RoutedTeacher,
    SameCheckpointTeacher,
    SiblingTeacher,
    load_teacher,
)
from opsd.teachers.recipes import Recipe, find_recipe, read_recipe
from opsd.training.config import OPSDConfig
from opsd.training.groups import Groups
from opsd.training.token_selection import TokenSelection

NAMES = sources.names("teachers")
README = (sources.folder("teachers") / "README.md").read_text(encoding="utf-8")
SAMPLED = "reverse KL(student ‖ teacher), over the sampled token, as a policy gradient, no baseline; tokens: all"
SDPO = "generalised JSD (β = 0.5), over the student's 100 likeliest tokens, one bucket for the rest; tokens: all"
VALID = "about: mine\nsource: here\nteacher: {strategy: ema, decay: 0.5}\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a network call: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def recipe(name: str) -> Recipe:
    path = find_recipe(name)
    assert path is not None
    return read_recipe(path)


def yours(name: str, model: str = "organisation/large") -> dict[str, Any]:
    """What a recipe leaves to the user, with values that could be given."""
    values = {"model": model, "column": "domain", "teachers": {"even": model, "odd": "live"}}
    return {key: values[key] for key, value in recipe(name).teacher.items() if value is None}


def settings(name: str, folder: Path, **changes: Any) -> OPSDConfig:
    with warnings.catch_warnings():
        if recipe(name).args.get("lmbda", 1.0) < 0.5:  # what training off-policy says, tested below
            warnings.simplefilter("ignore", OPSDWarning)
        warnings.filterwarnings("ignore", "top_p 0.95 and top_k 20", OPSDWarning)  # as published by OPSD
        return OPSDConfig(str(folder), use_cpu=True, bf16=False, **{**recipe(name).args, **changes})


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- the shipped recipes


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_is_for_and_where_its_numbers_come_from(name: str) -> None:
    found = recipe(name)
    assert found.about.endswith(".")
    assert re.search(r"arXiv \d{4}\.\d{5}|Thinking Machines", found.source)


@pytest.mark.parametrize("name", [name for name in NAMES if not yours(name)])
def test_recipe_builds_its_teacher_and_context(name: str) -> None:
    found, teacher = recipe(name), load_teacher(name)
    assert type(teacher) is TEACHERS[found.teacher["strategy"]]
    shown = as_context(found.context)
    assert (teacher.context and teacher.context.name) == (shown and shown.name)


@pytest.mark.parametrize("name", [name for name in NAMES if yours(name)])
def test_recipe_that_leaves_something_to_the_user_says_how_to_give_it(name: str) -> None:
    given = yours(name)
    wanted = ", ".join(f"{key}: …" for key in given)
    with pytest.raises(ConfigError, match=rf"needs {', '.join(given)}, which only you.*\{{recipe: …, {wanted}\}}"):
        load_teacher(name)
    teacher = load_teacher({"recipe": name, **given})
    large = teacher.parts["even"] if isinstance(teacher, RoutedTeacher) else teacher
    assert isinstance(large, SiblingTeacher)
    assert large.source == "organisation/large"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_args_are_training_arguments(name: str, tmp_path: Path) -> None:
    """YAML reads `1e-5` as text, and a text would reach the optimizer."""
    made = settings(name, tmp_path)
    for key, value in recipe(name).args.items():
        assert getattr(made, key) == value
        assert not (isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value)), f"{key} is text"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_a_step(name: str, tmp_path: Path, llama_folder: str) -> None:
    small = {"max_steps": 1, "max_completion_length": 4, "per_device_train_batch_size": 8}
    args = settings(name, tmp_path, **small, gradient_accumulation_steps=1, logging_steps=1, report_to="none")
    grade = (lambda completions, **_: [i % 2 for i in range(len(completions))]) if args.num_generations == 8 else None
    trainer = OPSDTrainer(
        make_llama(1),
        {"recipe": name, **yours(name, llama_folder)},
        args=args,
        train_dataset=Dataset.from_list([{**row, "demonstration": "19", "rule": "Be brief."} for row in make_rows()]),
        processing_class=make_tokenizer(),
        reward_funcs=grade,
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    knows_more = recipe(name).args or recipe(name).context or yours(name)
    assert (trainer.state.log_history[0]["divergence"] > 1e-6) == bool(knows_more)


@pytest.mark.parametrize(
    ("name", "objective", "rows"),
    [
        ("gkd", "forward KL(teacher ‖ student); tokens: all", None),
        ("minillm", "reverse KL(student ‖ teacher); plus the mean reward of later tokens; tokens: all", 64),
        ("on_policy_distillation", SAMPLED, 512 * 4),
        ("strong_to_weak_1", "forward KL(teacher ‖ student); tokens: all", None),
        ("strong_to_weak_2", "reverse KL(student ‖ teacher); tokens: all", None),
        ("opsd", "forward KL(teacher ‖ student) at temperature 1.1, each entry at most 0.05 nats; tokens: all", 32),
        # The paper's text says reverse; its results are forward.
        ("sdft", "forward KL(teacher ‖ student); tokens: without the first 3", 32),
        ("sdpo", SDPO, 32 * 8),
        ("srpo", SDPO, 32 * 8),
        ("crisp", "reverse KL(student ‖ teacher); tokens: all", 32),
        ("earlier_self", SAMPLED, 64 * 4),
        (
            "context_distillation",
            "reverse KL(student ‖ teacher), over the student's 256 likeliest tokens, one bucket for the rest; tokens: "
            "all",
            128,
        ),
        ("multi_teacher", SAMPLED, 2 * 256 * 4),
    ],
)
def test_published_recipe_has_the_objective_and_batch_of_its_source(
    name: str, objective: str, rows: int | None, tmp_path: Path
) -> None:
    args = settings(name, tmp_path)
    selection = TokenSelection.from_config(args, make_tokenizer(), [])
    assert f"{args.objective.describe()}; tokens: {selection.describe()}" == objective
    sets_a_batch = "per_device_train_batch_size" in recipe(name).args
    assert sets_a_batch == (rows is not None)
    if rows is not None:
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == rows
    assert recipe(name).differences


def test_sdpo_and_srpo_show_a_success_of_the_group_and_differ_in_who_learns_how(tmp_path: Path) -> None:
    eight = "8 rollouts per prompt, rewarded by last_number; "
    words = {name: Groups.from_config(settings(name, tmp_path), "last_number").describe() for name in ("sdpo", "srpo")}
    assert words == {
        "sdpo": eight + "every rollout is distilled (success from 1)",
        "srpo": eight + "rollouts below success_reward are distilled (success from 0.5); "
        "+ 1·GRPO on rollouts that are not distilled",
    }
    for name in words:
        context = load_teacher(name).context
        assert context is not None and context.optional_fields == {"sibling", "feedback"}


def test_strong_to_weak_goes_from_the_teachers_text_to_the_students(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match="lmbda is 0"):
        first = OPSDConfig(str(tmp_path), use_cpu=True, bf16=False, **recipe("strong_to_weak_1").args)
    second = settings("strong_to_weak_2", tmp_path)
    assert (first.lmbda, first.seq_kd) == (0.0, True)
    assert (second.lmbda, second.seq_kd) == (1.0, False)


def test_mixture_recipe_is_mostly_the_frozen_student() -> None:
    """SDPO's update rate is the student's share; the other way round the teacher would be a live one."""
    teacher = load_teacher("mixture")
    assert isinstance(teacher, MixtureTeacher)
    shares = {part.strategy: w for part, w in zip(teacher.parts.values(), teacher.weights, strict=True)}
    assert (teacher.kind, shares) == ("geometric", {"same_checkpoint": 0.95, "live": 0.05})


def test_published_update_rates_became_decays() -> None:
    """SDPO and SDFT name the student's share per step; taken for the decay, the teacher would be a live one."""
    assert load_teacher("sdpo").settings["decay"] == 1 - 0.05
    assert load_teacher("sdft").settings["decay"] == 1 - 0.01


def test_opsd_recipe_lets_only_the_teacher_think(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    student = PromptRenderer(tokenizer, chat_template_kwargs=settings("opsd", tmp_path).chat_template_kwargs)
    row = {"prompt": [{"role": "user", "content": "What is 12 + 7?"}], "solution": "12 + 7 = 19"}
    context = load_teacher("opsd").context
    assert context is not None
    assert "<think>" not in tokenizer.decode(student.ids(row["prompt"]))
    assert tokenizer.decode(context.render(row, renderer=student)).endswith("<think>\n")


# ---------------------------------------------------------------- the README


def rows_of(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading of the README, without their code marks and links."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [
        [re.sub(r"\[?`(\w+)`\]?(\(#\w+\))?", r"\1", cell.strip()) for cell in line.split("|")[1:-1]] for line in lines
    ]


def test_readme_lists_every_strategy() -> None:
    assert sorted(row[0] for row in rows_of("Strategies")) == sorted(TEACHERS)


def test_readme_has_an_entry_for_every_recipe() -> None:
    table = {row[0]: row[1:] for row in rows_of("The recipes")}
    assert sorted(table) == NAMES
    assert re.findall(r"^### (\w+)$", README, re.MULTILINE) == list(table)
    for name, (strategy, shown, _) in table.items():
        assert recipe(name).teacher["strategy"] == strategy
        context = as_context(recipe(name).context)
        assert context is None or context.name == shown


def test_readme_examples_build(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (whole,) = (block for block in blocks if "about:" in block)
    for fragment in (yaml.safe_load(block) for block in blocks if block != whole):
        load_teacher(fragment["teacher"], context=fragment.get("context"))
    mine = write(tmp_path, whole)
    assert load_teacher(mine).settings["decay"] == 0.99
    assert OPSDConfig(str(tmp_path), use_cpu=True, bf16=False, **read_recipe(mine).args).max_completion_length == 256


# ---------------------------------------------------------------- a recipe file that cannot be used


def test_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no key 'contxt'\. Did you mean 'context'\?"):
        load_teacher(write(tmp_path, VALID + "contxt: answer_only\n"))


@pytest.mark.parametrize("missing", ["about", "source", "teacher"])
def test_missing_key_is_named(missing: str, tmp_path: Path) -> None:
    kept = [line for line in VALID.splitlines() if not line.startswith(missing)]
    with pytest.raises(ConfigError, match=f"needs the key\\(s\\) {missing}:.*opsd cp ema"):
        load_teacher(write(tmp_path, "\n".join(kept)))


def test_malformed_yaml_is_refused_with_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)mine\.yaml is not valid YAML.*line 4"):
        load_teacher(write(tmp_path, "about: mine\nsource: here\nteacher:\n\tstrategy: ema\n"))


def test_file_without_a_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must hold a mapping.*holds str"):
        load_teacher(write(tmp_path, "ema\n"))


def test_missing_recipe_file_names_the_shipped_one() -> None:
    with pytest.raises(ConfigError, match=r"no recipe file 'nowhere/ema\.yaml'\. Did you mean 'ema'\?"):
        load_teacher("nowhere/ema.yaml")


# ---------------------------------------------------------------- what a name means


def test_nothing_means_the_same_checkpoint_shown_nothing() -> None:
    teacher = load_teacher()
    assert type(teacher) is SameCheckpointTeacher
    assert teacher.context is None


def test_recipe_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ema").mkdir()
    monkeypatch.chdir(tmp_path)
    assert type(load_teacher("ema")) is EMATeacher
    assert type(load_teacher("./ema")) is SiblingTeacher


@pytest.mark.parametrize("as_given", [str, Path])
def test_path_to_yaml_is_a_recipe(as_given: type, tmp_path: Path) -> None:
    assert load_teacher(as_given(write(tmp_path, VALID))).settings["decay"] == 0.5


def test_yaml_in_a_folder_is_a_recipe_and_not_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "recipes", VALID)
    monkeypatch.chdir(tmp_path)
    assert type(load_teacher("recipes/mine.yaml")) is EMATeacher


def test_folder_and_hub_id_are_siblings_and_load_nothing(llama_folder: str) -> None:
    for source in (llama_folder, "organisation/model"):
        teacher = load_teacher(source)
        assert type(teacher) is SiblingTeacher
        assert teacher.source == source


@pytest.mark.parametrize("name", ["emma", "organisation/model/file", "./nowhere", "/nowhere/model", "~/nowhere"])
def test_name_of_nothing_is_an_error_and_no_network_call(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no teacher is called '{name}'"):
        load_teacher(name)


def test_misspelt_name_is_told_the_nearest_recipe() -> None:
    for value in ("emma", {"recipe": "emma"}):
        with pytest.raises(
            ConfigError, match=r"Did you mean 'ema'\?.*Recipes: context_distillation, crisp.*opsd teachers"
        ):
            load_teacher(value)


# ---------------------------------------------------------------- mappings, objects, contexts


def test_mapping_changes_the_numbers_of_a_recipe_and_keeps_its_context() -> None:
    teacher = load_teacher({"recipe": "sdft", "decay": 0.5})
    assert teacher.settings["decay"] == 0.5
    assert teacher.context is not None and teacher.context.name == "demonstration"


def test_mapping_with_a_strategy_needs_no_recipe() -> None:
    assert load_teacher({"strategy": "ema", "decay": 0.25}).settings["decay"] == 0.25


def test_mapping_is_left_as_it_was() -> None:
    value = {"recipe": "ema", "decay": 0.5}
    load_teacher(value)
    assert value == {"recipe": "ema", "decay": 0.5}


def test_context_given_beside_wins_over_the_recipe() -> None:
    context = load_teacher("sdft", context="answer_only").context
    assert context is not None and context.name == "answer_only"


def test_teacher_object_is_returned_as_it_is() -> None:
    teacher = LiveTeacher(context="hint")
    assert load_teacher(teacher) is teacher


def test_context_beside_a_teacher_object_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"A teacher takes one context.*LiveTeacher\(context=…\)"):
        load_teacher(LiveTeacher(), context="hint")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"strategy": "emma"}, r"no teacher strategy is called 'emma'\. Did you mean 'ema'\?"),
        ({"strategy": "ema", "decya": 0.9}, r"'ema' has no setting 'decya'\. Did you mean 'decay'\?"),
        ({"recipe": "ema", "rate": 0.05}, r"'ema' has no setting 'rate'.*Its settings: decay"),
        ({"strategy": "live", "decay": 0.9}, r"'live' has no setting 'decay'.*Its settings: none"),
        ({"strategy": "ema"}, r"'ema' needs decay"),
        ({"recipe": "ema", "decay": 1.0}, r"decay must be a number, at least 0 and below 1, and is 1\.0"),
        ({"recipe": "snapshot", "gate": {"metrc": "reward"}}, r"no setting 'metrc'\. Did you mean 'metric'\?"),
        ({"recipe": "multi_teacher", "teachers": {"math": "sibling"}}, r"part 'math' of this routed .* needs model"),
        ({"recipe": "multi_teacher", "teachers": {"math": None}}, r"part 'math' of this routed .* it is null"),
        ({"recipe": "multi_teacher", "teachers": {"math": "lve"}}, r"part 'math' .* Did you mean 'live'\?"),
        ({"recipe": "mixture", "teachers": ["live", {"strategy": "ema"}]}, r"part '1' of this mixture .* needs decay"),
        ({"recipe": "sibling", "model": "large"}, r"'large' is neither a folder that exists nor a hub id"),
    ],
)
def test_wrong_strategy_or_setting_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_teacher(value)
