"""Findings of doctor and lint: one per thing that was checked, with what was seen and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = ("pass", "warn", "fail", "skip")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    >>> Finding("cost", "warn", "one step takes 40 minutes", do="Lower max_completion_length.")

    Args:
        check: the name of the check.
        status: pass; warn (allowed, probably not meant); fail (training would be wrong); skip (could not be checked).
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
    """All findings about a run.

    >>> Examination([Finding("cost", "pass", "one step takes 2 s")], rows=16, seconds=3.0).verdict
    '1 pass (16 rows, 3 s)'

    Args:
        findings: in the order of the checks.
        rows: rows that were examined.
        seconds: that the checks took.
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
        """The number of findings by status, in one line."""
        counts = {status: len(self.with_status(status)) for status in STATUSES}
        text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"{text} ({self.rows} rows, {self.seconds:.0f} s)"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "verdict": self.verdict,
            "failed": self.failed,
            "rows": self.rows,
            "seconds": round(self.seconds, 2),
            "findings": [asdict(finding) for finding in self.findings],
        }


def listed(values: Iterable[Any], most: int = 5) -> str:
    """Return values separated by commas, at most the first `most`."""
    values = list(values)
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
