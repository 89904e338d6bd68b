"""Progress of a simulation: bars on a terminal, elsewhere a line for each event."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedoap.config import Plan
from fedoap.protocol.course import course


class Display:
    """The console's picture: one row for the whole, one for each site; use it as a context."""

    def __init__(self, console: Console, plan: Plan, sites: Sequence[str]) -> None:
        self._plan = plan
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._whole = self._progress.add_task("federation", total=len(course(plan)), note="")
        self._sites = {name: self._add(name) for name in sites}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, event: Mapping[str, object]) -> None:
        """Take in one line of the coordinator's log."""
        site = str(event.get("site", ""))
        match event.get("event"):
            case "site_progress" if site in self._sites:
                note = f"{event['kind']} round {event['round']}  loss {_number(event['loss'])}{_dice(event['dice'])}"
                self._update(site, _count(event["step"]), _count(event["steps"]), note)
            case "site_committed" if site in self._sites:
                self._update(site, 1, 1, f"{event['kind']} round {event['round']}  sent {_megabytes(event['bytes'])}")
            case "task_opened":
                self._progress.update(self._whole, note=f"{event['kind']} round {event['round']}")
            case "task_closed":
                self._close(event)
            case "site_joined" | "site_silent" | "site_failed" | "merge_failed" | "refused" | "stopped" as name:
                rest = "  ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "level", "event"))
                self.say(f"{name.replace('_', ' ')}: {rest}")
            case _:
                return

    def job(self, name: str, step: int, steps: int, note: str) -> None:
        """Show how far a site's work outside the federation is."""
        if name not in self._sites:
            self._sites[name] = self._add(name)
        self._update(name, step, steps, note)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line that needs attention."""
        self._progress.console.print(text, markup=False, style="bold red", soft_wrap=True)

    def _close(self, event: Mapping[str, object]) -> None:
        if event["outcome"] == "done":
            self._progress.advance(self._whole)
        seconds = _number(event["seconds"])
        number, last = event["round"], self._plan.rounds
        when = f"round {number}/{last}" if _count(number) <= last else "after the last round"
        self.say(f"{event['kind']} {when}: {event['outcome']} in {seconds} s")

    def _add(self, name: str) -> TaskID:
        return self._progress.add_task(f"  {name}", total=1, note="waiting")

    def _update(self, name: str, step: int, steps: int, note: str) -> None:
        self._progress.update(self._sites[name], completed=step, total=max(steps, 1), note=note)


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "?"


def _dice(value: object) -> str:
    return f"  Dice {value:.3f}" if isinstance(value, int | float) and value >= 0 else ""


def _megabytes(value: object) -> str:
    return f"{value / 1e6:.1f} MB" if isinstance(value, int | float) else "?"
