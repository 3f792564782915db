"""What an examination found: one finding per thing that was looked at, with what was seen and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        check: the name of the check.
        status: pass; warn, allowed and probably not meant; fail, training would be wrong; skip, could not look.
        saw: what was seen, in one or two sentences.
        do: what to do about it, where there is something to do.
        detail: more to look at, such as the tokens at a boundary, one line each.
        figures: numbers behind `saw`, by name.
    """

    check: str
    status: Status
    saw: str
    do: str = ""
    detail: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Examination:
    """Everything that was found.

    Args:
        findings: in the order of the checks.
        rows: how many rows were looked at.
        seconds: what it took.
    """

    findings: list[Finding]
    rows: int = 0
    seconds: float = 0.0

    def with_status(self, *statuses: Status) -> list[Finding]:
        """Return the findings with one of these statuses."""
        return [finding for finding in self.findings if finding.status in statuses]

    @property
    def failed(self) -> bool:
        """Whether training would be wrong."""
        return bool(self.with_status("fail"))

    @property
    def verdict(self) -> str:
        """How it went, in a line."""
        counts = {word: len(self.with_status(word)) for word in ("pass", "warn", "fail", "skip")}
        told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return f"{told} ({self.rows} rows, {self.seconds:.0f} s)"

    def as_dict(self) -> dict[str, Any]:
        """Return it in plain values, for machines."""
        return {
            "verdict": self.verdict,
            "failed": self.failed,
            "rows": self.rows,
            "seconds": round(self.seconds, 2),
            "findings": [asdict(finding) for finding in self.findings],
        }


def listed(values: Iterable[Any], most: int = 5) -> str:
    """Return values in a row, the first few of many."""
    values = list(values)
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
