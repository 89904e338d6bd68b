"""`results.json` and its pictures -> `report.html`, which needs nothing else to be read."""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from pydantic import ValidationError

from fedoap.errors import ConfigError
from fedoap.report.charts import bars, curves
from fedoap.report.results import EvaluationFile, Exchange, Results, Share, read_results
from fedoap.toml import first_line, to_toml


@dataclass(frozen=True, slots=True)
class Picture:
    """One case's PNG, ready to be embedded in a page, and its caption."""

    source: str
    caption: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One SVG and its title."""

    title: str
    svg: str


def write_report(results_json: Path, page: Path) -> None:
    """Write the page of some results; pictures are taken from `evaluation/` beside them, if there is one.

    Raises:
        ConfigError: there are no results, or they have another form.
    """
    results = read_results(results_json)
    environment = templates()
    environment.filters |= {"score": _score, "signed": _signed, "duration": _duration, "megabytes": _megabytes}
    html = environment.get_template("report.html.j2").render(
        results=results,
        charts=_charts(results),
        galleries={
            name: _gallery(results_json.parent / "evaluation", name) for name in [*results.sites, *results.unseen]
        },
        sent={name: _total_bytes(results, name) for name in results.sites},
        configuration=to_toml(results.plan.model_dump(mode="json")) if results.plan else "",
    )
    page.write_text(html, encoding="utf-8")


def templates() -> jinja2.Environment:
    """Return the templates of all pages; HTML escapes its values, Markdown has the filter `plain` for that."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedoap.report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["plain"] = _plain
    return environment


def inline(path: Path) -> str:
    """Return a PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _charts(results: Results) -> list[Chart]:
    stages = {"bank": ("seed", "bank"), "training": ("train",), "calibration": ("calibrate",)}
    seconds = {name: points for name, kinds in stages.items() if (points := _seconds(results, kinds))}
    megabytes = {name: _megabytes_sent(results, name) for name in results.sites}
    return [
        Chart("Validation Dice after each round", curves(_by_site(results, "dice_validation"), "Dice", top=1)),
        Chart("Training loss", curves(_by_site(results, "loss"), "loss")),
        Chart("Seconds of each round; the last is the calibration", bars(seconds, "seconds")),
        Chart("Sent by each site", bars(megabytes, "MB")),
    ]


def _by_site(results: Results, metric: str) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [
            (each.round, share.metrics[metric])
            for each, share in _shares(results, name)
            if each.kind == "train" and metric in share.metrics
        ]
        for name in results.sites
    }


def _shares(results: Results, site: str) -> list[tuple[Exchange, Share]]:
    return [(each, each.sites[site]) for each in results.exchanges if each.outcome == "done" and site in each.sites]


def _seconds(results: Results, kinds: tuple[str, ...]) -> list[tuple[float, float]]:
    return _summed(results, lambda each: each.seconds or 0.0 if each.kind in kinds else 0.0)


def _megabytes_sent(results: Results, site: str) -> list[tuple[float, float]]:
    return _summed(results, lambda each: each.sites[site].bytes / 1e6 if site in each.sites else 0.0)


def _summed(results: Results, amount: Callable[[Exchange], float]) -> list[tuple[float, float]]:
    totals: dict[float, float] = {}
    for each in results.exchanges:
        if value := amount(each):
            totals[each.round] = totals.get(each.round, 0.0) + value
    return sorted(totals.items())


def _total_bytes(results: Results, site: str) -> int:
    return sum(each.sites[site].bytes for each in results.exchanges if site in each.sites)


def _gallery(folder: Path, site: str) -> list[Picture]:
    figures = folder / f"{site}.json"
    if not figures.exists():
        return []
    try:
        cases = EvaluationFile.model_validate_json(figures.read_bytes()).cases
    except ValidationError as error:
        raise ConfigError(f"{figures}: {first_line(error, EvaluationFile)}") from None
    numbered = [(int(path.stem), path) for path in sorted((folder / site).glob("*.png")) if path.stem.isdecimal()]
    shown = [(cases[number], path) for number, path in numbered if number < len(cases)]
    shown.sort(key=lambda pair: pair[0].dice)
    return [Picture(inline(path), f"{case.name}: Dice {_score(case.dice)}") for case, path in shown]


def _plain(text: str) -> str:
    r"""Return text that Markdown shows as it is, also in a table.

    >>> print(_plain("a|b <script>"))
    a\|b \<script>
    """
    return re.sub(r"([\\|<*`\[])", r"\\\1", text)


def _score(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
