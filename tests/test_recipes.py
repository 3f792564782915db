"""Recipes and `load_teacher`: the shipped files, what a name means, what is refused."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_tokenizer

from opsd import shipped
from opsd.config import OPSDConfig
from opsd.context import PrivilegedContext
from opsd.errors import ConfigError
from opsd.prompts import PromptRenderer
from opsd.selection import TokenSelection
from opsd.teachers import TEACHERS, EMATeacher, LiveTeacher, SameCheckpointTeacher, SiblingTeacher, load_teacher
from opsd.teachers.recipes import Recipe, find_recipe, read_recipe

NAMES = shipped.names("teachers")
NEED_MODEL = ["past_checkpoint", "sibling", "strong_to_weak"]
README = (shipped.folder("teachers") / "README.md").read_text(encoding="utf-8")
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


def settings(name: str, folder: Path) -> OPSDConfig:
    return OPSDConfig(str(folder), use_cpu=True, bf16=False, **recipe(name).args)


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


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEED_MODEL])
def test_recipe_builds_its_teacher_and_context(name: str) -> None:
    found, teacher = recipe(name), load_teacher(name)
    assert type(teacher) is TEACHERS[found.teacher["strategy"]]
    shown = PrivilegedContext.of(found.context)
    assert (teacher.context and teacher.context.name) == (shown and shown.name)


@pytest.mark.parametrize("name", NEED_MODEL)
def test_recipe_without_a_model_of_its_own_says_how_to_give_one(name: str) -> None:
    with pytest.raises(ConfigError, match=r"needs model.*\{recipe: …, model: …\}"):
        load_teacher(name)
    teacher = load_teacher({"recipe": name, "model": "organisation/large"})
    assert isinstance(teacher, SiblingTeacher)
    assert teacher.source == "organisation/large"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_args_are_training_arguments(name: str, tmp_path: Path) -> None:
    """YAML reads `1e-5` as text, and a text would reach the optimizer."""
    made = settings(name, tmp_path)
    for key, value in recipe(name).args.items():
        assert getattr(made, key) == value
        assert not (isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value)), f"{key} is text"


@pytest.mark.parametrize(
    ("name", "divergence", "rows"),
    [
        ("opsd", "forward KL(teacher ‖ student) at temperature 1.1, each entry at most 0.05 nats; tokens: all", 32),
        # The paper's text says reverse; its results are forward.
        ("sdft", "forward KL(teacher ‖ student); tokens: without the first 3", 32),
        (
            "sdpo",
            "generalised JSD (β = 0.5), over the student's 100 likeliest tokens, one bucket for the rest; tokens: all",
            32 * 8,
        ),
        ("crisp", "reverse KL(student ‖ teacher); tokens: all", 32),
        (
            "strong_to_weak",
            "reverse KL(student ‖ teacher), over the sampled token, as a policy gradient, no baseline; tokens: all",
            512 * 4,
        ),
    ],
)
def test_published_recipe_has_the_divergence_and_batch_of_its_source(
    name: str, divergence: str, rows: int, tmp_path: Path
) -> None:
    args = settings(name, tmp_path)
    selection = TokenSelection.of(args, make_tokenizer(), [])
    assert f"{args.objective.words}; tokens: {selection.words}" == divergence
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == rows
    assert recipe(name).differences


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
    assert tokenizer.decode(context.render(row, side=student)).endswith("<think>\n")


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
        context = PrivilegedContext.of(recipe(name).context)
        assert context is None or context.name == shown


def test_readme_examples_build(tmp_path: Path) -> None:
    *fragments, whole = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    for fragment in map(yaml.safe_load, fragments):
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
    with pytest.raises(ConfigError, match=r"nowhere/ema\.yaml does not exist\. Did you mean 'ema'\?"):
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
        with pytest.raises(ConfigError, match=r"Did you mean 'ema'\?.*Recipes: crisp, ema.*opsd teachers"):
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
    with pytest.raises(ConfigError, match=r"Only one can be shown.*LiveTeacher\(context=…\)"):
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
        ({"recipe": "sibling", "model": "large"}, r"'large' is neither a folder that exists nor a hub id"),
    ],
)
def test_wrong_strategy_or_setting_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_teacher(value)
