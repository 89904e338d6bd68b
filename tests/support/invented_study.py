"""A study that never ran: its CSV files with effects that are known because they were planted."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HEADS = {
    "cases": "study,variant,fold,seed,site,organ,split,stage,case,patient,training_cases,dice,iou,hd95_mm,nsd",
    "rounds": "study,variant,fold,seed,site,stage,round,step,loss,dice_validation,bytes_sent,bytes_received,seconds",
    "runs": "study,variant,fold,seed,steps,seconds,parameters,torch,fedoap",
    "tuning": "study,variant,trial,settings,fold,seed,site,dice_validation,chosen",
}
Row = list[object]


@dataclass(frozen=True, slots=True)
class Invented:
    """What a study shows: a variant's gain over a patient's own difficulty, at all sites or at one."""

    gains: Mapping[str, float | Mapping[str, float]]
    patients: Mapping[str, int] = field(default_factory=lambda: {"brain": 30, "breast": 30, "kidney": 12})
    folds: int = 5
    seeds: Sequence[int] = (0,)
    images: int = 2
    """Of each patient."""
    noise: float = 0.03
    without: Sequence[tuple[str, int]] = ()
    """Variants and folds that have not run."""
    unseen: str = ""
    sizes: Sequence[int] = ()
    """Training cases that kidney is cut to, beside all."""
    hd95: bool = True
    start: int = 0
    """Seed of all that is drawn."""


def write_study(folder: Path, study: Invented) -> Path:
    """Leave the four tables."""
    folder.mkdir(parents=True, exist_ok=True)
    cases, rounds, runs = [], [], []
    for variant in study.gains:
        for fold in range(max(1, study.folds)):
            for seed in study.seeds:
                if (variant, fold) not in study.without:
                    run = [variant, fold, seed]
                    cases += _run_cases(study, variant, fold, seed)
                    rounds += _run_rounds(study, run)
                    runs.append(["invented", *run, 300, 40.0 + fold, 800_000, "2.13.0", "0.1.0"])
    for name, rows in {"cases": cases, "rounds": rounds, "runs": runs, "tuning": _trials(study)}.items():
        write_table(folder / f"{name}.csv", HEADS[name].split(","), rows)
    return folder


def write_table(path: Path, head: Sequence[str], rows: Sequence[Row]) -> None:
    """Leave one CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def gain(study: Invented, variant: str, site: str) -> float:
    """Return what was planted."""
    planted = study.gains[variant]
    return planted if isinstance(planted, float) else planted.get(site, 0.0)


def _run_cases(study: Invented, variant: str, fold: int, seed: int) -> list[Row]:
    rows = []
    for site, patients in study.patients.items():
        tested = [patient for patient in range(patients) if study.folds < 2 or patient % study.folds == fold]
        training = (patients - len(tested)) * study.images
        amounts = [(training, 0.0)]
        if site == "kidney":
            amounts += [(size, -0.2 * (1 - size / training)) for size in study.sizes if size < training]
        for count, loss in amounts:
            for stage, extra in (("before", -0.05), ("final", 0.0)):
                about = [variant, fold, seed, site, site, "test", stage]
                rows += _cases(study, about, tested, count, gain(study, variant, site) + loss + extra)
    for stage, extra in (("zero_shot", -0.3), ("tuned", -0.1)) if study.unseen else ():
        about = [variant, fold, seed, study.unseen, study.unseen, "unseen", stage]
        rows += _cases(study, about, range(8), 40, gain(study, variant, study.unseen) + extra)
    return rows


def _cases(study: Invented, about: Row, patients: Sequence[int], training: int, shift: float) -> list[Row]:
    variant, fold, seed, site, _, _, stage = map(str, about)
    rows: list[Row] = []
    for patient in patients:
        own = _draw(study.start, site, patient).normal(0.6, 0.08)
        for image in range(study.images):
            draw = _draw(study.start, variant, fold, seed, site, stage, patient, image, training)
            dice = float(np.clip(own + shift + draw.normal(0, study.noise), 0, 1))
            hd95 = "" if not study.hd95 or draw.random() < 0.05 else f"{20 * (1 - dice):.6f}"
            figures = [f"{dice:.6f}", f"{dice / (2 - dice):.6f}", hd95, f"{min(1.0, dice + 0.1):.6f}"]
            rows.append(["invented", *about, patient * study.images + image, patient, training, *figures])
    return rows


def _run_rounds(study: Invented, run: Row) -> list[Row]:
    moved = 0 if run[0] in ("local", "pooled") else 400_000
    dice = {site: 0.6 + gain(study, str(run[0]), site) for site in study.patients}
    return [
        ["invented", *run, site, "train", n, 50 * n, 1 / n, dice[site] - 0.3 / n, moved, moved // 2, 5.5]
        for site in study.patients
        for n in range(1, 7)
    ]


def _trials(study: Invented) -> list[Row]:
    settings = ['{"federation.training.learning_rate": 0.001}', '{"federation.training.learning_rate": 0.002}']
    return [
        ["invented", variant, trial, settings[trial], 0, 0, site, 0.5 + 0.01 * trial, trial]
        for variant in study.gains
        for trial in (0, 1)
        for site in study.patients
    ]


def _draw(*key: object) -> np.random.Generator:
    return np.random.default_rng([ord(letter) for letter in "/".join(map(str, key))])
