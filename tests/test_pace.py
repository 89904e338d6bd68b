"""The window against a line that is modelled: so many bytes a second, so many seconds there and back."""

import heapq

import pytest

from fedoap.pace import FIRST_CHUNKS, LEAST_CHUNKS, MOST_CHUNKS, Window

CHUNK = 1 << 20


class Line:
    """Carries one upload of chunks over a line; credit is what `transfer.Receiver` would give."""

    def __init__(self, bytes_a_second: float, delay_seconds: float) -> None:
        self.window = Window(CHUNK)
        self._rate, self._delay = bytes_a_second, delay_seconds
        self.sizes: list[int] = []

    def carry(self, chunks: int) -> float:
        """Return the seconds from the first word to the last byte."""
        size, at, upto, sent, free = chunks * CHUNK, 0, self.window.size, 0, 0.0
        self.window.let_go(0, 0, 0.0)
        events = [(self._delay / 2, 0, upto)]  # when, at which end (0: the site hears of credit), what
        now = 0.0
        while at < size:
            now, end, value = heapq.heappop(events)
            if end == 0:
                while sent < min(value, size):
                    free = max(free, now) + CHUNK / self._rate
                    sent += CHUNK
                    heapq.heappush(events, (free + self._delay / 2, 1, sent))
                continue
            at = value
            self.window.arrived(at, now)
            self.sizes.append(self.window.size)
            wanted = min(size, at + self.window.size)
            if wanted > upto:
                self.window.let_go(at, upto, now)
                upto = wanted
                heapq.heappush(events, (now + self._delay / 2, 0, upto))
        return now


LINES = [(25e6, 0.05), (62.5e6, 0.1), (2.5e6, 0.02), (125e6, 0.1), (1e9, 0.0005)]


@pytest.mark.parametrize(("rate", "delay"), LINES)
def test_nine_tenths_of_a_line_are_used_whatever_its_width_and_length(rate: float, delay: float) -> None:
    """Planted bugs: no growth beyond the first window; the rate of the empty line at the start taken for its width."""
    chunks = 400

    seconds = Line(rate, delay).carry(chunks)

    assert chunks * CHUNK / rate / seconds > 0.9


@pytest.mark.parametrize(("rate", "delay"), LINES)
def test_no_more_is_under_way_than_the_line_holds_a_few_times_over(rate: float, delay: float) -> None:
    """Planted bug: the longest delay instead of the shortest, by which the window feeds itself."""
    line = Line(rate, delay)

    line.carry(400)

    holds = 2 * (rate * delay + CHUNK)  # the shortest delay holds the time of one chunk as well
    most = min(MOST_CHUNKS, max(LEAST_CHUNKS, -(-holds // CHUNK) + 1)) * CHUNK
    assert max(line.sizes[2 * FIRST_CHUNKS :]) <= most


def test_a_window_is_a_few_chunks_until_something_is_measured_and_after_it_goes_on_anew() -> None:
    line = Line(62.5e6, 0.1)
    assert line.window.size == FIRST_CHUNKS * CHUNK
    line.carry(100)
    assert line.window.size > FIRST_CHUNKS * CHUNK

    line.window.restart()

    assert line.window.size == FIRST_CHUNKS * CHUNK


@pytest.mark.parametrize(("rate", "delay", "chunks"), [(1e3, 1e-6, LEAST_CHUNKS), (1e9, 1.0, MOST_CHUNKS)])
def test_a_window_has_a_floor_and_a_ceiling(rate: float, delay: float, chunks: int) -> None:
    window = Window(CHUNK)
    window.let_go(0, 0, 0.0)
    window.arrived(1, delay)
    window.let_go(0, 1, 1.0)
    window.arrived(int(rate), 2.0)

    assert window.size == chunks * CHUNK


def test_time_that_stands_still_measures_nothing() -> None:
    window = Window(CHUNK)
    window.let_go(0, CHUNK, 5.0)
    window.arrived(2 * CHUNK, 5.0)

    assert window.size == FIRST_CHUNKS * CHUNK
