"""Tasks of the experiments: rows with questions whose answers are known, and prompts without one.

`general` asks 275 easy questions of general knowledge, `sentences` asks for a sentence with a given word, `sums` adds
and subtracts two numbers, and `neutral` has prompts about everyday things, which no other task asks about.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from opsd.commands.demo_run import arithmetic, question

HERE = Path(__file__).parent
SPLIT_SEED = 7  # of the questions of general knowledge
SELECTION = 100  # questions of general knowledge that choose learning rates; the other 175 are the test
SUMS_TEST, SUMS_SELECTION = 999, 777  # seeds; training questions have small ones
Row = dict[str, Any]

FORMS = ("What is a {}?", "Tell me about the {}.", "Describe a {} in a few words.", "Why is a {} interesting?")


def asked(text: str, **columns: Any) -> Row:
    """Return a row with one user turn."""
    return {"prompt": [{"role": "user", "content": text}], **columns}


def general(split: str) -> list[Row]:
    """Return questions of general knowledge: the "selection" or the "test" split."""
    pairs = [line.split("|") for line in (HERE / "general.txt").read_text().splitlines()]
    random.Random(SPLIT_SEED).shuffle(pairs)
    rows = [asked(text, answer=answer) for text, answer in pairs]
    return rows[:SELECTION] if split == "selection" else rows[SELECTION:]


def sentences() -> list[Row]:
    """Return 102 requests for a sentence with a given word; grader `benchmarks.learning.graders:sentence`."""
    words = (HERE / "words.txt").read_text().split()
    return [asked(f'Write a sentence with the word "{word}".', answer=word) for word in words]


def sums(split: str, count: int) -> list[Row]:
    """Return sums and differences of the "test" or the "selection" split, which share no question."""
    test = arithmetic(200, SUMS_TEST)
    return (test if split == "test" else arithmetic(150, SUMS_SELECTION, without=map(question, test)))[:count]


def training_sums(count: int, seed: int) -> list[Row]:
    """Return sums and differences that are in neither split."""
    held_out = [question(row) for split in ("test", "selection") for row in sums(split, 200)]
    return arithmetic(count, seed + 1, without=held_out)


def neutral(count: int, seed: int) -> list[Row]:
    """Return prompts about everyday things, without answers: up to 500 different ones."""
    nouns = (HERE / "nouns.txt").read_text().split()
    texts = [form.format(noun) for noun in nouns for form in FORMS]
    random.Random(seed).shuffle(texts)
    return [asked(text) for text in texts[:count]]
