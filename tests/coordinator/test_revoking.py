"""What the ledger remembers of a key that was revoked, once its site has joined anew."""

import hashlib
from pathlib import Path

import pytest

from fedoap.identity import Member, curve_keys, signing_keys
from fedoap.protocol.events import RecordOpened
from fedoap_coordinator.ledger import Ledger
from tests.coordinator.conftest import EXCHANGE, Maker, open_store


def member(seed: bytes) -> Member:
    return Member("hospital_a", curve_keys(seed * 32).public, signing_keys(seed * 32).public)


@pytest.mark.parametrize(("revoked", "sits_out"), [(0.5, frozenset()), (2.0, frozenset({"hospital_a"}))])
def test_a_site_sits_out_the_exchange_in_which_its_key_was_revoked_though_it_has_joined_anew(
    state: Path, ledger: Ledger, make: Maker, revoked: float, sits_out: frozenset[str]
) -> None:
    """The exchange opens at 1.0. Planted bug: the revocation is forgotten with the member's row."""
    store = open_store(ledger, state)
    ledger.add_invite(b"1" * 32, "hospital_a", 0.0, 9)
    ledger.enrol(b"1" * 32, member(b"1"), 0.1)
    manifest = make.task("init", 0)
    store.apply(RecordOpened(hashlib.sha256(manifest.pack()).digest(), manifest, manifest.pack(), b"s" * 64, EXCHANGE))
    ledger.revoke("hospital_a", revoked)
    ledger.add_invite(b"2" * 32, "hospital_a", 2.5, 9)
    ledger.enrol(b"2" * 32, member(b"2"), 3.0)

    history = store.history()
    store.blobs.close()

    assert history.open is not None
    assert history.open.revoked == sits_out
    assert ledger.roster().active("hospital_a") == member(b"2")
