"""The chain of round records: any record altered, moved, left out or put in shows."""

import random
from dataclasses import fields, replace

import msgpack
import pytest

from fedoap.chain import NO_RECORD, CheckedLink, Link, RoundRecord, Weighed, check_chain, record_id
from fedoap.errors import ChainError
from fedoap.identity import ROUND_CONTEXT, TASK_CONTEXT, sign, signing_keys

KEYS, OTHER = signing_keys(b"k" * 32), signing_keys(b"o" * 32)


def record(number: int, previous: bytes, federation: str = "demo") -> RoundRecord:
    return RoundRecord(
        federation=federation,
        number=number,
        previous=previous,
        task=bytes([number]) * 32,
        kind="train",
        round=number,
        attempt=1,
        plan=b"p" * 32,
        model=b"m" * 32,
        bank=b"",
        opened=1.0,
        closed=2.5,
        outcome="done",
        reason="",
        rule="mean by uniform, rate 1.0",
        counted=(Weighed("hospital_a", b"a" * 32, 3, 1.0, 2.0), Weighed("hospital_b", b"b" * 32, 4, 1.0, 2.25)),
        left_out=(Weighed("hospital_c", b"c" * 32, 5, 0.0, 2.125),),
        result=b"r" * 32,
        exact=b"",
        software="fedoap 0",
    )


def link(one: RoundRecord, secret: bytes = KEYS.secret, context: bytes = ROUND_CONTEXT) -> Link:
    return Link(one.number, one.pack(), sign(secret, context, one.pack()))


def chain(length: int) -> list[Link]:
    links: list[Link] = []
    for number in range(1, length + 1):
        links.append(link(record(number, record_id(links[-1].packed) if links else NO_RECORD)))
    return links


def check(links: list[Link]) -> list[CheckedLink]:
    return list(check_chain(links, "demo", KEYS.public))


def faults(links: list[Link]) -> dict[int, tuple[str, ...]]:
    return {one.number: one.faults for one in check(links) if one.faults}


def test_a_record_survives_its_bytes() -> None:
    one = record(3, b"x" * 32)

    assert RoundRecord.unpack(one.pack()) == one
    assert one.id == record_id(one.pack())


def test_every_field_is_in_the_bytes() -> None:
    """Planted bug: `pack` without `rule`."""
    packed = msgpack.unpackb(record(1, NO_RECORD).pack())

    assert [name for name in packed if name != "v"] == [field.name for field in fields(RoundRecord)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        record(1, NO_RECORD).pack()[:-1],
        record(1, NO_RECORD).pack() + b"\0",
        msgpack.packb(msgpack.unpackb(record(1, NO_RECORD).pack()) | {"v": 2}),
        msgpack.packb(msgpack.unpackb(record(1, NO_RECORD).pack()) | {"more": 1}),
        msgpack.packb(msgpack.unpackb(record(1, NO_RECORD).pack()) | {"kind": "guess"}),
        msgpack.packb(msgpack.unpackb(record(1, NO_RECORD).pack()) | {"counted": [["a", b"b", 1, 1]]}),
        msgpack.packb(dict(reversed(msgpack.unpackb(record(1, NO_RECORD).pack()).items()))),
    ],
)
def test_what_is_no_record_in_canonical_form_is_refused(data: bytes) -> None:
    """Planted bug: no comparison with the canonical bytes."""
    with pytest.raises(ChainError):
        RoundRecord.unpack(data)


def test_a_sound_chain_has_no_fault() -> None:
    assert faults(chain(5)) == {}
    assert [one.record.round for one in check(chain(3)) if one.record] == [1, 2, 3]


def test_a_record_left_out_shows_at_the_next() -> None:
    links = chain(4)

    assert faults(links[1:]) == {
        2: (
            "record 2 stands where the first should",
            "record 2 does not follow the record before it: their hashes differ",
        )
    }
    assert list(faults([*links[:1], *links[2:]])) == [3]


def test_a_record_renumbered_or_moved_shows() -> None:
    links = chain(4)
    moved = [links[0], replace(links[2], number=2), replace(links[1], number=3), links[3]]

    assert list(faults(moved)) == [2, 3, 4]
    assert "record 2 was signed as record 3" in faults(moved)[2]


def test_a_record_of_another_key_purpose_or_federation_shows() -> None:
    """Planted bug: `check_chain` without the context."""
    one = record(1, NO_RECORD)

    assert faults([link(one, OTHER.secret)]) == {1: ("record 1 is not signed by the federation's key",)}
    assert faults([link(one, context=TASK_CONTEXT)]) == {1: ("record 1 is not signed by the federation's key",)}
    assert faults([link(replace(one, federation="other"))]) == {1: ("record 1 is of federation other, not of demo",)}


def test_any_single_flipped_bit_shows_where_it_is_and_nowhere_else() -> None:
    """Planted bugs: no look at the signature; a link that blames the next one for what was flipped in it."""
    links, rng = chain(3), random.Random(0)
    for _ in range(200):
        at = rng.randrange(3)
        packed, signature = bytearray(links[at].packed), bytearray(links[at].signature)
        target = rng.choice([packed, signature])
        target[rng.randrange(len(target))] ^= 1 << rng.randrange(8)
        flipped = [*links[:at], Link(at + 1, bytes(packed), bytes(signature)), *links[at + 1 :]]

        assert list(faults(flipped)) == [at + 1]


def test_a_record_forged_with_the_key_still_has_to_follow_the_one_before() -> None:
    """Planted bug: no comparison of the hash before."""
    links = chain(3)
    forged = link(replace(record(2, b"z" * 32), result=b"f" * 32))

    assert list(faults([links[0], forged, links[2]])) == [2, 3]
