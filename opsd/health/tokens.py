"""Classes of tokens, and phrases that tell where a rollout comes from.

Knows text; nothing of runs. The lists are English; a token of another language, or a part of one, counts as a word.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

# Words by which a model thinks aloud; "epistemic verbalisation", whose loss goes with collapse (arXiv 2603.24472).
HEDGES = frozenset(
    [
        "wait",
        "hmm",
        "maybe",
        "perhaps",
        "actually",
        "alternatively",
        "let",
        "check",
        "verify",
        "suppose",
        "assume",
        "think",
        "seems",
        "might",
        "could",
        "probably",
        "however",
        "but",
        "so",
        "therefore",
        "because",
        "first",
        "then",
        "next",
        "finally",
    ]
)
THINKING = re.compile(r"\b(wait|hmm|maybe|perhaps|actually|alternatively|let me|let's|check|verify)\b", re.IGNORECASE)
# A student that never saw a solution has no reason to name one (RLSD; SDFT's "inheritance artefact").
LEAKS = re.compile(
    r"\b(?:the|a|this) (?:reference|given|provided|official) (?:solution|answer|trace|result)\b"
    r"|\bas (?:given|provided|stated|shown) (?:in|by|above)\b|\bbased on the (?:text|context|solution|document|hint)\b"
    r"|\baccording to the (?:solution|hint|document|reference|context)\b|\bthe hint (?:says|suggests|tells)\b",
    re.IGNORECASE,
)
CLASSES = ("digits", "words", "hedges", "punctuation", "space", "special")


@cache
def class_of(token: str) -> str:
    """Return the class of a token, by its text: one of CLASSES.

    Example:
        >>> [class_of(token) for token in (" 12", " Wait", ".", "<|im_end|>")]
        ['digits', 'hedges', 'punctuation', 'special']
    """
    text = token.strip()
    if not text:
        return "space"
    if re.fullmatch(r"<[^<>\s]*>|\[[A-Z/]+\]", text):
        return "special"
    if any(c.isdigit() for c in text):
        return "digits"
    if all((c.isascii() and not c.isalnum()) or unicodedata.category(c).startswith("P") for c in text):
        return "punctuation"
    return "hedges" if text.lower() in HEDGES else "words"
