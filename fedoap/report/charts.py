"""Curves and bars as SVG that takes its text colour from the page, so that it suits light and dark pages."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"
"""Stands for the page's text colour while matplotlib draws."""
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedoap",  # the same figure is the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
}

Series = Mapping[str, Sequence[tuple[float, float]]]


def curves(series: Series, label: str, *, top: float | None = None) -> str:
    """Return a line over the rounds for each name; `top` is the upper end of the axis."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(label)
        for (name, points), colour in zip(series.items(), colours(len(series)), strict=True):
            rounds, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(rounds, values, color=colour, marker="o", markersize=3, linewidth=1.5, label=name)
        axes.set_ylim(bottom=0, top=top)
        _legend(axes, len(series))
        return svg(figure)


def bars(series: Series, label: str) -> str:
    """Return bars over the rounds, the names stacked."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(label)
        base: dict[float, float] = {}
        for (name, points), colour in zip(series.items(), colours(len(series)), strict=True):
            rounds, heights = [x for x, _ in points], [y for _, y in points]
            axes.bar(rounds, heights, bottom=[base.get(x, 0) for x in rounds], color=colour, width=0.7, label=name)
            base |= {x: base.get(x, 0) + y for x, y in points}
        _legend(axes, len(series))
        return svg(figure)


def _figure(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _legend(axes: Axes, names: int) -> None:
    if names:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=min(names, 4), fontsize=8, columnspacing=1.2)


def svg(figure: Figure) -> str:
    """Return a figure whose ink is the colour of the text around it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(INK, "currentColor")
    return text[text.index("<svg") :]


def colours(count: int) -> list[str]:
    """Return a colour for each of so many lines; after the eighth the colours repeat."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
