"""From the sites' sums of keys and values to the bank that they all read.

The bank is a codebook made by federated k-means in key space: a site adds up, for each slot, the
keys and values of its tokens that are nearest to the slot's centroid, and sends the sums and
counts. Here they are added over the sites, divided and published. A slot's log weight is
log(n / N * mass), so that attention over M centroids stands for attention over all N tokens scaled
to a total weight of `mass`.

Shapes: m slots of one upload, M slots of the bank, C channels of the bottleneck, H heads, D = C / H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedoap.config import Plan
from fedoap.errors import TensorsError, UpdateError
from fedoap.manifests import BlobManifest, UploadManifest
from fedoap.seal import SealedFile
from fedoap.tensors import parse_blob, read_blob, write_blob

BankKind: TypeAlias = Literal["seed", "bank"]
Floats: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]

SPLIT_OFFSET = 0.01
"""How far a dead slot starts from the slot that it splits, relative to the length of that key."""
MOST_TOKENS = 1 << 40
"""Of a site in a slot: the counts of 4096 slots and 1000 sites fit into int64 together."""
LARGEST_SUM = 1e30
"""Of a site's keys or values in a slot: what is made of them stays finite as float32."""
_SEEDING, _SPLITTING = 1, 2
"""Streams of the plan's seed."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """Per slot: how many tokens, and the sums of their keys and values, both (m, C)."""

    counts: Counts
    keys: Floats
    values: Floats


def merge_bank(
    kind: BankKind,
    updates: Sequence[tuple[Path | SealedFile, UploadManifest]],
    previous: tuple[Path, BlobManifest] | None,
    plan: Plan,
    output: Path,
) -> BlobManifest:
    """Write the bank that follows from the sites' sums, as float32, and return its manifest.

    Sites are added in the order of their names. A slot to which no site contributed has count 0 and
    log weight -inf: attention does not see it. Its key lies beside the heaviest slot's, so that the
    next exchange divides that slot's tokens between the two. If no site contributed at all, the keys
    and values are those of the previous bank, or zero.

    Raises:
        TensorsError: naming the site, and the slot where one is to blame, whose sums cannot be used.
    """
    ordered = sorted(updates, key=lambda update: update[1].site)
    sites = [_read_sums(path, manifest, kind, plan) for path, manifest in ordered]
    if not sites:
        raise TensorsError(f"{output}: no update to merge")
    total = _add(sites) if kind == "bank" else _add(_align(sites, plan))
    keys, values = _means(total)
    if not total.counts.any() and previous is not None:
        keys, values = _previous(*previous)
    _split_heaviest(total.counts, keys, values, plan.seed)
    return write_blob(
        output,
        {
            "counts": total.counts,
            "keys": _by_head(keys, plan.network.heads),
            "log_weights": log_weights(total.counts, plan.bank.mass),
            "values": _by_head(values, plan.network.heads),
        },
    )


def log_weights(counts: Counts, mass: float) -> NDArray[np.float32]:
    """Return log(n / N * mass) for each slot, -inf where n is 0.

    >>> log_weights(np.array([3, 1, 0]), mass=4.0).round(2).astype(float).round(2).tolist()
    [1.1, 0.0, -inf]
    """
    with np.errstate(divide="ignore"):
        weights: Floats = np.log(counts / max(1, int(counts.sum())) * mass)
    return weights.astype(np.float32)


def _read_sums(path: Path | SealedFile, manifest: UploadManifest, kind: BankKind, plan: Plan) -> _Sums:
    _check_table(manifest, kind, plan)
    blob = manifest.blob
    tensors = parse_blob(b"".join(path.chunks()), blob) if isinstance(path, SealedFile) else read_blob(path, blob)
    counts, patients = tensors["counts"].astype(np.int64), tensors["patients"].astype(np.int64)
    sums = _Sums(counts, tensors["keys"].astype(np.float64), tensors["values"].astype(np.float64))
    content = np.concatenate([sums.keys, sums.values], axis=1)
    odd = np.array([not (np.abs(row) < LARGEST_SUM).all() for row in content], bool)
    silent = (counts == 0) & np.array([row.any() for row in content], bool)
    few = (counts > 0) & (patients < plan.bank.min_patients)
    _refuse(manifest.site, counts < 0, "has a negative count")
    _refuse(manifest.site, counts > MOST_TOKENS, f"counts more than {MOST_TOKENS} tokens")
    _refuse(manifest.site, odd, f"is not finite, or reaches {LARGEST_SUM:g}")
    _refuse(manifest.site, silent, "has sums, but its count is 0")
    _refuse(manifest.site, few, f"stands for fewer than bank.min_patients = {plan.bank.min_patients} patients")
    return sums


def _check_table(manifest: UploadManifest, kind: BankKind, plan: Plan) -> None:
    rows = {spec.name: (spec.dtype, spec.shape) for spec in manifest.blob.tensors}
    slots = rows.get("counts", ("", (0,)))[1][0] if rows.get("counts", ("", ()))[1] else 0
    channels = plan.network.bottleneck
    wanted = {
        "counts": ("int64", (slots,)),
        "keys": ("float32", (slots, channels)),
        "patients": ("int64", (slots,)),
        "values": ("float32", (slots, channels)),
    }
    if rows != wanted:
        raise UpdateError(manifest.site, "its bank sums are not counts, keys, patients, values of one length")
    if slots > plan.bank.slots or (kind == "bank" and slots != plan.bank.slots):
        raise UpdateError(manifest.site, f"its sums are for {slots} slots, but bank.slots is {plan.bank.slots}")


def _refuse(site: str, bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise UpdateError(site, f"slot {int(bad.argmax())} of its bank sums {what}")


def _add(sites: Sequence[_Sums]) -> _Sums:
    first, *others = sites
    total = _Sums(first.counts.copy(), first.keys.copy(), first.values.copy())
    for site in others:
        np.add(total.counts, site.counts, out=total.counts)
        np.add(total.keys, site.keys, out=total.keys)
        np.add(total.values, site.values, out=total.values)
    return total


def _align(sites: Sequence[_Sums], plan: Plan) -> list[_Sums]:
    """Return each site's sums on common slots: each of its clusters joins the seed nearest to the cluster's mean."""
    means = [_means(site)[0][site.counts > 0] for site in sites]
    weights = np.concatenate([site.counts[site.counts > 0] for site in sites])
    rng = np.random.Generator(np.random.Philox([plan.seed, _SEEDING]))
    seeds = choose_seeds(np.concatenate(means), weights, plan.bank.slots, rng)
    return [_assign(site, mean, seeds, plan.bank.slots) for site, mean in zip(sites, means, strict=True)]


def choose_seeds(points: Floats, weights: Counts, slots: int, rng: np.random.Generator) -> Floats:
    """Return at most `slots` of the points (n, C), spread out by weighted k-means++.

    The first is drawn by weight, each further one by weight times squared distance to the nearest
    seed so far (Arthur and Vassilvitskii 2007). There are fewer seeds if there are fewer distinct points.
    """
    nearest = np.ones(len(points))
    chosen: list[int] = []
    for _ in range(slots):
        mass = np.cumsum(weights * nearest)
        if not len(mass) or mass[-1] <= 0:
            break
        index = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
        distances = ((points - points[index]) ** 2).sum(axis=1)
        nearest = np.minimum(nearest, distances) if chosen else distances
        chosen.append(index)
    return points[chosen]


def _assign(site: _Sums, means: Floats, seeds: Floats, slots: int) -> _Sums:
    channels = site.keys.shape[1]
    out = _Sums(np.zeros(slots, np.int64), np.zeros((slots, channels)), np.zeros((slots, channels)))
    for row, mean in zip(np.flatnonzero(site.counts > 0), means, strict=True):
        slot = int(((seeds - mean) ** 2).sum(axis=1).argmin())
        out.counts[slot] += site.counts[row]
        out.keys[slot] += site.keys[row]
        out.values[slot] += site.values[row]
    return out


def _means(sums: _Sums) -> tuple[Floats, Floats]:
    divisor = np.maximum(1, sums.counts)[:, None]
    return sums.keys / divisor, sums.values / divisor


def _previous(path: Path, manifest: BlobManifest) -> tuple[Floats, Floats]:
    tensors = read_blob(path, manifest)
    keys, values = (tensors[name].astype(np.float64) for name in ("keys", "values"))  # (H, M, D)
    return tuple(x.transpose(1, 0, 2).reshape(x.shape[1], -1) for x in (keys, values))  # type: ignore[return-value]


def _split_heaviest(counts: Counts, keys: Floats, values: Floats, seed: int) -> None:
    """Place each dead slot beside the slot with most tokens per part, of the parts that it is split into so far."""
    rng = np.random.Generator(np.random.Philox([seed, _SPLITTING]))
    parts = np.ones(len(counts))
    if not counts.any():
        return
    for slot in np.flatnonzero(counts == 0):
        heaviest = int((counts / parts).argmax())
        parts[heaviest] += 1
        direction = rng.standard_normal(keys.shape[1])
        length = SPLIT_OFFSET * np.linalg.norm(keys[heaviest]) / np.linalg.norm(direction)
        keys[slot] = keys[heaviest] + length * direction
        values[slot] = values[heaviest]


def _by_head(rows: Floats, heads: int) -> NDArray[np.float32]:
    return rows.reshape(len(rows), heads, -1).transpose(1, 0, 2).astype(np.float32)  # (H, M, D)
