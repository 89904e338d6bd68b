"""A disk that forgets what was not synced: bytes, in whole or in part, and names.

Bytes are volatile until their file is synced, names (created, renamed, removed) until their folder is.
A crash keeps of the volatile bytes what chance keeps, a write at a time, one of them perhaps torn; of the
volatile names it keeps those that were changed first. A rename is atomic: the old name or the new one.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

Name: TypeAlias = tuple[str, bytes]
"""Folder and name."""


class FullError(Exception):
    """No space left."""


@dataclass(slots=True)
class File:
    """One file: what reads see is `content`, what is sure to outlast a crash is `durable`."""

    content: bytearray
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, at: int, data: bytes) -> None:
        self.content[at : at + len(data)] = data
        self.pending.append((at, data))

    def sync(self) -> None:
        self.durable = bytearray(self.content)
        self.pending.clear()

    def crash(self, rng: random.Random) -> int:
        """Lose what chance does not keep, and return how many writes were lost or torn."""
        left = bytearray(self.durable.ljust(len(self.content), b"\0"))  # room was made for all of it
        lost = 0
        for at, data in self.pending:
            kept = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
            left[at : at + kept] = data[:kept]
            lost += kept < len(data)
        self.content, self.durable = left, bytearray(left)
        self.pending.clear()
        return lost


class Disk:
    """The files of one machine."""

    def __init__(self, rng: random.Random, full_now_and_then: float = 0.0) -> None:
        self._rng, self._full_now_and_then = rng, full_now_and_then
        self._files: dict[Name, File] = {}
        self._changes: list[dict[Name, File | None]] = []
        self._durable: dict[Name, File] = {}
        self.is_full = False
        self.lost = 0

    def create(self, name: Name, size: int) -> None:
        """Make room for a file, empty whatever was there before.

        Raises:
            FullError: there is none.
        """
        self.need_space()
        self._change({name: File(bytearray(size))})

    def need_space(self) -> None:
        """Return if there is some.

        Raises:
            FullError: there is none.
        """
        if self.is_full or (self._full_now_and_then and self._rng.random() < self._full_now_and_then):
            raise FullError

    def write(self, name: Name, at: int, data: bytes) -> None:
        """Write to a file; one that is gone, as it could not be made, stays so."""
        if name in self._files:
            self._files[name].write(at, data)

    def sync(self, name: Name) -> None:
        self._files[name].sync()

    def rename(self, name: Name, target: Name) -> None:
        self._change({target: self._files[name], name: None})

    def remove(self, name: Name) -> None:
        if name in self._files:
            self._change({name: None})

    def sync_folders(self) -> None:
        self._durable = dict(self._files)
        self._changes.clear()

    def read(self, name: Name) -> bytes:
        return bytes(self._files[name].content)

    def has(self, name: Name) -> bool:
        return name in self._files

    def names(self, folder: str) -> list[bytes]:
        return [name for place, name in self._files if place == folder]

    def keep_only(self, folder: str, needed: Iterable[bytes]) -> None:
        for name in set(self.names(folder)) - set(needed):
            self.remove((folder, name))

    def crash(self) -> None:
        """Keep what is durable and what chance keeps of the rest."""
        kept = self._changes[: self._rng.randrange(len(self._changes) + 1)]
        for change in kept:
            _apply(self._durable, change)
        self._files = dict(self._durable)
        self._changes.clear()
        for file in self._files.values():
            if file.pending:
                self.lost += file.crash(self._rng)

    def _change(self, change: dict[Name, File | None]) -> None:
        _apply(self._files, change)
        self._changes.append(change)


def _apply(names: dict[Name, File], change: dict[Name, File | None]) -> None:
    for name, file in change.items():
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file
