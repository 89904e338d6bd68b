"""A study's CSV files, read into checked rows; the page of a study is made from nothing else."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedoap.errors import ConfigError

RowT = TypeVar("RowT")


def _known(value: object) -> object:
    """Return None for a measure that is undefined: empty, not a number or infinite."""
    if not isinstance(value, str):
        return value
    try:
        return value if value and math.isfinite(float(value)) else None
    except ValueError:
        return value  # pydantic says what is wrong with it


Measure = Annotated[float | None, BeforeValidator(_known)]
Count = Annotated[int | None, BeforeValidator(_known)]


class Run(NamedTuple):
    """What tells the runs of one variant apart."""

    fold: int
    seed: int


@dataclass(frozen=True, slots=True)
class CaseRow:
    """One case at one stage of one run."""

    study: str
    variant: str
    fold: int
    seed: int
    site: str
    organ: str
    split: Literal["test", "unseen"]
    stage: str
    case: int
    patient: int
    training_cases: Count
    dice: Measure
    iou: Measure
    hd95_mm: Measure
    nsd: Measure

    @property
    def run(self) -> Run:
        """Which run of its variant it belongs to."""
        return Run(self.fold, self.seed)


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One site in one round of one run."""

    variant: str
    fold: int
    seed: int
    site: str
    stage: str
    round: Count
    step: Count
    loss: Measure
    dice_validation: Measure
    bytes_sent: Count
    bytes_received: Count
    seconds: Measure

    @property
    def run(self) -> Run:
        """Which run of its variant it belongs to."""
        return Run(self.fold, self.seed)


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run."""

    variant: str
    fold: int
    seed: int
    steps: Count
    seconds: Measure
    parameters: Count
    torch: str
    fedoap: str


@dataclass(frozen=True, slots=True)
class TuningRow:
    """One site's validation score in one trial of the search for a variant's settings."""

    variant: str
    trial: int
    settings: str
    fold: int
    seed: int
    site: str
    dice_validation: Measure
    chosen: bool


@dataclass(frozen=True, slots=True)
class Tables:
    """All figures of a study's folder."""

    study: str
    cases: Sequence[CaseRow]
    rounds: Sequence[RoundRow]
    runs: Sequence[RunRow]
    tuning: Sequence[TuningRow]


def read_tables(folder: Path) -> Tables:
    """Return the rows of a study's folder; only `cases.csv` must be there.

    Raises:
        ConfigError: there are no cases, or a file has another form.
    """
    file = folder / "cases.csv"
    cases = _rows(file, CaseRow)
    if not cases:
        raise ConfigError(f"{file}: holds no case; run the study until a first run is done")
    studies = sorted({row.study for row in cases})
    if len(studies) > 1:
        raise ConfigError(f"{file}: holds {len(studies)} studies ({', '.join(studies)}), expected one a folder")
    _check_once(file, cases)
    return Tables(
        study=studies[0],
        cases=cases,
        rounds=_rows(folder / "rounds.csv", RoundRow),
        runs=_rows(folder / "runs.csv", RunRow),
        tuning=_rows(folder / "tuning.csv", TuningRow),
    )


def _check_once(path: Path, cases: Sequence[CaseRow]) -> None:
    seen = set()
    for line, row in enumerate(cases, 2):
        key = (row.variant, row.run, row.site, row.split, row.stage, row.training_cases, row.case)
        if key in seen:
            raise ConfigError(
                f"{path}: line {line}: {row.variant} has case {row.case} of {row.site} twice at stage {row.stage} of "
                f"fold {row.fold}, seed {row.seed}; expected once"
            )
        seen.add(key)


def _rows(path: Path, kind: type[RowT]) -> list[RowT]:
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return TypeAdapter(list[kind]).validate_python(list(csv.DictReader(file)))  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        row, column = first["loc"][0], ".".join(map(str, first["loc"][1:2]))
        value = "" if first["type"] == "missing" else f" is {str(first['input'])!r}"
        line = int(row) + 2  # the header is the first
        raise ConfigError(f"{path}: line {line}: {column}{value}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a CSV file: {error}") from None
