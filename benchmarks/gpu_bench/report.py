"""Results as JSON, written as they come, and as one table."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_bench.contest import OURS, Row
from benchmarks.gpu_bench.machine import Ceilings
from benchmarks.gpu_bench.timing import Quantiles

if TYPE_CHECKING:
    from benchmarks.gpu_bench.sweep import Swept  # needs Triton

Json = dict[str, object]
HEAD = ("contest", "part", "competitor", "eager us (p20 p80)", "graph us (p20 p80)", "peak MB", "roofline", "x ours")


@dataclass(slots=True)
class Report:
    """All that a run has found so far."""

    path: Path | None
    machine: dict[str, str] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    suite: Json = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    sweep: "list[Swept]" = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Write what there is, so that a run cut short leaves what it found."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ours = {(row.contest, row.part): row.best_us for row in self.rows if row.competitor == OURS}
        found = asdict(self) | {"path": None}
        for row, record in zip(self.rows, found["rows"], strict=True):
            record["roofline"] = row.floor_us / row.best_us
            record["times_ours"] = row.best_us / ours.get((row.contest, row.part), math.nan)
        # JSON has no NaN
        text = json.dumps(_without_nan(found), indent=1, allow_nan=False)
        partial = self.path.with_suffix(".part")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a markdown table; the last column is a competitor's time over ours."""
    ours = {(row.contest, row.part): row.best_us for row in rows if row.competitor == OURS}
    cells = [HEAD, *(_cells(row, ours.get((row.contest, row.part), math.nan)) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def verdict(rows: Sequence[Row]) -> str:
    """Return a line for each contest and part: our time, its share of the roofline, the best other and its ratio."""
    lines = ["| contest | part | ours eager us | ours graph us | roofline | best eager | x | best graph | x |"]
    lines.append("|" + "---|" * 9)
    for ours in (row for row in rows if row.competitor == OURS and not row.reason):
        others = [r for r in rows if (r.contest, r.part) == (ours.contest, ours.part) and not is_ours(r.competitor)]
        eager = _best({r.competitor: r.eager for r in others}, ours.eager)
        graph = _best({r.competitor: r.graph for r in others}, ours.graph)
        times = ("" if q is None else f"{q.p50:.1f}" for q in (ours.eager, ours.graph))
        lines.append(
            f"| {ours.contest} | {ours.part} | {' | '.join(times)} | {100 * ours.floor_us / ours.best_us:.0f} % "
            f"| {eager} | {graph} |"
        )
    return "\n".join(lines)


def is_ours(competitor: str) -> bool:
    """Return whether a row times this project: again, or with an option."""
    return competitor.startswith(OURS)


def _best(others: dict[str, Quantiles | None], ours: Quantiles | None) -> str:
    """Return the fastest of the others and its time over ours, as two cells."""
    times = {name: q.p50 for name, q in others.items() if q is not None}
    if not times or ours is None:
        return " | "
    name = min(times, key=lambda name: times[name])
    return f"{name} {times[name]:.1f} | {times[name] / ours.p50:.2f}"


def _cells(row: Row, ours_us: float) -> tuple[str, ...]:
    if row.reason:
        return (row.contest, row.part, row.competitor, row.reason, "", "", "", "")
    peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
    share = f"{100 * row.floor_us / row.best_us:.0f} %"
    ratio = row.best_us / ours_us
    return (
        *(row.contest, row.part, row.competitor, _times(row.eager), _times(row.graph)),
        *(peak, share, "" if math.isnan(ratio) else f"{ratio:.2f}"),
    )


def _times(q: Quantiles | None) -> str:
    return "" if q is None else f"{q.p50:.1f} ({q.p20:.1f} {q.p80:.1f})"


def _without_nan(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
        case _:
            return value
