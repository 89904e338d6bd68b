"""Power cuts, replayed: what a program did to a folder, and every state that a power cut may leave of it.

A `Recorder` looks on while a program works in a folder, and takes down at each step what the disk has been
told to keep. Bytes are kept from the last fsync or fdatasync of their file on, names from the last fsync of
their folder on. `cuts` gives, for each step, the folders that a power cut before it may leave: unsynced bytes
lost, kept, or torn; unsynced changes of names undone from the last one backwards, or one at a time, or as
chance has it. (The idea is ALICE's: Pillai et al., OSDI 2014.) SQLite is trusted: what it committed is kept.
"""

import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

Change = tuple[tuple[Path, int | None], ...]
"""Names that come to mean an inode, or nothing, at once."""
FOLDER = -1
CHANCES = 4


@dataclass(frozen=True, slots=True)
class Moment:
    """What was certain and what was not, before one step."""

    step: str
    said: tuple[bytes, ...]
    """What the program had acknowledged by then."""
    ledger: bytes
    names: dict[Path, int]
    changes: tuple[Change, ...]
    durable: dict[int, bytes]
    present: dict[int, bytes]


@dataclass
class Recorder:
    """Takes down what happens to the files of a folder; those whose name begins with `ledger`, if any, are SQLite's."""

    root: Path
    ledger: str | None = None
    ignored: frozenset[str] = frozenset()
    """Steps that are to have no effect, so that a program without them can be looked at."""
    moments: list[Moment] = field(default_factory=list)
    said: list[bytes] = field(default_factory=list)
    _names: dict[Path, int] = field(default_factory=dict)
    _seen: dict[Path, int] = field(default_factory=dict)
    _changes: list[Change] = field(default_factory=list)
    _durable: dict[int, bytes] = field(default_factory=dict)
    _present: dict[int, bytes] = field(default_factory=dict)

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Look on; what lies in the folder at the beginning is durable."""
        self._notice()
        self._names, self._durable = dict(self._seen), dict(self._present)
        self._changes.clear()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "fdatasync"):
                patch.setattr(os, name, self._syncing(name, getattr(os, name)))
            for name in ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "close", "pwrite"):
                patch.setattr(os, name, self._stepping(name, getattr(os, name)))
            yield self
        self.look("the end")

    def look(self, step: str) -> None:
        """Take down how things stand."""
        self._notice()
        state = dict(self._names), tuple(self._changes), dict(self._durable), dict(self._present)
        moment = Moment(step, tuple(self.said), self._committed(), *state)
        if not self.moments or moment != replace(self.moments[-1], step=step):
            self.moments.append(moment)

    def _syncing(self, name: str, real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.look(f"{name} {path.name}")
            real(descriptor)
            if f"{name} folder" in self.ignored and path.is_dir():
                return
            if name in self.ignored and path.is_file():
                return
            self._keep(path)

        return sync

    def _stepping(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            self.look(f"{name} {arguments[0]}")
            done = real(*arguments, **options)
            self._notice()
            return done

        return step

    def _keep(self, path: Path) -> None:
        self._notice()
        name = path.relative_to(self.root)
        if not path.is_dir():
            self._durable[self._seen[name]] = path.read_bytes()
            return
        for change in self._changes:
            if any(changed.parent == name for changed, _ in change):
                _apply(self._names, change)
        self._changes = [one for one in self._changes if all(changed.parent != name for changed, _ in one)]

    def _notice(self) -> None:
        """Note what changed since the last look; names at once, as there is one step between two looks."""
        before, now = self._seen, self._scan()
        names = sorted(now.keys() | before.keys())
        change = tuple((name, now.get(name)) for name in names if now.get(name) != before.get(name))
        if change:
            self._changes.append(change)
        self._seen = now
        self._present |= {inode: (self.root / name).read_bytes() for name, inode in now.items() if inode != FOLDER}

    def _scan(self) -> dict[Path, int]:
        found = [path for path in self.root.rglob("*") if not (self.ledger and path.name.startswith(self.ledger))]
        return {path.relative_to(self.root): FOLDER if path.is_dir() else path.stat().st_ino for path in found}

    def _committed(self) -> bytes:
        if self.ledger is None:
            return b""
        with closing(sqlite3.connect(self.root / self.ledger)) as source, closing(sqlite3.connect(":memory:")) as copy:
            source.backup(copy)
            return copy.serialize()


def cuts(moment: Moment, rng: random.Random) -> Iterator[dict[Path, bytes | None]]:
    """Yield each state that a power cut at this moment may leave: files with their bytes, folders with nothing."""
    changes = moment.changes
    several = [changes[:upto] for upto in range(len(changes) + 1)]
    several += [changes[:one] + changes[one + 1 :] for one in range(len(changes))]
    several += [tuple(one for one in changes if rng.random() < 0.5) for _ in range(CHANCES)]
    seen = list[dict[Path, bytes | None]]()
    for kept in several:
        names = dict(moment.names)
        for change in kept:
            _apply(names, change)
        for fate in ("lost", "kept", "torn"):
            state = _state(moment, names, fate, rng.random())
            if state not in seen:
                seen.append(state)
                yield state


def lay_out(state: dict[Path, bytes | None], folder: Path) -> None:
    """Make a folder of a state."""
    folder.mkdir()
    for path, content in sorted(state.items()):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).touch(mode=0o600)  # as a key must be
            (folder / path).write_bytes(content)


def _state(moment: Moment, names: dict[Path, int], fate: str, chance: float) -> dict[Path, bytes | None]:
    state: dict[Path, bytes | None] = {}
    for name, inode in sorted(names.items()):
        if any(above not in state for above in name.parents[:-1]):
            continue  # what lies in a folder is gone with its name
        present = moment.present.get(inode, b"")
        state[name] = None if inode == FOLDER else _bytes(moment.durable.get(inode), present, fate, chance)
    return state


def _bytes(durable: bytes | None, present: bytes, fate: str, chance: float) -> bytes:
    if durable == present or fate == "kept":
        return present
    old = durable or b""
    if fate == "lost":
        return old
    cut = int(chance * len(present))
    return present[:cut] + old[cut : len(present)].ljust(len(present) - cut, b"\0")


def _apply(names: dict[Path, int], change: Change) -> None:
    for path, inode in change:
        if inode is None:
            names.pop(path, None)
        else:
            names[path] = inode
