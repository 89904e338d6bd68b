"""What a site contributes to the bank: per slot, the sums of its tokens' keys and values and their count.

Tokens come from the shared network with the weights just received, so that the tokens of all sites lie in
one space; each is assigned to the nearest centroid. A site withholds a slot to which fewer than
`bank.min_patients` patients contribute: its sums, count and patients are sent as zero. Images are read one
batch after the other, and tokens never leave this module.

Shapes: m slots, T tokens, C channels (all heads side by side).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoap.bank import choose_seeds
from fedoap.config import Plan, SiteData
from fedoap.segmentation.datalist import Case
from fedoap.segmentation.patches import covering
from fedoap.segmentation.prepared import load_case
from fedoap.segmentation.streams import stream

SAMPLE_TOKENS = 8192
"""At most so many tokens, evenly spread over the images, determine a site's initial clusters."""
ITERATIONS = 10
"""Steps of Lloyd's algorithm at a site before the first exchange."""

BankSums: TypeAlias = dict[str, NDArray[np.generic]]


class Tokens(Protocol):
    """The part of the network that is used here."""

    def tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of an image's tokens, both (B, N, C)."""
        ...


@dataclass(frozen=True, slots=True)
class TokenSource:
    """A site's tokens, batch after batch, each time the same."""

    network: Tokens
    cases: Sequence[Case]
    data: SiteData
    plan: Plan
    cache: Path | None
    device: torch.device

    def chosen(self) -> list[Case]:
        """Return the cases that enter the exchange: evenly spread over the list, at most `bank.cases_per_site`."""
        count = min(len(self.cases), self.plan.bank.cases_per_site)
        return [self.cases[index * len(self.cases) // count] for index in range(count)]

    @torch.no_grad()
    def batches(self) -> Iterator[tuple[list[Case], Tensor, Tensor]]:
        """Yield cases with their tokens' keys and values, both float32 (B, N, C).

        If `data.patch` is given, the tokens are those of windows that cover the case.
        """
        cases, size = self.chosen(), self.plan.training.batch_size
        windows = covering(self.plan.data)
        for start in range(0, len(cases), size):
            some = cases[start : start + size]
            images = torch.stack([load_case(case, self.data, self.plan, self.cache).image for case in some])
            parts = [
                self.network.tokens(images[(slice(None), slice(None), *window)].to(self.device)) for window in windows
            ]
            keys, values = (torch.cat(side, dim=1).float() for side in zip(*parts, strict=True))
            yield some, keys, values


def seed_sums(source: TokenSource, seed: int) -> BankSums:
    """Return the sums over clusters of the site's own tokens, found by k-means++ and Lloyd's algorithm.

    There are at most `bank.slots` clusters, and no more than cases. The result is a function of the
    tokens and the seed.
    """
    sample = _sample(source)
    slots = min(source.plan.bank.slots, len(source.chosen()))
    return bank_sums(source, _cluster(sample, slots, seed))


def bank_sums(source: TokenSource, centroids: Tensor) -> BankSums:
    """Return counts (m,), patients (m,), and sums of keys and values (m, C) over the centroids (m, C)."""
    slots, channels = centroids.shape
    counts = torch.zeros(slots, dtype=torch.int64, device=source.device)
    sums = torch.zeros(2, slots, channels, dtype=torch.float64, device=source.device)
    patients: list[set[str]] = [set() for _ in range(slots)]
    for cases, keys, values in source.batches():
        nearest = _nearest(keys.flatten(0, 1), centroids)  # (T,)
        member = torch.nn.functional.one_hot(nearest, slots)  # (T, m)
        counts += member.sum(0)
        # a product, not index_add_: on a GPU that adds in another order each time
        sums += member.T.double() @ torch.stack([keys, values]).flatten(1, 2).double()
        for case, slots_of_case in zip(cases, nearest.view(len(cases), -1).tolist(), strict=True):
            for slot in set(slots_of_case):
                patients[slot].add(case.patient)
    return _withhold(counts, sums, [len(some) for some in patients], source.plan.bank.min_patients)


def _withhold(counts: Tensor, sums: Tensor, patients: list[int], least: int) -> BankSums:
    many = np.array(patients, np.int64)
    sent = many >= least
    keys, values = (np.where(sent[:, None], rows, 0.0).astype(np.float32) for rows in sums.cpu().numpy())
    return {
        "counts": np.where(sent, counts.cpu().numpy(), 0),
        "keys": keys,
        "patients": np.where(sent, many, 0),
        "values": values,
    }


def _sample(source: TokenSource) -> Tensor:
    each = max(1, SAMPLE_TOKENS // len(source.chosen()))
    rows = []
    for _, keys, _ in source.batches():
        stride = max(1, -(-keys.shape[1] // each))
        rows.append(keys[:, ::stride].flatten(0, 1))
    return torch.cat(rows)


def _cluster(points: Tensor, slots: int, seed: int) -> Tensor:
    values = points.cpu().numpy().astype(np.float64)
    start = choose_seeds(values, np.ones(len(values), np.int64), slots, stream(seed, "bank"))
    centroids = torch.from_numpy(start).to(points)
    for _ in range(ITERATIONS):
        member = torch.nn.functional.one_hot(_nearest(points, centroids), len(centroids)).to(points)
        counts = member.sum(0)[:, None]
        # a cluster that lost all its points stays where it is
        centroids = torch.where(counts > 0, member.T @ points / counts.clamp(min=1), centroids)
    return centroids


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Return each point's nearest centroid, the first of those equally near."""
    return ((centroids**2).sum(1) - 2 * points @ centroids.T).argmin(1)  # (T,)
