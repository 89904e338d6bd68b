"""One run of a study, a process of its own: `python -m fedoap.study.run FOLDER CACHE`.

The folder holds `run.json`. Lines of progress go to standard output, everything else to standard error.
The figures are written to `result.json`, and `done` last of all; the models are not kept, pictures of some
cases are. Exit code 2 means that the last line of standard error says what has to be corrected.
"""

# ruff: noqa: PLC0415

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedoap import __version__
from fedoap.config import SiteConfig
from fedoap.errors import FedoapError
from fedoap.segmentation.datalist import load_datalist
from fedoap.simulation.config import SimulationConfig
from fedoap.study.grid import RunFile, read_run
from fedoap.study.result import RoundRow, RunResult, write_result

if TYPE_CHECKING:
    from fedoap.segmentation.descent import Progress

LINES_PER_SECOND = 3.0
MODELS = "models"
PICTURES = "evaluation"


def main(arguments: list[str] | None = None) -> int:
    """Carry out the run of the folder that is named and return the exit code: 2 if the user can mend what failed."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2:
        sys.stderr.write("usage: python -m fedoap.study.run FOLDER CACHE\n")
        return 2
    folder, cache = map(Path, given)
    try:
        run = read_run(folder)
        write_result(folder, carry_out(run, folder, cache), run.digest)
    except FedoapError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 2
    return 0


def carry_out(run: RunFile, folder: Path, cache: Path) -> RunResult:
    """Return a run's figures; its models lie in the folder meanwhile, its pictures stay there.

    Raises:
        FedoapError: the run cannot be done with these settings, images or this disk.
    """
    import torch

    from fedoap.study.courses import Task, course_of, tested
    from fedoap.study.models import parameters

    began, config = time.monotonic(), run.simulation
    if config.threads:
        torch.set_num_threads(config.threads)
    models = folder / MODELS
    task = Task(config, models, folder / PICTURES, cache, Reporter())
    course = course_of(task)
    rounds = course.train()
    # a choice that trials decide must not have seen a test case
    cases = () if run.trial is not None else tuple(tested(task, course))
    shutil.rmtree(models, ignore_errors=True)
    return RunResult(
        training_cases=_training_cases(config),
        cases=cases,
        rounds=tuple(rounds),
        steps=_steps(rounds),
        seconds=time.monotonic() - began,
        parameters=parameters(config.plan),
        torch=torch.__version__,
        fedoap=__version__,
    )


class Reporter:
    """Prints a line a few times a second: which site is at what."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, site: str, number: int, progress: "Progress") -> None:
        """Print the progress unless some was printed a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 1 / LINES_PER_SECOND
        values: Mapping[str, object] = {
            "site": site,
            "round": number,
            "stage": progress.stage,
            "step": progress.step,
            "steps": progress.steps,
        }
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()


def _training_cases(config: SimulationConfig) -> dict[str, int]:
    return {name: _count(site) for name, site in (config.sites | config.unseen).items()}


def _count(site: SiteConfig) -> int:
    assert site.data is not None
    return len(load_datalist(site.data, "training"))


def _steps(rounds: Iterable[RoundRow]) -> int:
    return max(row.step for row in rounds)


if __name__ == "__main__":
    sys.exit(main())
