"""How much of a blob may be under way at a time: twice what the line holds, measured as it goes.

The line holds bandwidth x delay. The delay is the shortest time from letting bytes go to the arrival of the
first of them; the bandwidth the best recent rate at which bytes arrived meanwhile. Both are what BBR goes
by (Cardwell et al. 2017, doi:10.1145/3009824), and so is the factor of two: one line's worth on its way,
one for the answer. The delay stays the shortest until a transfer goes on anew: with longer ones, which
hold the queue of our own bytes, the window would feed itself. Times come in; no clock is read.
"""

from collections import deque

LEAST_CHUNKS = 2
FIRST_CHUNKS = 8
"""Until something has been measured."""
MOST_CHUNKS = 32
RATES_KEPT = 8


class Window:
    """What one transfer may have under way."""

    __slots__ = ("_chunk", "_delay", "_first", "_probe", "_rates")

    def __init__(self, chunk_bytes: int, first_chunks: int = FIRST_CHUNKS) -> None:
        self._chunk, self._first = chunk_bytes, first_chunks
        self.restart()

    @property
    def size(self) -> int:
        """Bytes, in whole chunks."""
        if self._delay is None or not self._rates:
            return self._first * self._chunk
        chunks = -(-2 * max(self._rates) * self._delay // self._chunk)
        return self._chunk * int(min(max(chunks, LEAST_CHUNKS), MOST_CHUNKS))

    def restart(self) -> None:
        """Measure anew: the transfer begins, or goes on over another connection."""
        self._delay: float | None = None
        self._rates: deque[float] = deque(maxlen=RATES_KEPT)
        self._probe: tuple[int, int, float] | None = None

    def let_go(self, at: int, edge: int, now: float) -> None:
        """Note that bytes from `edge` on were let go at this time, all before `at` being here."""
        if self._probe is None:
            self._probe = at, edge, now

    def arrived(self, at: int, now: float) -> None:
        """Note that all bytes before `at` are here."""
        if self._probe is None or at <= self._probe[1]:
            return
        before, edge, since = self._probe
        self._probe = None
        seconds = now - since
        if seconds <= 0:
            return
        self._delay = seconds if self._delay is None else min(self._delay, seconds)
        if edge > before:  # else the line was empty: that says how long it is, not how wide
            self._rates.append((at - before) / seconds)
