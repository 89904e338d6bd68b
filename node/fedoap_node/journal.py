"""What the daemon tells: a line on the console for people, a JSON line in `log.jsonl` for machines."""

import datetime as dt
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TextIO

Level = Literal["info", "warning", "error"]
Field = str | int | float
MAX_LOG_BYTES = 32 << 20


class Journal:
    """Appends to the log and echoes to the console; each line is written in one piece."""

    def __init__(self, path: Path, site: str, console: TextIO = sys.stderr) -> None:
        self._path, self._site, self._console = path, site, console
        rotate(path)
        self._file = path.open("a", encoding="utf-8")

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
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._console.write(f"{now.astimezone():%H:%M:%S} {self._site}: {text}\n")
        self._console.flush()


def rotate(path: Path) -> None:
    """Move a log that has grown large aside, over the one moved before."""
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
