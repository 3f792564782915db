"""Tasks of the experiments: those of the demos, and requests for sentences."""

from __future__ import annotations

from pathlib import Path

from opsd.commands.demo_tasks import TEST_SEED, Row, arithmetic, asked, general, neutral, question

__all__ = ["Row", "general", "neutral", "sentences", "sums", "training_sums"]
WORDS = Path(__file__).with_name("words.txt")
SELECTION_SEED = 777  # of sums


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
