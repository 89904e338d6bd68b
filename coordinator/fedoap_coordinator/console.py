"""What the operator sees: a live table on a terminal, plain lines anywhere else.

Both say who is waited for, since when and until when.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol, cast, get_args

from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedoap.manifests import TaskKind
from fedoap.protocol.course import Step, place
from fedoap.protocol.events import Note
from fedoap.protocol.status import SiteStatus, Status

SENTENCES: Final[Mapping[str, str]] = {
    "ready": "ready {endpoint}",
    "metrics": "metrics at http://{address}/metrics",
    "task_opened": "{work} begins, attempt {attempt}",
    "task_closed": "{work}: {outcome} after {seconds:.1f} s, {counted} updates",
    "site_joined": "{site} is here ({software})",
    "site_progress": "{site}: {work}{part}, step {step}/{steps}, loss {loss:.4f}",
    "site_committed": "{site}: result of {work} is safe, {bytes} bytes in {seconds:.1f} s",
    "site_failed": "{site} failed: {reason}",
    "site_silent": "{site} has gone silent",
    "rotated": "{site} has new keys, the signing key is {key}",
    "refused": "{site} was refused ({code}): {reason}",
    "port_full": "all {limit} descriptors are in use: no new connections until some end",
    "finished": "finished",
    "stopped": "stopped: {reason}",
    "ended": "ended in good order",
    "upload_resumed": "{site} goes on with its upload at byte {at} of {bytes}",
}
PLAIN_PROGRESS_SECONDS: Final = 15.0
SECONDS_PER_YEAR: Final = 31_536_000
WAITING_FOR: Final = frozenset({"absent", "idle", "working", "waiting", "uploading", "silent"})


@dataclass(frozen=True, slots=True)
class View:
    """What there is to see: the state, the bytes that went to and from each site so far, and a time in seconds."""

    status: Status
    moved: Mapping[str, int]
    now: float


class Console(Protocol):
    """Shows notes as they come and the state now and then."""

    def note(self, note: Note) -> None:
        """Show a note."""

    def show(self, view: View) -> None:
        """Show the state."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def sentence(note: Note) -> str:
    """Return a note as a line of text."""
    pattern = SENTENCES.get(note.event)
    try:
        if pattern:
            who = {"site": note.fields.get("site") or "somebody"}  # whose key nobody knows has no name
            return pattern.format_map({**note.fields, **who, **_work(note)}) + _dice(note)
    except (KeyError, ValueError):
        pass
    return " ".join([note.event, *(f"{name}={value}" for name, value in note.fields.items())])


def _work(note: Note) -> dict[str, str]:
    """Return the words for a note's exchange and, where it is not the whole of it, for the stage; else nothing."""
    kind, number, stage = (note.fields.get(name) for name in ("kind", "round", "stage"))
    if kind not in get_args(TaskKind) or not isinstance(number, int):
        return {}
    part = "" if stage in (kind, None) else f" ({stage})"
    return {"work": str(Step(cast(TaskKind, kind), number)), "part": part}


def _dice(note: Note) -> str:
    """Return what progress says of Dice: nothing before the first look at the validation cases."""
    dice = note.fields.get("dice")
    return f", Dice {dice:.3f}" if isinstance(dice, float | int) and dice >= 0 else ""


def waited_for(status: Status, wall: datetime) -> str:
    """Return who is waited for, since when and until when."""
    if status.state != "open":
        return status.reason
    names = [_waiting(site) for site in status.sites if site.state in WAITING_FOR]
    since = (wall - timedelta(seconds=status.seconds)).strftime("%H:%M:%S")
    until = (wall + timedelta(seconds=status.deadline_seconds)).strftime("%H:%M:%S")
    return f"waiting for {', '.join(names) or 'nobody'} since {since}, until {until} at most"


def _waiting(site: SiteStatus) -> str:
    if site.state == "absent":
        return f"{site.name} (not connected)"
    return f"{site.name} (silent for {site.heard_seconds:.0f} s)" if site.state == "silent" else site.name


