"""A line that is slow, long and breaks: a TCP proxy on loopback, in a thread of its own.

It delays and paces what it passes on in each direction, and cuts connections after so many bytes. Single
packets it cannot lose: the TCP below would hide that.
"""

import asyncio
import random
import threading
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

READ_BYTES = 1 << 16


@dataclass
class Line:
    """What the proxy does to bytes: `seconds` one way, `bytes_a_second` each way; 0 is no limit."""

    seconds: float = 0.0
    bytes_a_second: float = 0.0
    cut_after: float = 0.0
    """Bytes towards the target, on average, until a connection is cut."""
    cuts: int = -1
    """Cuts that are left; negative is no limit."""


@dataclass
class Proxy:
    """Passes everything on to a port of this machine; `port` is where it listens while its context lasts."""

    target: int
    line: Line = field(default_factory=Line)
    seed: int = 0
    port: int = 0
    bytes_up: int = 0
    """Passed on towards the target so far, handshakes included."""
    cuts_made: int = 0

    def __enter__(self) -> Self:
        self._rng, self._writers = random.Random(self.seed), set[asyncio.StreamWriter]()
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,))
        self._thread.start()
        ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _run(self, ready: threading.Event) -> None:
        try:
            self._loop.run_until_complete(self._serve(ready))
        finally:
            self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        self._over = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._over.wait()
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=5)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        left = self.line.cut_after * self._rng.uniform(0.8, 1.2) if self.line.cut_after else float("inf")
        ways = [
            self._pass(reader, up_writer, left, is_up=True),
            self._pass(up_reader, writer, float("inf"), is_up=False),
        ]
        tasks = [asyncio.ensure_future(way) for way in ways]
        self._writers |= {writer, up_writer}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for one in (writer, up_writer):
                one.transport.abort()
                self._writers.discard(one)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: float, *, is_up: bool
    ) -> None:
        """Pass one direction on until it ends or is cut; as much is on its way as the line holds."""
        room = (
            max(1, int(2 * self.line.seconds * self.line.bytes_a_second) // READ_BYTES)
            if self.line.bytes_a_second
            else 64
        )
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(room)
        sending = asyncio.ensure_future(self._deliver(queue, writer))
        try:
            while data := await _quietly(reader.read(READ_BYTES)):
                if is_up and len(data) > left and self.line.cuts:
                    self.line.cuts, self.cuts_made = self.line.cuts - 1, self.cuts_made + 1
                    return
                left -= len(data)
                self.bytes_up += len(data) if is_up else 0
                await queue.put((self._loop.time(), data))
        finally:
            sending.cancel()

    async def _deliver(self, queue: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        """Pass on each piece when its last byte is through.

        It counts from when it came, not from when its turn did: a line does not get narrower because this thread
        wakes late.
        """
        free = 0.0
        while True:
            came, data = await queue.get()
            free = max(free, came) + (len(data) / self.line.bytes_a_second if self.line.bytes_a_second else 0.0)
            due = free + self.line.seconds
            if due > self._loop.time():
                await asyncio.sleep(due - self._loop.time())
            with suppress(ConnectionError):
                writer.write(data)
                await writer.drain()


async def _quietly(read: Awaitable[bytes]) -> bytes:
    try:
        return await read
    except ConnectionError:
        return b""
