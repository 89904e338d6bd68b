"""What of a problem the wide route holds in memory at one time.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from fedoap.kernels.dca.problem import Attended, Gradients, Problem


@dataclass(frozen=True, slots=True)
class Backward:
    """What a backward pass reads, and the memory that it fills."""

    problem: Problem
    attended: Attended
    dout: Tensor
    """(B, H, N, D)."""
    delta: Tensor
    """Like the log-sum-exp."""
    gradients: Gradients
    column_sums: Tensor | None = None
    """(B, blocks of rows, H, M): sums of slopes over each block, where the bias wants a gradient."""
    local_sum: Tensor | None = None
    """(2, L, D) wide: sums for k and v that go on in the next chunk, where there is one."""
    bank_sum: Tensor | None = None
    """(2, H, M, D): likewise for the bank."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of batch elements with all queries of all heads, or less."""

    batch: slice
    heads: slice
    queries: slice

    def rows(self, x: Tensor) -> Tensor:
        """Return this part of x (..., B, H, N): one number a query."""
        return x[..., self.batch, self.heads, self.queries]

    def tokens(self, x: Tensor) -> Tensor:
        """Return this part of x (B, H, N, D)."""
        return x[self.batch, self.heads, self.queries]

    def keys(self, x: Tensor) -> Tensor:
        """Return the part of x (B, H, L, D) that these queries attend to."""
        return x[self.batch, self.heads]

    def bank(self, x: Tensor) -> Tensor:
        """Return the part of x (..., H, M, D) that these queries attend to."""
        return x[..., self.heads, :, :]

    def problem(self, whole: Problem) -> Problem:
        """Return this part of a problem."""
        return replace(
            whole,
            q=self.tokens(whole.q),
            k=self.keys(whole.k),
            v=self.keys(whole.v),
            bank_k=self.bank(whole.bank_k),
            bank_v=self.bank(whole.bank_v),
            bias=None if whole.bias is None else whole.bias[self.heads],
            gate=None if whole.gate is None else self.rows(whole.gate),
        )

    def attended(self, whole: Attended) -> Attended:
        """Return this part of a result."""
        return Attended(
            self.tokens(whole.out),
            self.rows(whole.lse),
            None if whole.local_out is None else self.tokens(whole.local_out),
            None if whole.bank_out is None else self.tokens(whole.bank_out),
            None if whole.weights is None else self.tokens(whole.weights),
            None if whole.pivots is None else self.keys(whole.pivots)[..., self.queries],
        )

    def backward(self, whole: Backward, block_rows: int) -> Backward:
        """Return this part of a backward pass; a block of rows, whose column sums are kept, has `block_rows`."""
        got, columns = whole.gradients, whole.column_sums
        blocks = slice(self.queries.start // block_rows, -(-self.queries.stop // block_rows))
        return Backward(
            self.problem(whole.problem),
            self.attended(whole.attended),
            self.tokens(whole.dout),
            self.rows(whole.delta),
            Gradients(
                q=None if got.q is None else self.tokens(got.q),
                k=None if got.k is None else self.keys(got.k),
                v=None if got.v is None else self.keys(got.v),
                bank_k=None if got.bank_k is None else self.bank(got.bank_k),
                bank_v=None if got.bank_v is None else self.bank(got.bank_v),
            ),
            None if columns is None else columns[self.batch, blocks, self.heads],
            whole.local_sum,
            None if whole.bank_sum is None else self.bank(whole.bank_sum),
        )

    def phase(self, whole: Problem) -> int:
        """Return what to do with sums over queries: 1 go on with local ones, 2 finish them; 4, 8 the bank's."""
        batch, _, queries, *_ = whole.sizes
        starts, ends = self.queries.start == 0, self.queries.stop == queries
        bank_starts, bank_ends = starts and self.batch.start == 0, ends and self.batch.stop == batch
        return sum(
            bit for bit, set_ in zip((1, 2, 4, 8), (not starts, ends, not bank_starts, bank_ends), strict=True) if set_
        )


def chunks(problem: Problem, row_bytes: int, limit: int, block: int) -> Iterator[Chunk]:
    """Yield parts of at most `limit` bytes of weights, or of `block` queries of one head where that is more.

    For each head batch elements follow in order, and queries in order within them; all but an element's
    last part hold whole blocks of queries. So a sum over queries goes on where it stopped.
    """
    batch, heads, queries, *_ = problem.sizes
    rows = max(1, limit // max(1, row_bytes))
    if rows >= heads * queries:
        counts = min(batch, rows // max(1, heads * queries)), heads, queries
    elif rows >= queries:
        counts = 1, rows // queries, queries
    else:
        counts = 1, 1, max(block, rows // block * block)
    for b in _slices(batch, counts[0]):
        for h in _slices(heads, counts[1]):
            for n in _slices(queries, counts[2]):
                yield Chunk(b, h, n)


def _slices(count: int, step: int) -> Iterator[slice]:
    # a batch of nothing is one part too: the bank's gradients are then 0, which somebody has to write
    return (slice(start, min(start + step, count)) for start in range(0, max(1, count), max(1, step)))
