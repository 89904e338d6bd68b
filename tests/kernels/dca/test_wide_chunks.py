"""What the wide route holds in memory at one time.

B batch, H heads, N queries.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedoap.kernels.dca.problem import Problem
from fedoap.kernels.dca.wide_chunks import chunks


def problem(batch: int, heads: int, queries: int) -> Problem:
    """Return a problem of one key, one slot and one channel."""

    def tokens(*shape: int) -> Tensor:
        return torch.zeros(*shape, 1)

    local, bank = tokens(batch, heads, 1), tokens(heads, 1)
    return Problem(tokens(batch, heads, queries), local, local, bank, bank, None, None, scale=1.0, precision="ieee")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 300), st.integers(1, 1000), st.integers(1, 2_000_000))
def test_chunks_cover_a_problem_once_and_keep_the_limit(
    batch: int, heads: int, queries: int, row_bytes: int, limit: int
) -> None:
    covered = torch.zeros(batch, heads, queries)
    last: dict[int, tuple[int, int]] = {}
    for chunk in chunks(problem(batch, heads, queries), row_bytes, limit, 16):
        part = chunk.rows(covered)
        part += 1
        assert part.numel() * row_bytes <= limit or part.numel() <= 16
        assert chunk.queries.start % 16 == 0
        for head in range(chunk.heads.start, chunk.heads.stop):
            assert last.get(head, (-1, -1)) < (chunk.batch.start, chunk.queries.start)
            last[head] = chunk.batch.start, chunk.queries.start

    assert bool((covered == 1).all())
