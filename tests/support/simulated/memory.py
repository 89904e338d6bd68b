"""Makes many worlds cheap: few bytes, and what a pure function returned once is not worked out again.

Ed25519 signs deterministically and its verification depends on nothing but its arguments, so remembering
both changes nothing that can be seen: a signature that was never seen before is verified for good.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Final

import pytest

from federation_builders import CHUNK_BYTES
from fedoap.config import Plan
from fedoap.identity import is_signed, sign
from fedoap.messages import decode_from_coordinator, decode_from_site, encode
from fedoap.protocol.assignment import read_plan
from fedoap.seal import Seal, public_half
from fedoap.transfer import Receiver

WINDOW_CHUNKS: Final = 2
"""Smaller than an upload, so that credit matters."""
SIGNERS: Final = ("greeting", "offering", "rounds")
VERIFIERS: Final = ("assignment", "attendance", "checks")
ENTRIES: Final = 1 << 16


@contextmanager
def many_worlds() -> Iterator[None]:
    """Let chunks and windows be small, and pure functions be remembered, as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedoap.manifests.CHUNK_BYTES", CHUNK_BYTES)
        patch.setattr("fedoap.tensors.CHUNK_BYTES", CHUNK_BYTES)
        patch.setattr("fedoap.protocol.uploads.Receiver", partial(Receiver, window_chunks=WINDOW_CHUNKS))
        patch.setattr("simulated.checks.MOST_CHUNKS", WINDOW_CHUNKS)
        patch.setattr("fedoap.pace.MOST_CHUNKS", WINDOW_CHUNKS)
        patch.setattr("fedoap.transfer.CHECKPOINT_CHUNKS", 1)
        patch.setattr("fedoap.seal.public_half", half := lru_cache(ENTRIES)(public_half))
        patch.setattr("fedoap.protocol.rounds.public_half", half)
        patch.setattr(Seal, "of_exchange", lru_cache(ENTRIES)(Seal.of_exchange))
        patch.setattr(Seal, "of_site", lru_cache(ENTRIES)(Seal.of_site))
        remembered_sign, remembered_check = lru_cache(ENTRIES)(sign), lru_cache(ENTRIES)(is_signed)
        for module in SIGNERS:
            patch.setattr(f"fedoap.protocol.{module}.sign", remembered_sign)
        for module in VERIFIERS:
            patch.setattr(f"fedoap.protocol.{module}.is_signed", remembered_check)
        patch.setattr("fedoap.protocol.site.read_plan", lru_cache(64)(read_plan))
        for function in (encode, decode_from_site, decode_from_coordinator):
            patch.setattr(f"simulated.world.{function.__name__}", lru_cache(ENTRIES)(function))
        patch.setattr(Plan, "to_bytes", lru_cache(64)(Plan.to_bytes))
        yield
