"""Blobs in motion: receiver, sender, fetcher, and who may upload now; no sockets, no files, no clock.

A blob travels in its manifest's chunks, in order, at absolute offsets. Nothing here keeps a chunk: each
is checked as it passes and written by whoever called, so memory does not grow with the model. A chunk
that is lost, repeated or out of order costs time only.

A transfer that a restart cut short goes on at a recorded offset: its `Receiver` starts there, and is given
the `tail` of the bytes before it, because a number may straddle the two.
"""

import hashlib
from bisect import bisect_right
from itertools import groupby
from typing import Literal, TypeAlias

from fedoap.errors import RefusedError, SealError
from fedoap.manifests import ITEM_BYTES, BlobManifest, Dtype, TensorSpec
from fedoap.pace import FIRST_CHUNKS, Window
from fedoap.seal import TAG_BYTES, Seal
from fedoap.tensors import first_not_finite

CHECKPOINT_CHUNKS = 32
"""After this many chunks an upload is made durable as far as it goes, so that a crash costs no more than that."""
TAIL_BYTES = max(ITEM_BYTES.values()) - 1
"""The longest start of a number that lies before an offset."""
QUIET_SECONDS = 10.0
"""A download that has stood still for this long is asked for again; the pause doubles up to a minute."""
LONGEST_QUIET_SECONDS = 60.0

Taken: TypeAlias = Literal["new", "repeated", "gap"]
Range: TypeAlias = tuple[int, int]


class FiniteScan:
    """Looks for floats that are not finite in a blob whose bytes come by in order, from byte `at` on.

    `tail` is what lies before `at`: at least the last `TAIL_BYTES`, or all there are.
    """

    __slots__ = ("_blob", "_carry", "_runs")

    def __init__(self, blob: BlobManifest, at: int = 0, tail: bytes = b"") -> None:
        self._blob = blob
        self._runs = _float_runs(blob)
        begun = _begun(self._runs, at)
        assert begun <= len(tail), "the tail must reach back to where the number begins"
        self._carry = tail[len(tail) - begun :]  # the start of an element that the next chunk completes

    def first_bad(self, at: int, body: memoryview) -> str | None:
        """Return the tensor that holds the first number that is not finite in the blob's next bytes."""
        end = at + len(body)
        first = bisect_right(self._runs, at, key=lambda run: run[1])
        for start, stop, dtype in self._runs[first:]:
            if start >= end:
                break
            low, high = max(start, at), min(stop, end)
            bad = self._scan(low, body[low - at : high - at], dtype)
            if bad is not None:
                return self._name(bad)
        return None

    def _scan(self, low: int, piece: memoryview, dtype: Dtype) -> int | None:
        start, item = low - len(self._carry), ITEM_BYTES[dtype]
        joined = memoryview(b"".join([self._carry, piece])) if self._carry else piece
        whole = len(joined) - len(joined) % item
        self._carry = bytes(joined[whole:])
        index = first_not_finite(joined[:whole], dtype)
        return None if index is None else start + index * item

    def _name(self, byte: int) -> str:
        return next(spec.name for spec, start in self._blob.offsets() if start <= byte < start + spec.size)


class Receiver:
    """Takes a blob in, chunk by chunk: `at` is the byte expected next, `upto` where its credit ends.

    Offsets are those of the plain blob; with a `seal` the chunks come sealed, each longer by its tag.
    """

    __slots__ = ("_scan", "_seal", "at", "blob", "upto", "window")

    def __init__(
        self,
        blob: BlobManifest,
        *,
        finite: bool = True,
        window_chunks: int = FIRST_CHUNKS,
        at: int = 0,
        tail: bytes = b"",
        seal: Seal | None = None,
    ) -> None:
        self.blob, self._seal = blob, seal
        self.at = self.upto = at
        self.window = Window(blob.chunk_bytes, window_chunks)
        # packed bytes are no floats: what they stand for is looked at where it is unpacked
        self._scan = FiniteScan(blob, at, tail) if finite and blob.packing is None else None

    @property
    def is_complete(self) -> bool:
        """Whether every byte has passed."""
        return self.at == self.blob.size

    def grant(self, now: float) -> int:
        """Give credit for a window from here, and return where it ends; what was given stays given."""
        upto = min(self.blob.size, self.at + self.window.size)
        if upto > self.upto:
            self.window.let_go(self.at, self.upto, now)
            self.upto = upto
        return self.upto

    def withdraw(self) -> None:
        """Take back credit that was not used; the next measures the line anew."""
        self.upto = self.at
        self.window.restart()

    def take(self, at: int, body: memoryview, now: float) -> Taken:
        """Return what the chunk is: the next one, which counts as received, or one that changes nothing.

        Raises:
            RefusedError: it lies beyond the credit, does not open, or has the wrong length, hash or content;
                nothing changes.
        """
        if at != self.at or self.is_complete:
            return "gap" if at > self.at else "repeated"
        size, digest = self.blob.chunk(at)
        if at + size > self.upto:
            raise RefusedError("malformed", f"chunk at byte {at} lies beyond the credit, which ends at {self.upto}")
        wanted = size + TAG_BYTES if self._seal else size
        if len(body) != wanted:
            raise RefusedError("malformed", f"chunk at byte {at} has {len(body)} bytes, but must have {wanted}")
        plain = self._open(at, body)
        if hashlib.sha256(plain).digest() != digest:
            raise RefusedError("corrupt", f"chunk at byte {at} does not have the hash that the manifest names")
        bad = self._scan.first_bad(at, plain) if self._scan else None
        if bad is not None:
            raise RefusedError("not_finite", f"tensor {bad} holds a number that is not finite")
        self.at += size
        self.window.arrived(self.at, now)
        return "new"

    def _open(self, at: int, body: memoryview) -> memoryview:
        try:
            return memoryview(self._seal.open(at, body)) if self._seal else body
        except SealError as error:
            raise RefusedError("corrupt", str(error)) from None


