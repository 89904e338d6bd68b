"""A study's figures: scores at each site, differences, curves over steps and sizes, bytes against Dice."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedoap.report.charts import COLOURS, INK, STYLE, colours, svg
from fedoap.report.statistics import Estimate

Point = tuple[float, Estimate]
LINES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True, slots=True)
class Look:
    """How one variant is drawn, the same in all figures."""

    colour: str
    line: str
    marker: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Return a look for each name; colours and markers repeat with different periods, so that no two are alike."""
    known = list(names)
    return {
        name: Look(colour, LINES[place // len(COLOURS) % len(LINES)], MARKERS[place % len(MARKERS)])
        for place, (name, colour) in enumerate(zip(known, colours(len(known)), strict=True))
    }


def dots(
    groups: Sequence[str], series: Mapping[str, Sequence[Estimate | None]], label: str, look: Mapping[str, Look]
) -> str:
    """Return for each group a dot and interval of every name, side by side."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(label, max(5.2, 1.1 * len(groups)))
        width = 0.75 / max(1, len(series))
        for place, (name, values) in enumerate(series.items()):
            offset = (place - (len(series) - 1) / 2) * width
            _errors(axes, [(i + offset, each) for i, each in enumerate(values) if each], name, look[name])
        axes.set_xticks(range(len(groups)), list(groups))
        axes.grid(visible=False, axis="x")
        _legend(axes)
        return svg(figure)


def forest(rows: Mapping[str, Estimate], label: str) -> str:
    """Return a dot and an interval per row, with a line at no difference; the first row is on top."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 0.9 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        heights = range(len(rows) - 1, -1, -1)
        for height, each in zip(heights, rows.values(), strict=True):
            axes.errorbar(each.mean, height, xerr=_margin(each), fmt="o", color=COLOURS[0], markersize=4)
        axes.set_yticks(list(heights), list(rows))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label)
        return svg(figure)


def lines(series: Mapping[str, Sequence[Point]], across: str, label: str, look: Mapping[str, Look]) -> str:
    """Return a line for each name, with intervals where they are known."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(label)
        axes.set_xlabel(across)
        for name, points in series.items():
            _errors(axes, points, name, look[name], joined=True)
        axes.set_xlim(left=0)
        _legend(axes)
        return svg(figure)


def scatter(points: Mapping[str, Point], across: str, label: str, look: Mapping[str, Look]) -> str:
    """Return a dot and interval for each name."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(label)
        axes.set_xlabel(across)
        for name, point in points.items():
            _errors(axes, [point], name, look[name])
        _legend(axes)
        return svg(figure)


def _errors(axes: Axes, points: Sequence[Point], name: str, look: Look, *, joined: bool = False) -> None:
    axes.errorbar(
        [x for x, _ in points],
        [each.mean for _, each in points],
        yerr=[_margin(each) for _, each in points],
        color=look.colour,
        linestyle=look.line if joined else "none",
        marker=look.marker,
        markersize=3 if joined else 4,
        linewidth=1.4,
        elinewidth=0.8,
        label=name,
    )


def _margin(each: Estimate) -> float:
    return math.nan if each.margin is None else each.margin


def _figure(label: str, width: float = 5.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width + 1.3, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
