"""Pictures of a site's worst, median and best case, for the page; they stay in the run's folder."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedoap.config import SiteData
from fedoap.report.pictures import spread, write_picture
from fedoap.report.results import CaseFigures, EvaluationFile, Figures
from fedoap.segmentation.data import load_case
from fedoap.segmentation.datalist import load_datalist
from fedoap.segmentation.evaluation import TOLERANCE, probabilities
from fedoap.segmentation.modelfolder import Predictor
from fedoap.study.models import CaseMeasures

PICTURES = 3


def write_gallery(
    folder: Path, site: str, data: SiteData, predict: Predictor, measures: Sequence[CaseMeasures], *, cache: Path
) -> None:
    """Write SITE.json and SITE/NNNN.png to a folder as `fedoap evaluate` does, NNNN a case's index in the list.

    Raises:
        DataError: a case is wrong.
    """
    listed = load_datalist(data, "test")
    chosen = spread([one.scores.dice for one in measures], PICTURES)
    shown = [load_case(listed[index], data, predict.plan, cache) for index in chosen]
    for index, case, probability in zip(chosen, shown, probabilities(predict, shown), strict=True):
        assert case.label is not None, "a case without a mask was not measured"
        masks = [(case.label[0] > 0).numpy(), (probability >= 0.5).numpy()]
        write_picture(folder / site / f"{index:04d}.png", case.image.numpy(), masks)
    cases = tuple(CaseFigures(name=one.name, patient=one.patient, **asdict(one.scores)) for one in measures)
    file = EvaluationFile(
        site=site,
        split="test",
        path="personal",
        unit=measures[0].unit,
        tolerance=TOLERANCE,
        grid="file",
        mean=_mean(cases),
        cases=cases,
    )
    (folder / f"{site}.json").write_text(file.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _mean(cases: Sequence[Figures]) -> Figures:
    return Figures(
        **{name: math.fsum(getattr(case, name) for case in cases) / len(cases) for name in Figures.model_fields}
    )
