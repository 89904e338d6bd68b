"""The best, the median and the worst case of each site, if a study's runs left pictures."""

import re
from collections import defaultdict
from pathlib import Path

from fedoap.report.page import Picture, inline
from fedoap.report.pictures import spread
from fedoap.report.results import EvaluationFile

SHOWN = ("worst", "median", "best")


def galleries(runs: Path, variant: str) -> dict[str, list[Picture]]:
    """Return three pictures of each site from a variant's runs with all cases, as `fedoap evaluate` writes them.

    They are evaluation/SITE.json and evaluation/SITE/NN.png of a run's folder, NN the index of the case. Captions
    name no case.
    """
    found: dict[str, list[tuple[float, Path]]] = defaultdict(list)
    for figures in sorted(runs.glob(f"{variant}-f*-s*/evaluation/*.json")):
        if not re.fullmatch(rf"{re.escape(variant)}-f\d+-s\d+", figures.parts[-3]):
            continue
        cases = EvaluationFile.model_validate_json(figures.read_bytes()).cases
        for picture in sorted(figures.with_suffix("").glob("*.png")):
            found[figures.stem].append((cases[int(picture.stem)].dice, picture))
    return {site: _three(pictures) for site, pictures in sorted(found.items())}


def _three(pictures: list[tuple[float, Path]]) -> list[Picture]:
    chosen = [pictures[place] for place in spread([dice for dice, _ in pictures], len(SHOWN))]
    names = SHOWN if len(chosen) == len(SHOWN) else ("worst", "best")[: len(chosen)]
    return [Picture(inline(path), f"{name}: Dice {dice:.3f}") for name, (dice, path) in zip(names, chosen, strict=True)]
