"""The training process of a node: `python -m fedoap_node.worker JOB.json` carries out one `Job`.

With `-` in the path's place it imports all that it may need, then waits for paths as lines of standard
input, says `JobDone` after each job, and ends when its input does. Progress goes to standard output, a line
each, and everything else to standard error. The work itself is `fedoap_node.workshop`.
PyTorch takes over a second to import: that happens after the job has been read, or before there is one.
"""

import importlib
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pydantic import ValidationError

from fedoap.errors import ConfigError, FedoapError
from fedoap_node.job import ERROR, Job, JobDone, JobProgress
from fedoap_node.standby import ON_STANDARD_INPUT
from fedoap_node.workshop import Workshop

if TYPE_CHECKING:
    from fedoap.segmentation.descent import Progress

LINES_PER_SECOND = 3.0
IMPORTS = (
    "torch",
    "safetensors.torch",
    "fedoap.segmentation.banksums",
    "fedoap.segmentation.calibration",
    "fedoap.segmentation.modelfolder",
    "fedoap.segmentation.training",
)
"""What takes seconds; none of it touches a GPU."""


def main(arguments: list[str] | None = None) -> int:
    """Carry out the job whose file is named and return the exit code; 2 for a fault that someone can set right."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        sys.stderr.write("usage: python -m fedoap_node.worker JOB.json | -\n")
        return 2
    with _line_stream() as lines:
        return _serve(lines) if given[0] == ON_STANDARD_INPUT else _do(Path(given[0]), Workshop(), lines)


def _serve(lines: IO[str]) -> int:
    for name in IMPORTS:
        importlib.import_module(name)
    workshop = Workshop()
    while line := sys.stdin.readline():
        if code := _do(Path(line.removesuffix("\n")), workshop, lines):
            return code
        lines.write(JobDone(done=True).model_dump_json() + "\n")
        lines.flush()
    return 0


def _do(job: Path, workshop: Workshop, lines: IO[str]) -> int:
    try:
        workshop.carry_out(_read(job), Reporter(lines))
    except FedoapError as error:
        sys.stderr.write(_leave_line(job, str(error)) + "\n")
        return 2
    except Exception as error:
        _leave_line(job, f"{type(error).__name__}: {error}")
        raise
    return 0


class Reporter:
    """Prints progress as JSON lines, a few a second; a line with a Dice is always printed."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines = lines
        self._next = 0.0

    def __call__(self, progress: "Progress") -> None:
        """Print the progress unless one was printed a moment ago."""
        now = time.monotonic()
        if now < self._next and progress.dice < 0:
            return
        self._next = now + 1 / LINES_PER_SECOND
        line = JobProgress(
            stage=progress.stage, step=progress.step, steps=progress.steps, loss=progress.loss, dice=progress.dice
        )
        self._lines.write(line.model_dump_json() + "\n")
        self._lines.flush()


def _read(path: Path) -> Job:
    try:
        return Job.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise ConfigError(f"{path}: {place}: {first['msg']}; it is no job") from None


def _leave_line(job: Path, text: str) -> str:
    """Return the text as one line and leave it beside the job's file, unless another process failed before."""
    line = " ".join(text.split())
    with suppress(OSError), (job.parent / ERROR).open("x", encoding="utf-8") as file:
        file.write(line + "\n")
    return line


def _line_stream() -> IO[str]:
    """Return what was standard output; from now on whatever a library prints goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


if __name__ == "__main__":
    sys.exit(main())
