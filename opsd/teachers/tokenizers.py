"""Checks whether two tokenizers use the same ids for the same tokens.

A loss compares two distributions id by id. Sizes alone prove nothing: Qwen pads one tokenizer to heads of 151,936 and
152,064, and vocabularies of equal size can hold different tokens.
"""

from __future__ import annotations

import warnings

from transformers import PreTrainedTokenizerBase

from opsd.errors import OPSDWarning, TokenizerMismatchError

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x**2  # 3.14, 1,000 and -7",
    "naïve café, Größe, 中文字符, русский, العربية, 🙂",
    "\\frac{a}{b} \\leq \\sqrt{2}\n\n<b>bold</b>",
)
SPECIAL = ("bos_token", "eos_token", "unk_token")  # padding is masked on both sides, so pad_token may differ


def first_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """Return the first difference between two tokenizers in words, or None."""
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    if vocab_a != vocab_b:
        token = min(
            (t for t in vocab_a.keys() | vocab_b.keys() if vocab_a.get(t) != vocab_b.get(t)),
            key=lambda t: (vocab_a.get(t, len(vocab_a)), t),
        )
        return f"token {token!r} has id {vocab_a.get(token)} for the student and {vocab_b.get(token)} for the teacher"
    for name in SPECIAL:
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(a, name)!r} for the student and {getattr(b, name)!r} for the teacher"
    for text in PROBES:
        ids_a, ids_b = (t(text, add_special_tokens=False)["input_ids"] for t in (a, b))
        if ids_a != ids_b:
            return f"{text!r} becomes {ids_a} for the student and {ids_b} for the teacher"
    return None


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose ids mean other tokens; warn where only the chat templates differ.

    Raises:
        TokenizerMismatchError: with the first difference.
    """
    difference = first_difference(student, teacher)
    if difference is not None:
        raise TokenizerMismatchError(
            f"student and teacher must share a tokenizer, and {difference}. The loss compares their distributions id "
            "by id, so it would compare different tokens. Use a teacher of the student's family (for other tokenizers, "
            "TRL's GOLD trainer aligns text)."
        )
    if student.chat_template != teacher.chat_template:
        warnings.warn(
            "student and teacher share a vocabulary and differ in their chat templates; each renders its own. Compare "
            "the two prompts with `opsd show` before you train.",
            OPSDWarning,
            stacklevel=2,
        )
