"""Progress of a study: bars on a terminal, elsewhere a line for each run, and the time left."""

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class StudyProgress:
    """One row for the whole study, one for each run under way; use it as a context.

    The time left is the mean duration of the runs that are done, times the remaining ones over those at a time.
    """

    def __init__(self, console: Console, total: int, jobs: int, seconds: Sequence[float]) -> None:
        self._jobs, self._seconds, self._left = jobs, list(seconds), total - len(seconds)
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._total = total
        self._whole = self._progress.add_task("study", total=total, completed=len(seconds), note=self.left())
        self._runs: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def left(self) -> str:
        """Return how much longer the study will take, as far as that is known."""
        if not self._left:
            return ""
        if not self._seconds:
            return f"{self._left} to go"
        mean = math.fsum(self._seconds) / len(self._seconds)
        return f"about {_duration(mean * math.ceil(self._left / self._jobs))} left"

    def started(self, name: str) -> None:
        """Show a run that is under way."""
        self._runs[name] = self._progress.add_task(f"  {name}", total=1, note="")

    def at(self, name: str, step: int, steps: int, note: str) -> None:
        """Show how far a run is."""
        self._progress.update(self._runs[name], completed=step, total=max(steps, 1), note=note)

    def done(self, name: str, seconds: float, dice: float | None) -> None:
        """Show that a run has its figures."""
        self._seconds.append(seconds)
        self._end(name)
        known = "" if dice is None else f", test Dice {dice:.3f}"
        self.say(
            f"{self._total - self._left}/{self._total} {name}: {_duration(seconds)}{known}; {self.left() or 'all'}"
        )

    def failed(self, name: str, reason: str) -> None:
        """Show that a run has none, and why."""
        self._end(name)
        self._progress.console.print(f"{name} failed: {reason}", markup=False, style="bold red", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _end(self, name: str) -> None:
        self._left -= 1
        if name in self._runs:
            self._progress.remove_task(self._runs.pop(name))
        self._progress.update(self._whole, advance=1, note=self.left())


def _duration(seconds: float) -> str:
    """Return a time in its two largest units.

    >>> _duration(42.4), _duration(125), _duration(7260)
    ('42 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
