"""A study's folder: where everything is, which study it belongs to, and a lock for one process at a time.

data/       the datalists of the runs, and a partition's images
runs/       a folder for each run that is done
work/       runs under way; removed when the study is continued
logs/       the output of the runs' processes
cases.csv rounds.csv runs.csv tuning.csv
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedoap.errors import ConfigError
from fedoap.study.grid import RUN_FILE, RunFile
from fedoap.study.result import RunResult, read_result

WORK = "work"
MARKER = ".fedoap-study"
"""Marks the folder as a study's and holds the study's name; the process that works there locks it."""


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """The folder that `--out` names."""

    out: Path

    @property
    def data(self) -> Path:
        """Datalists, and a partition's images."""
        return self.out / "data"

    @property
    def cache(self) -> Path:
        """Prepared cases, the same for all runs."""
        return self.out / "data" / "cache"

    @property
    def logs(self) -> Path:
        """What the runs' processes printed."""
        return self.out / "logs"

    def run(self, run: RunFile) -> Path:
        """Return where a run lies once it is done."""
        return self.out / "runs" / run.name

    def result(self, run: RunFile) -> RunResult | None:
        """Return the figures of a run, None if it is not done yet.

        Raises:
            ConfigError: they are damaged.
        """
        return read_result(self.run(run), run.digest)

    def begin(self, run: RunFile, token: str) -> Path:
        """Return a new folder for a run to work in; every attempt needs another token."""
        folder = self.out / WORK / f"{run.name}.{token}"
        folder.mkdir(parents=True)
        (folder / RUN_FILE).write_text(run.to_json() + "\n", encoding="utf-8")
        return folder

    def keep(self, run: RunFile, work: Path) -> None:
        """Put a run that is done where it belongs; an outdated one there is deleted."""
        place = self.run(run)
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        work.replace(place)


@contextmanager
def open_folder(out: Path, name: str) -> Iterator[StudyFolder]:
    """Lock the folder for this process; runs that were under way when an earlier one ended are removed.

    Raises:
        ConfigError: the folder is another study's, holds something else, or is at work.
    """
    marker = out / MARKER
    if out.exists() and not marker.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty and not the folder of a study; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with marker.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out} is at work: another `fedoap study` runs there") from None
        file.seek(0)
        owner = file.read().strip()
        if owner not in ("", name):
            raise ConfigError(f"{out} is the folder of study {owner}, not of {name}; give another --out")
        if not owner:
            file.write(name + "\n")
            file.flush()
        shutil.rmtree(out / WORK, ignore_errors=True)
        yield StudyFolder(out.absolute())
