"""Tasks of the experiments: those of the demos, and requests for sentences."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import accumulate, pairwise
from pathlib import Path

from opsd.commands.demo_tasks import TEST_SEED, Row, arithmetic, asked, general, neutral, question

__all__ = ["LENGTHS", "Row", "general", "neutral", "pads", "sentences", "sums", "training_sums"]
WORDS = Path(__file__).with_name("words.txt")
SELECTION_SEED = 777  # of sums
LENGTHS = (3, 5, 7)  # numbers in a scratch-pad sum


def sentences() -> list[Row]:
    """Return 102 requests for a sentence with a given word; grader `benchmarks.learning.graders:sentence`."""
    return [asked(f'Write a sentence with the word "{word}".', answer=word) for word in WORDS.read_text().split()]


def sums(split: str, count: int) -> list[Row]:
    """Return sums and differences of the "test" or the "selection" split, which share no question."""
    test = arithmetic(200, TEST_SEED)
    return (test if split == "test" else arithmetic(150, SELECTION_SEED, without=map(question, test)))[:count]


def training_sums(count: int, seed: int) -> list[Row]:
    """Return sums and differences that are in neither split."""
    held_out = [question(row) for split in ("test", "selection") for row in sums(split, 200)]
    return arithmetic(count, seed + 1, without=held_out)


def pads(count: int, seed: int, terms: int | None = None, without: Iterable[str] = ()) -> list[Row]:
    """Return sums of numbers from 1 to 9 whose `completion` adds one number after the other.

    Args:
        count: different sums.
        seed: of the numbers.
        terms: numbers in each sum; None draws from LENGTHS.
        without: questions that must not be among them.
    """
    draw, seen, rows = random.Random(seed), set(without), list[Row]()
    while len(rows) < count:
        numbers = [draw.randint(1, 9) for _ in range(terms or draw.choice(LENGTHS))]
        text = f"Add step by step: {' + '.join(map(str, numbers))} ="
        if text not in seen:
            seen.add(text)
            totals = list(accumulate(numbers))
            steps = [f"{a} + {n} = {b}." for (a, b), n in zip(pairwise(totals), numbers[1:], strict=True)]
            completion = " ".join([*steps, f"The answer is {totals[-1]}."])
            rows.append(asked(text, answer=str(totals[-1]), completion=completion))
    return rows
