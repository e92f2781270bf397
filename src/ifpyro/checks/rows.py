"""The rows of a check: a question, its answer, and whether it passes, warns or fails."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail"]

COLOURS = {"pass": "#2e7d32", "warn": "#b26a00", "fail": "#c62828"}


@dataclass(frozen=True)
class Row:
    """One question, its answer and why.

    Attributes:
        name: what was asked, short and unique.
        verdict: ``"pass"``, ``"warn"`` or ``"fail"``.
        value: the number measured; NaN if it could not be.
        unit: of the value.
        warn_above: the value above which a measurement warns; None for a statistical test, which warns by its p-value.
        fail_above: the value above which it fails; None for a question that never fails.
        p: p-value of a statistical test.
        level: the p-value below which it is significant.
        note: on what it was measured, or what to do.
    """

    name: str
    verdict: Verdict
    value: float
    unit: str = ""
    warn_above: float | None = None
    fail_above: float | None = None
    p: float | None = None
    level: float | None = None
    note: str = ""


def by_size(name: str, value: float, unit: str, warn: float, fail: float | None, note: str = "") -> Row:
    """A row that is judged by the size of a number alone; one that is not finite is the worst that the row can be."""
    verdict: Verdict = "pass" if value <= warn else "warn"
    if fail is not None and not value <= fail:
        verdict = "fail"
    return Row(name, verdict, value, unit, warn, fail, note=note)


def by_evidence(name: str, effect: float, limit: float, p: float, level: float, unit: str = "", note: str = "") -> Row:
    """Needs evidence *and* size to fail: significant and small only warns, insignificant passes, NaN fails."""
    verdict: Verdict = "pass" if p >= level else "warn" if effect <= limit else "fail"
    return Row(name, verdict, effect, unit, None, limit, p, level, note)
