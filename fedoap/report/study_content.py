"""The content of a study's page, before it becomes HTML or Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedoap.report.statistics import Comparison, Estimate

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
Mark = Literal["", "best", "tied", "up", "down"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One field of a table."""

    text: str
    note: str = ""
    """A second line, smaller."""
    mark: Mark = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows below a head; the first cell of a row is its name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    """Sentences below it."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One SVG: its file's name without ending, and its caption."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what follows it."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    more: Sequence[Table] = ()
    """Tables that are collapsed in HTML."""
    more_title: str = ""
    drawings: Sequence[Drawing] = ()


def row(*texts: str) -> list[Cell]:
    """Return cells of plain text."""
    return [Cell(text) for text in texts]


def score(estimate: Estimate | None, digits: int = 3) -> str:
    """Return a mean and its interval's margin.

    >>> score(Estimate(0.5, 0.4, 0.6, 3)), score(Estimate(0.5, None, None, 1))
    ('0.500 ± 0.100', '0.500')
    """
    if estimate is None:
        return NOTHING
    margin = "" if estimate.margin is None else f" ± {estimate.margin:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{margin}"


def signed(value: float, digits: int = 3) -> str:
    """Return a number with its sign; zero has none.

    >>> signed(-0.0001), signed(0.25, 2)
    ('0.000', '+0.25')
    """
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", MINUS)


def between(estimate: Estimate, digits: int = 3) -> str:
    """Return an interval in words."""
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"95 % {signed(estimate.low, digits)} to {signed(estimate.high, digits)}"


def probability(p: float | None) -> str:
    """Return p as text.

    >>> probability(0.0004), probability(0.034), probability(None)
    ('p < 0.001', 'p = 0.034', 'not tested')
    """
    if p is None:
        return "not tested"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def difference(comparison: Comparison | None, digits: int = 3) -> Cell:
    """Return a difference with its margin, and below it what the test says."""
    if comparison is None:
        return Cell(NOTHING, "no pairs")
    margin = comparison.effect.margin
    text = signed(comparison.effect.mean, digits) + ("" if margin is None else f" ± {margin:.{digits}f}")
    verdict = comparison.verdict
    note = f"{verdict}, {probability(comparison.adjusted)}, n = {comparison.effect.count}"
    return Cell(text, note, "up" if verdict == "better" else "down" if verdict == "worse" else "")


def sentence(subject: str, comparison: Comparison, digits: int = 3) -> str:
    """Return a comparison in words."""
    effect = comparison.effect
    return (
        f"{subject}: {signed(effect.mean, digits)} ({between(effect, digits)}; {probability(comparison.adjusted)}, "
        f"{effect.count} patients): {comparison.verdict}."
    )


def plural(count: int, word: str) -> str:
    """Return a count and its word.

    >>> plural(1, "run"), plural(2, "run")
    ('1 run', '2 runs')
    """
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
