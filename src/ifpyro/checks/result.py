"""What a check found: rows of pass, warn and fail, printed, drawn, and kept as plain data in the flow's file."""

import html
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .figure import check_figure
from .rows import COLOURS, Row, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1
_HEADER = ("", "question", "value", "warn", "fail", "p", "")


@dataclass(frozen=True)
class CheckResult:
    """The answer of :func:`ifpyro.check`: print it, :meth:`plot` it, or keep it.

    Attributes:
        rows: the questions in the order of the table.
        settings: what was checked on: numbers of rows, seed, level, seconds, version.
        picture: the few numbers that :meth:`plot` draws.
        fingerprint: of the map that was checked.

    Example:
        >>> result = ifpyro.check(flow, flow.sample(100, seed=0), store=False)
        >>> result.verdict, result["round trip"].verdict
        ('pass', 'pass')
        >>> ifpyro.CheckResult.from_json(result.to_json()).verdict
        'pass'
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]
    picture: dict[str, Any] = field(repr=False)
    fingerprint: str = ""

    @property
    def passed(self) -> bool:
        """Whether no row fails; warnings are allowed."""
        return self.verdict != "fail"

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all rows."""
        found = {row.verdict for row in self.rows}
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"

    def __getitem__(self, name: str) -> Row:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"expected the name of a row among {[row.name for row in self.rows]}, got {name!r}")

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    # -- to read ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [_HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[k]) for line in lines) for k in range(len(_HEADER) - 1)]
        table = [
            "  ".join([*(f"{c:<{w}}" for c, w in zip(line[:-1], widths, strict=True)), line[-1]]).rstrip()
            for line in lines
        ]
        return "\n".join([*table, self._summary()])

    def _repr_html_(self) -> str:
        def line(cells: tuple[str, ...], tag: str, colour: str = "inherit") -> str:
            inside = "".join(
                f"<{tag} style='text-align:left{f';color:{colour};font-weight:bold' if k == 0 else ''}'>"
                f"{html.escape(cell)}</{tag}>"
                for k, cell in enumerate(cells)
            )
            return f"<tr>{inside}</tr>"

        body = "".join(line(_cells(row), "td", COLOURS[row.verdict]) for row in self.rows)
        head = line(_HEADER, "th")
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table><p>{html.escape(self._summary())}</p>"

    def _summary(self) -> str:
        count = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in ("pass", "warn", "fail")}
        on = self.settings
        return (
            f"{self.verdict}: {count['pass']} pass, {count['warn']} warn, {count['fail']} fail on {on['rows']} of "
            f"{on['held_out_rows']} held-out rows in {on['seconds']:.1f} s (a correct flow passes all tests with "
            f"probability {1 - on['level']:.3g})"
        )

    def plot(self) -> "Figure":
        """A picture of the check (needs matplotlib)."""
        return check_figure(self)

    # -- to keep ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with None for numbers that are not finite."""
        rows = [asdict(row) for row in self.rows]
        parts = {"settings": self.settings, "rows": rows, "picture": self.picture}
        return {"version": VERSION, "fingerprint": self.fingerprint, **_plain(parts)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CheckResult":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if the data are not of a check, or from a newer version.
        """
        if not isinstance(data, dict) or not {"version", "rows", "settings", "picture"} <= data.keys():
            raise ValueError("expected what CheckResult.to_dict() gave, got other data")
        if data["version"] > VERSION:
            raise ValueError(
                f"this check has version {data['version']}, newer than the {VERSION} that this ifpyro reads; upgrade it"
            )
        rows = tuple(
            Row(**{**row, "value": math.nan if row["value"] is None else row["value"]}) for row in data["rows"]
        )
        return cls(rows, data["settings"], data["picture"], data.get("fingerprint", ""))

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "CheckResult":
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


def _cells(row: Row) -> tuple[str, ...]:
    def limit(value: float | None) -> str:
        return "" if value is None else f"> {value:.3g}"

    warn = limit(row.warn_above) if row.level is None else f"p < {row.level:.2g}"
    fail = limit(row.fail_above) + (" and p" if row.level is not None else "")
    p = "" if row.p is None else f"{row.p:.2g}"
    return (row.verdict, row.name, f"{row.value:.3g} {row.unit}".rstrip(), warn, fail, p, row.note)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
