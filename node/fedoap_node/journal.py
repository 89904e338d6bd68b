"""What the daemon tells: a line on the console for people, a JSON line in `log.jsonl` for machines."""

import datetime as dt
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TextIO

from fedoap.tensors import write_all

Level = Literal["info", "warning", "error"]
Field = str | int | float
MAX_LOG_BYTES = 32 << 20
"""A log that is larger is moved aside: with the one moved before, twice as much is on the disk at most."""


class Journal:
    """Appends to the log and echoes to the console; a log that has grown large is moved aside meanwhile."""

    def __init__(self, path: Path, site: str, console: TextIO = sys.stderr) -> None:
        self._path, self._site, self._console = path, site, console
        self._file = _opened(path)

    def note(self, event: str, text: str, *, level: Level = "info", **fields: Field) -> None:
        """Log an event with its fields; the console shows the text alone."""
        self._write(event, text, level, fields)

    def record(self, event: str, level: Level, fields: Mapping[str, Field]) -> None:
        """Log an event with its fields; the console shows both."""
        shown = " ".join([event.replace("_", " "), *(f"{key}={value}" for key, value in fields.items())])
        self._write(event, shown, level, fields)

    def close(self) -> None:
        """Close the log."""
        self._file.close()

    def _write(self, event: str, text: str, level: Level, fields: Mapping[str, Field]) -> None:
        now = dt.datetime.now(dt.UTC)
        row = {"time": now.isoformat(timespec="milliseconds"), "level": level, "event": event, **fields}
        write_all(self._file, json.dumps(row).encode() + b"\n")
        if self._file.tell() > MAX_LOG_BYTES:
            self._file.close()
            self._file = _opened(self._path)
        self._console.write(f"{now.astimezone():%H:%M:%S} {self._site}: {one_line(text)}\n")
        self._console.flush()


def rotate(path: Path) -> None:
    """Move a log that has grown large aside, over the one moved before."""
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))


def one_line(text: str) -> str:
    r"""Return a text, perhaps the coordinator's, as one line that a terminal only shows.

    >>> one_line("all is well\n12:00:00 a: \x1b[2Jfinished")
    'all is well 12:00:00 a: [2Jfinished'
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _opened(path: Path) -> io.FileIO:
    """Return the log to append to, unbuffered: a full disk shows at the line that it refuses, not at the end."""
    rotate(path)
    return io.FileIO(path, "a")
