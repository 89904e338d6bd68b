"""The coordinator's log: a JSON object a line, for people with `grep` and for programs.

Fields are numbers, short words, names of sites; never a key, a path on a site or anything of a patient.
What a site causes is logged within bounds, or a single one that is out of order could fill the disk.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fedoap.protocol.events import Note

LEVELS: Final[Mapping[str, str]] = {
    "refused": "warning",
    "site_failed": "warning",
    "site_silent": "warning",
    "stopped": "error",
    "ended_by_error": "error",
}
REFUSALS_KEPT: Final = 5
"""Like refusals of one site logged in a row; of what follows only every hundredth is."""
LINES_A_MINUTE: Final = 600
"""Lines about one site within a minute: a site that trains causes three a second. What is beyond is not logged."""


class Journal:
    """An open log file; `clock` gives Unix time in seconds."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._clock = clock
        self._refusals: dict[tuple[str, str], int] = {}
        self._minute, self._lines = 0, Counter[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, note: Note) -> bool:
        """Write a note unless it repeats too often; return whether it was written."""
        fields = dict(note.fields)
        if note.event == "refused":
            key = (str(fields.get("site", "")), str(fields.get("code", "")))
            count = self._refusals[key] = self._refusals.get(key, 0) + 1
            if count > REFUSALS_KEPT and count % 100:
                return False
            fields["count"] = count
        if self._is_too_much(str(fields.get("site", ""))):
            return False
        time = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": LEVELS.get(note.event, "info"), "event": note.event} | fields
        self._file.write(json.dumps(line) + "\n")
        return True

    def _is_too_much(self, site: str) -> bool:
        minute = int(self._clock() // 60)
        if minute != self._minute:
            self._minute, self._lines = minute, Counter()
        self._lines[site] += bool(site)
        return self._lines[site] > LINES_A_MINUTE
