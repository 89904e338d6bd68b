"""Tiny federations for the tests of the protocol: keys, rosters, configurations and blobs."""

import hashlib
from collections.abc import Mapping
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedoap.config import FederationConfig
from fedoap.identity import Member, Roster
from fedoap.manifests import BlobManifest, Dtype, TensorSpec
from fedoap.tensors import bfloat16_bits

CHUNK_BYTES = 64
"""So small in these tests that a few numbers are several chunks; `tests/protocol/conftest.py` sees to it."""
SITES = ("alpha", "beta", "gamma")
FEDERATION_SECRET = hashlib.sha256(b"federation").digest()


def secret(site: str) -> bytes:
    return hashlib.sha256(site.encode()).digest()


def curve(site: str) -> bytes:
    return hashlib.sha256(b"curve" + site.encode()).digest()


@cache
def public(private: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


@cache
def roster(*revoked: str, sites: tuple[str, ...] = SITES) -> Roster:
    members = [Member(site, curve(site), public(secret(site)), site in revoked) for site in sites]
    return Roster(1 + len(revoked), tuple(members))


def config(
    *,
    sites: tuple[str, ...] = SITES,
    quorum: int | None = None,
    rounds: int = 2,
    has_bank: bool = True,
    dtype: str = "float32",
    attempts: int = 5,
    uploads_at_once: int = 2,
    updates: str = "plain",
) -> FederationConfig:
    """A federation whose network is as small as can be: 8 channels at the bottleneck, 4 slots in the bank."""
    return FederationConfig.model_validate(
        {
            "federation": "demo",
            "sites": sites,
            "coordinator": {"uploads_at_once": uploads_at_once},
            "rounds": {"count": rounds, "quorum": quorum, "deadline_minutes": 10, "attempts": attempts},
            "network": {"width": 4, "depth": 1, "attention": "joint" if has_bank else "off"},
            "bank": {"slots": 4},
            "data": {"size": (8, 8)},
            "wire": {"dtype": dtype, "updates": updates},
        }
    )


def blob(arrays: Mapping[str, NDArray[np.generic]], dtype: Dtype = "float32") -> tuple[BlobManifest, bytes]:
    """Manifest and bytes of a set of tensors, in small chunks."""
    specs, raw = [], b""
    for name in sorted(arrays):
        array = arrays[name]
        kind: Dtype = dtype if np.issubdtype(array.dtype, np.floating) else "int64"
        specs.append(TensorSpec(name, kind, array.shape))
        raw += _bytes(array, kind)
    step = CHUNK_BYTES
    hashes = b"".join(hashlib.sha256(raw[at : at + step]).digest() for at in range(0, len(raw), step))
    return BlobManifest(tuple(specs), hashes, step), raw


def _bytes(array: NDArray[np.generic], kind: Dtype) -> bytes:
    match kind:
        case "int64":
            return array.astype("<i8").tobytes()
        case "bfloat16":
            return bfloat16_bits(array.astype(np.float32)).tobytes()
        case "float32":
            return array.astype("<f4").tobytes()
