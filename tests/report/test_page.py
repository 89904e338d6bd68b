"""The page: complete, self-contained, and made of nothing but results and pictures."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedoap.config import FederationConfig
from fedoap.errors import ConfigError
from fedoap.report.page import write_report
from fedoap.report.pictures import REFERENCE, write_picture
from fedoap.report.results import (
    CaseFigures,
    EvaluationFile,
    Exchange,
    Figures,
    Ledger,
    Results,
    Share,
    SiteResult,
    UnseenResult,
    read_results,
)

SITES = ("brain", "liver", "breast")


def test_a_page_shows_every_site_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    """Planted bug: a style sheet linked from a server."""
    page = _report(tmp_path, _results())

    for name in (*SITES, "lung"):
        assert name in page
    assert page.count("<svg") == 4
    assert page.count("data:image/png;base64,") == 3
    named = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert [url for url in named if not url.startswith(("#", "data:"))] == []
    assert not re.search(r"<script|@import|<link", page)


def test_a_site_that_lost_by_federating_is_shown_as_such(tmp_path: Path) -> None:
    page = _report(tmp_path, _results())

    assert 'class="down">\N{MINUS SIGN}0.100' in page
    assert 'class="up">+0.100' in page


def test_a_page_without_local_only_pictures_or_unseen_sites_is_made_too(tmp_path: Path) -> None:
    results = _results().model_copy(update={"unseen": {}, "sites": {"brain": SiteResult(dice=0.5)}})
    (tmp_path / "results.json").write_text(results.model_dump_json())

    write_report(tmp_path / "results.json", tmp_path / "report.html")

    page = (tmp_path / "report.html").read_text()
    assert "Sites that took no part" not in page
    assert "each site alone" not in page


def test_what_the_coordinator_prints_makes_a_page_too(tmp_path: Path) -> None:
    ledger = Ledger(federation="f", finished=False, exchanges=_results().exchanges)
    (tmp_path / "ledger.json").write_text(ledger.model_dump_json())

    write_report(tmp_path / "ledger.json", tmp_path / "report.html")

    page = (tmp_path / "report.html").read_text()
    assert "brain" in page
    assert page.count("<svg") == 4


def test_names_are_escaped(tmp_path: Path) -> None:
    """Planted bug: a template without autoescape."""
    evil = _results().model_copy(update={"software": "<script>alert(1)</script>"})

    assert "<script" not in _report(tmp_path, evil)


def test_missing_or_foreign_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"results\.json: no such file"):
        read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"sites": {}}')

    with pytest.raises(ConfigError, match=r"results\.json: federation: Field required"):
        read_results(tmp_path / "results.json")


def test_a_picture_of_no_case_is_left_out_and_damaged_figures_are_named(tmp_path: Path) -> None:
    """Planted bugs: any PNG's name taken for a number; what pydantic says printed over several lines."""
    _pictures(tmp_path)
    for name in ("note.png", "77.png"):
        (tmp_path / "evaluation" / SITES[0] / name).write_bytes(b"")

    assert _report(tmp_path, _results()).count("data:image/png;base64,") == 3

    (tmp_path / "evaluation" / f"{SITES[0]}.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"brain.json: \w+ is missing$"):
        write_report(tmp_path / "results.json", tmp_path / "report.html")


def test_a_volume_is_shown_where_most_of_the_reference_lies(tmp_path: Path) -> None:
    """Planted bug: the middle slice, which is all dark here."""
    image, reference = np.zeros((1, 16, 16, 8)), np.zeros((16, 16, 8), bool)
    reference[4:12, 4:12, 5] = reference[7, 7, 4] = True
    image[0, :, 8:, 5] = 1.0

    write_picture(tmp_path / "p.png", image, [reference, np.zeros_like(reference)])

    pixels = np.array(Image.open(tmp_path / "p.png"))  # 18 by 18 for each of the 16 by 16
    assert pixels.shape == (288, 288, 3)
    assert (pixels[4 * 18, 8 * 18].tolist(), pixels[0, -1].tolist()) == (list(REFERENCE), [255] * 3)


def _report(folder: Path, results: Results) -> str:
    (folder / "results.json").write_text(results.model_dump_json())
    _pictures(folder)
    write_report(folder / "results.json", folder / "report.html")
    return (folder / "report.html").read_text()


def _pictures(folder: Path) -> None:
    axis = np.linspace(-1, 1, 64)
    for name in SITES:
        image = np.random.default_rng(len(name)).normal(size=(1, 64, 64)) * 0.1 + np.exp(-(axis**2) * 3)
        reference = (axis[:, None] - 0.2) ** 2 + axis**2 < 0.1
        prediction = (axis[:, None] - 0.1) ** 2 + axis**2 < 0.09
        write_picture(folder / "evaluation" / name / "00.png", image, [reference, prediction])
        figures = EvaluationFile(
            site=name,
            split="validation",
            path="personal",
            unit="voxel",
            tolerance=2.0,
            grid="file",
            mean=Figures(dice=0.8, iou=0.7, hd95=3.0, nsd=0.9),
            cases=(CaseFigures(name=f"{name}-1", dice=0.8, iou=0.7, hd95=3.0, nsd=0.9),),
        )
        (folder / "evaluation" / f"{name}.json").write_text(figures.model_dump_json())


def _results() -> Results:
    calibration = {
        "dice_test": 0.8,
        "dice_test_before": 0.75,
        "dice_test_shared": 0.6,
        "iou_test": 0.7,
        "nsd_test": 0.9,
    }
    sites = {
        name: SiteResult(dice=0.8, dice_local=local, metrics={**calibration, "hd95_test": 3.21})
        for name, local in zip(SITES, (0.7, 0.9, 0.75), strict=True)
    }
    return Results(
        federation="demo",
        software="fedoap 0.1.0",
        rounds=8,
        seconds=251.3,
        sites=sites,
        unseen={"lung": UnseenResult(dice=0.55, metrics={"iou": 0.4, "hd95": 7.0})},
        exchanges=tuple(_exchange(kind, number) for number in range(1, 9) for kind in ("bank", "train")),
        plan=FederationConfig(federation="demo", sites=SITES).plan,
    )


def _exchange(kind: str, number: int) -> Exchange:
    metrics = {
        name: {
            "loss": math.exp(-number / 4) * (1 + 0.1 * i),
            "dice_validation": 0.8 - math.exp(-number / 3) * (0.6 + 0.1 * i),
        }
        for i, name in enumerate(SITES)
    }
    shares = {
        name: Share(
            cases=40, bytes=400_000 if kind == "train" else 60_000, metrics=metrics[name] if kind == "train" else {}
        )
        for name in SITES
    }
    values = {
        "kind": kind,
        "round": number,
        "attempt": 1,
        "outcome": "done",
        "seconds": 4.0 + number % 3,
        "sites": shares,
    }
    return Exchange.model_validate(values)