class PlainConsole:
    """Lines of text, progress only now and then."""

    def __init__(self, terminal: Terminal, clock: Callable[[], float]) -> None:
        self._terminal, self._clock = terminal, clock
        self._spoken: dict[str, float] = {}
        self._waited = ""

    def note(self, note: Note) -> None:
        """Print a note."""
        now = self._clock()
        if note.event == "site_progress":
            site = str(note.fields.get("site", ""))
            if now - self._spoken.get(site, -PLAIN_PROGRESS_SECONDS) < PLAIN_PROGRESS_SECONDS:
                return
            self._spoken[site] = now
        self._print(sentence(note))

    def show(self, view: View) -> None:
        """Print who is waited for when that changes."""
        status = view.status
        who = ", ".join(site.name for site in status.sites if site.state in WAITING_FOR)
        # a reason counts seconds: a line for each of them, all night, would drown the journal
        why = who if status.state == "open" else re.sub(r"\b\d+ s\b", "", status.reason)
        key = f"{status.state} {status.round} {status.attempt} {why}"
        if key != self._waited:
            self._waited = key
            self._print(waited_for(status, datetime.now().astimezone()))

    def close(self) -> None:
        """Nothing is left to do."""

    def _print(self, text: str) -> None:
        if text:
            stamp = datetime.now().astimezone().strftime("%H:%M:%S")
            self._terminal.print(f"{stamp} {text}", markup=False, highlight=False, soft_wrap=True)


@dataclass(slots=True)
class _Pace:
    """Where a site's present stage was first seen, and its bytes a second."""

    stage: str
    step: int
    since: float
    moved: int = 0
    at: float = 0.0
    megabytes: float = 0.0

    def seconds_left(self, site: SiteStatus, now: float) -> float | None:
        """Return the time left at this pace, or nothing while there is none or it is beyond a year."""
        if site.size and site.received < site.size:
            left = (site.size - site.received) / 1e6 / self.megabytes if self.megabytes > 0 else math.inf
        else:
            done = site.step - self.step
            left = (now - self.since) / done * max(0, site.steps - site.step) if done > 0 and site.steps else math.inf
        return left if left < SECONDS_PER_YEAR else None


class TableConsole:
    """A table that stays in place, notes scrolling above it."""

    def __init__(self, terminal: Terminal) -> None:
        self._live = Live(console=terminal, auto_refresh=False, transient=True)
        self._paces: dict[str, _Pace] = {}
        self._live.start()

    def note(self, note: Note) -> None:
        """Print a note above the table; progress is in the table."""
        if note.event != "site_progress":
            stamp = datetime.now().astimezone().strftime("%H:%M:%S")
            self._live.console.print(f"{stamp} {sentence(note)}", markup=False, highlight=False)

    def show(self, view: View) -> None:
        """Draw the table anew."""
        status = view.status
        head = f"{place(status.kind, status.round, status.rounds)}  {status.kind or ''}  {status.state}"
        table = Table(title=head, title_justify="left", expand=False)
        for name in ("site", "state", "stage", "step", "loss", "Dice", "MB/s", "left", "heard"):
            table.add_column(name, justify="left" if name in ("site", "state", "stage") else "right")
        for site in status.sites:
            cells = self._row(site, view.moved.get(site.name, 0), view.now)
            table.add_row(*map(Text, cells))  # as text: a stage is the site's word, and must not be markup
        self._live.update(Group(table, Text(waited_for(status, datetime.now().astimezone()))), refresh=True)

    def close(self) -> None:
        """Leave the last table on the screen."""
        self._live.stop()

    def _row(self, site: SiteStatus, moved: int, now: float) -> list[str]:
        pace = self._pace(site, moved, now)
        left = pace.seconds_left(site, now)
        return [
            site.name,
            site.state,
            site.stage,
            f"{site.step}/{site.steps}" if site.steps else "",
            f"{site.loss:.4f}" if site.steps else "",
            f"{site.dice:.3f}" if site.dice >= 0 else "",
            f"{pace.megabytes:.1f}" if pace.megabytes >= 0.05 else "",
            str(timedelta(seconds=round(left))) if left is not None else "",
            "never" if site.heard_seconds is None else f"{site.heard_seconds:.0f} s ago",
        ]

    def _pace(self, site: SiteStatus, moved: int, now: float) -> _Pace:
        pace = self._paces.get(site.name)
        if pace is None or pace.stage != site.stage or pace.step > site.step:
            old = pace or _Pace("", 0, now, moved, now)
            pace = self._paces[site.name] = _Pace(site.stage, site.step, now, old.moved, old.at, old.megabytes)
        if now - pace.at >= 1.0:
            pace.megabytes = (moved - pace.moved) / 1e6 / (now - pace.at)
            pace.moved, pace.at = moved, now
        return pace


def open_console(terminal: Terminal, clock: Callable[[], float]) -> Console:
    """Return the console that suits where the output goes."""
    return TableConsole(terminal) if terminal.is_terminal else PlainConsole(terminal, clock)