class Sender:
    """Says which bytes of a blob to send now: from where it is told, as far as it has credit."""

    __slots__ = ("_at", "_chunk", "_size", "_upto")

    def __init__(self, blob: BlobManifest) -> None:
        self._chunk, self._size = blob.chunk_bytes, blob.size
        self._at = self._upto = -1

    def go(self, at: int, upto: int) -> list[Range]:
        """Return the chunks (offset, length) due when told to send from `at` up to `upto`."""
        if at % self._chunk or not at <= upto <= self._size:
            return []
        self._at, self._upto = at, upto
        return self._due()

    def credit(self, upto: int) -> list[Range]:
        """Return the chunks that more credit lets through; none before the first `go`."""
        if self._at < 0 or upto > self._size:
            return []
        self._upto = max(self._upto, upto)
        return self._due()

    def pause(self) -> None:
        """Forget the credit: the next `go` says where to start."""
        self._at = self._upto = -1

    def _due(self) -> list[Range]:
        due = []
        while self._at < self._upto:
            size = min(self._chunk, self._size - self._at)
            due.append((self._at, size))
            self._at += size
        return due


class Fetcher:
    """Downloads a blob: says which ranges to ask for, so that a window is always under way."""

    __slots__ = ("_asked", "_heard", "_quiet", "_receiver", "_reported")

    def __init__(self, blob: BlobManifest, now: float, *, window_chunks: int = FIRST_CHUNKS, at: int = 0) -> None:
        # not looked at for floats: the signed manifest's hash already fixes every bit
        self._receiver = Receiver(blob, finite=False, at=at, window_chunks=window_chunks)
        self._asked, self._reported = at, -1
        self._heard, self._quiet = now, QUIET_SECONDS

    @property
    def blob(self) -> BlobManifest:
        """What is being downloaded."""
        return self._receiver.blob

    @property
    def is_complete(self) -> bool:
        """Whether every byte has passed."""
        return self._receiver.is_complete

    def ask(self, now: float) -> list[Range]:
        """Return the ranges [at, upto) to ask for now, half a window each, perhaps none."""
        ranges, chunk, window = [], self.blob.chunk_bytes, self._receiver.window
        step = max(1, window.size // chunk // 2) * chunk
        while self._asked < self.blob.size and self._asked - self._receiver.at <= step:
            upto = min(self.blob.size, self._asked + step)
            ranges.append((self._asked, upto))
            window.let_go(self._receiver.at, self._asked, now)
            self._asked = self._receiver.upto = upto
        return ranges

    def take(self, at: int, body: memoryview, now: float) -> bool:
        """Return whether the chunk is the next one and is to be written.

        Raises:
            RefusedError: it has the wrong length or hash.
        """
        taken = self._receiver.take(at, body, now)
        if taken == "new":
            self._heard = now
        elif taken == "gap" and self._reported != self._receiver.at:
            self._reported = self._receiver.at  # once a gap: the rest of the window is still on its way
            self.restart(now)
        return taken == "new"

    def restart(self, now: float) -> None:
        """Ask again from the first byte that is missing."""
        self._asked, self._heard = self._receiver.at, now
        self._receiver.window.restart()

    def restart_if_quiet(self, now: float) -> None:
        """Ask again if nothing came for a while; each time with more patience, as a slow link needs it."""
        if now - self._heard >= self._quiet:
            self._quiet = min(2 * self._quiet, LONGEST_QUIET_SECONDS)
            self.restart(now)


class Admission:
    """Who may upload now: the first `at_once` in order of arrival; the others wait."""

    __slots__ = ("_at_once", "_queue")

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._queue: list[str] = []

    def enter(self, site: str) -> bool:
        """Queue a site that is not yet there, and return whether it may upload."""
        if site not in self._queue:
            self._queue.append(site)
        return site in self._queue[: self._at_once]

    def leave(self, site: str) -> list[str]:
        """Remove a site, and return those that may upload from now on because of it."""
        before = self._queue[: self._at_once]
        self._queue = [one for one in self._queue if one != site]
        return [one for one in self._queue[: self._at_once] if one not in before]

    @property
    def crowded(self) -> bool:
        """Whether somebody waits."""
        return len(self._queue) > self._at_once


def _float_runs(blob: BlobManifest) -> list[tuple[int, int, Dtype]]:
    """Return (start, stop, dtype) of neighbouring float tensors of one dtype, joined: few, whatever their number."""
    runs: list[tuple[int, int, Dtype]] = []
    at = 0
    for dtype, specs in groupby(blob.tensors, key=_dtype):
        stop = at + sum(spec.size for spec in specs)
        if dtype != "int64" and stop > at:
            runs.append((at, stop, dtype))
        at = stop
    return runs


def _begun(runs: list[tuple[int, int, Dtype]], at: int) -> int:
    """Return how many bytes before `at` belong to a float that goes on after it."""
    return next(((at - start) % ITEM_BYTES[dtype] for start, stop, dtype in runs if start < at < stop), 0)


def _dtype(spec: TensorSpec) -> Dtype:
    return spec.dtype
