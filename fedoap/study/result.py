"""`result.json`: the figures of one run, by number; nothing in it names a patient, an image or a path."""

import os
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import ValidationError

from fedoap.errors import ConfigError
from fedoap.fields import Frozen

RESULT_FILE = "result.json"
DONE = "done"
"""Written last, with the run's digest."""

TestStage: TypeAlias = Literal["final", "before", "shared", "zero_shot", "tuned"]
WorkStage: TypeAlias = Literal["train", "calibrate", "local", "pooled"]


class CaseRow(Frozen):
    """One test case and how well a model marked it."""

    site: str
    split: Literal["test", "unseen"]
    stage: TestStage
    case: int
    patient: int
    dice: float
    iou: float
    hd95_mm: float | None = None
    """None where it is not defined."""
    nsd: float | None = None


class RoundRow(Frozen):
    """One site's part in one round."""

    site: str
    stage: WorkStage
    round: int
    step: int
    """Gradient steps of the site's course after it."""
    loss: float | None
    dice_validation: float | None
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float


class RunResult(Frozen):
    """The whole of `result.json`."""

    training_cases: dict[str, int]
    """Of each site, of unseen ones too."""
    cases: tuple[CaseRow, ...]
    rounds: tuple[RoundRow, ...]
    steps: int
    """Gradient steps of each site."""
    seconds: float
    parameters: int
    """Of one site's network."""
    torch: str
    fedoap: str

    def dice_validation(self) -> dict[str, float]:
        """Return each site's last validation Dice."""
        ordered = sorted(self.rounds, key=lambda row: row.step)
        return {row.site: row.dice_validation for row in ordered if row.dice_validation is not None}

    def dice_test(self) -> float | None:
        """Return the mean over sites of the mean over a site's cases, of the final state."""
        sites: dict[str, list[float]] = {}
        for row in self.cases:
            if row.stage == "final" and row.split == "test":
                sites.setdefault(row.site, []).append(row.dice)
        return sum(sum(each) / len(each) for each in sites.values()) / len(sites) if sites else None


def read_result(folder: Path, digest: str) -> RunResult | None:
    """Return the figures of a run's folder; None if it is not done, or has another digest.

    Raises:
        ConfigError: the folder says that it is done, but its figures have another form.
    """
    try:
        if (folder / DONE).read_text(encoding="utf-8").strip() != digest:
            return None
        return RunResult.model_validate_json((folder / RESULT_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{folder / RESULT_FILE}: is damaged: {text}; delete {folder} to run it again") from None


def write_result(folder: Path, result: RunResult, digest: str) -> None:
    """Write the figures of a run to its folder, `done` last."""
    for name, text in ((RESULT_FILE, result.model_dump_json(indent=1)), (DONE, digest)):
        part = folder / f"{name}.part"
        with part.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave `done` without the figures
        part.replace(folder / name)
