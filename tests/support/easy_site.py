"""A site whose tumours are bright discs on dark noise, and a plan that learns them in seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fedoap.config import (
    BankConfig,
    CalibrationConfig,
    DataConfig,
    NetworkConfig,
    Plan,
    SiteData,
    StrategyConfig,
    TrainingConfig,
)
from fedoap.segmentation.descent import Progress, Workplace

SIZE = 16
COUNTS = {"training": 6, "validation": 2, "test": 2}


def write_easy_site(folder: Path, seed: int = 0) -> SiteData:
    """Return the data of a site with `COUNTS` cases, each of a patient of its own."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lists = {
        split: [_write_case(folder, f"{split}{index}", rng) for index in range(count)]
        for split, count in COUNTS.items()
    }
    (folder / "datalist.json").write_text(json.dumps(lists))
    return SiteData(datalist=folder / "datalist.json", root=folder, modality="photo", window=(0, 255))


def easy_plan(
    *,
    rounds: int = 2,
    steps: int = 12,
    network: NetworkConfig | None = None,
    training: TrainingConfig | None = None,
    calibration: CalibrationConfig | None = None,
    strategy: StrategyConfig | None = None,
) -> Plan:
    """Return a plan for a network of two levels with a bank."""
    return Plan(
        federation="easy",
        seed=3,
        rounds=rounds,
        network=network or NetworkConfig(width=4, depth=2, heads=2),
        bank=BankConfig(slots=4, min_patients=1),
        data=DataConfig(size=(SIZE, SIZE), augment=False),
        training=training or TrainingConfig(steps_per_round=steps, batch_size=4, learning_rate=5e-3),
        calibration=calibration or CalibrationConfig(steps=4, evaluations=3),
        strategy=strategy or StrategyConfig(),
    )


def easy_place(
    folder: Path, plan: Plan, report: Callable[[Progress], None] = lambda _: None, site: str = "a"
) -> Workplace:
    """Return the workplace of the site whose data lie in the folder; they are written where they do not."""
    data = SiteData(datalist=folder / "datalist.json", root=folder, modality="photo", window=(0, 255))
    if not data.datalist.exists():
        write_easy_site(folder)
    return Workplace.open(site, plan, data, cache=folder / "cache", device=torch.device("cpu"), report=report)


def _write_case(folder: Path, name: str, rng: np.random.Generator) -> dict[str, str]:
    y, x = np.mgrid[:SIZE, :SIZE]
    centre, radius = rng.uniform(5, SIZE - 5, 2), rng.uniform(2.5, 4)
    disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    pixels = np.clip(60 + 120 * disc + rng.normal(0, 15, disc.shape), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
    Image.fromarray((255 * disc).astype(np.uint8)).save(folder / f"{name}-mask.png")
    return {"image": f"{name}.png", "label": f"{name}-mask.png", "patient": name}
