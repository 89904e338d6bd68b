import hashlib
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoap.errors import RefusedError
from fedoap.manifests import ITEM_BYTES, BlobManifest, Dtype, TensorSpec
from fedoap.transfer import TAIL_BYTES, Admission, Fetcher, FiniteScan, Receiver, Sender

CHUNK = 8
ONES: dict[Dtype, bytes] = {"float32": b"\0\0\x80\x3f", "bfloat16": b"\x80\x3f", "int64": b"\xff" * 8}
"""One number of each dtype; an integer of ones would be NaN if it were taken for a float."""
NOT_FINITE: dict[Dtype, list[bytes]] = {
    "float32": [b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\1\0\x80\x7f", b"\0\0\xc0\x7f"],
    "bfloat16": [b"\x80\x7f", b"\x80\xff", b"\x81\x7f", b"\xc0\x7f"],
}


def _blob(specs: list[TensorSpec], raw: bytes, chunk: int = CHUNK) -> BlobManifest:
    hashes = b"".join(hashlib.sha256(raw[at : at + chunk]).digest() for at in range(0, len(raw), chunk))
    return BlobManifest(tuple(specs), hashes, chunk)


def _floats(count: int) -> tuple[BlobManifest, bytes]:
    raw = np.arange(count, dtype=np.float32).tobytes()
    return _blob([TensorSpec("weight", "float32", (count,))], raw), raw


def _take(receiver: Receiver, raw: bytes, at: int) -> str:
    return receiver.take(at, memoryview(raw)[at : at + CHUNK], 0.0)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[TensorSpec], int]:
    """Tensors of all dtypes and sizes, none included, and a chunk size that their elements straddle."""
    rows = draw(st.lists(st.tuples(st.sampled_from(sorted(ONES)), st.integers(0, 9)), min_size=1, max_size=6))
    specs = [TensorSpec(f"t{index}", dtype, (count,)) for index, (dtype, count) in enumerate(rows)]
    return specs, draw(st.integers(8, 19))


@given(tables(), st.data())
def test_a_number_that_is_not_finite_is_found_wherever_it_lies(
    table: tuple[list[TensorSpec], int], data: st.DataObject
) -> None:
    """Planted bugs: a carry that is dropped at a chunk's end; runs of two dtypes joined."""
    specs, chunk = table
    raw = bytearray(b"".join(ONES[spec.dtype] * spec.shape[0] for spec in specs))
    floats = [spec for spec in specs if spec.dtype != "int64" and spec.shape[0]]
    bad = data.draw(st.sampled_from([*floats, None]))
    if bad is not None:
        start = next(at for spec, at in _blob(specs, b"").offsets() if spec == bad)
        item = ITEM_BYTES[bad.dtype]
        at = start + item * data.draw(st.integers(0, bad.shape[0] - 1))
        raw[at : at + item] = data.draw(st.sampled_from(NOT_FINITE[bad.dtype]))
    scan, view = FiniteScan(_blob(specs, bytes(raw), chunk)), memoryview(raw)

    found = [scan.first_bad(at, view[at : at + chunk]) for at in range(0, len(raw), chunk)]

    assert [name for name in found if name] == ([bad.name] if bad else [])


@given(tables(), st.data())
def test_a_number_that_straddles_the_point_where_a_receiver_goes_on_is_still_looked_at(
    table: tuple[list[TensorSpec], int], data: st.DataObject
) -> None:
    """Planted bugs: a carry that starts empty; one counted from the start of the blob instead of its run's."""
    specs, chunk = table
    raw = bytearray(b"".join(ONES[spec.dtype] * spec.shape[0] for spec in specs))
    at = chunk * data.draw(st.integers(0, len(raw) // chunk))
    floats = [
        (spec, place)
        for spec, start in _blob(specs, b"").offsets()
        if spec.dtype != "int64"
        for place in range(start, start + spec.size, ITEM_BYTES[spec.dtype])
        if place + ITEM_BYTES[spec.dtype] > at
    ]
    bad = data.draw(st.sampled_from([*floats, None]))
    if bad is not None:
        raw[bad[1] : bad[1] + ITEM_BYTES[bad[0].dtype]] = data.draw(st.sampled_from(NOT_FINITE[bad[0].dtype]))
    view = memoryview(raw)
    scan = FiniteScan(_blob(specs, bytes(raw), chunk), at, bytes(raw[max(0, at - TAIL_BYTES) : at]))

    found = [scan.first_bad(start, view[start : start + chunk]) for start in range(at, len(raw), chunk)]

    assert [name for name in found if name] == ([bad[0].name] if bad else [])


def test_a_receiver_that_goes_on_wants_the_byte_at_which_it_stood() -> None:
    blob, raw = _floats(6)
    receiver = Receiver(blob, at=8, tail=raw[1:8])
    receiver.grant(0.0)

    taken = [_take(receiver, raw, at) for at in (0, 16, 8, 16)]

    assert taken == ["repeated", "gap", "new", "new"]
    assert receiver.is_complete


def test_of_two_bad_tensors_the_first_is_named() -> None:
    specs = [TensorSpec("a", "float32", (2,)), TensorSpec("b", "float32", (2,))]
    raw = np.array([1, np.nan, np.inf, 1], np.float32).tobytes()

    assert FiniteScan(_blob(specs, raw, 16)).first_bad(0, memoryview(raw)) == "a"


def test_chunks_in_order_are_taken_until_the_blob_is_complete() -> None:
    blob, raw = _floats(5)
    receiver = Receiver(blob)
    receiver.grant(0.0)

    taken = [_take(receiver, raw, at) for at in range(0, len(raw), CHUNK)]

    assert taken == ["new", "new", "new"]
    assert receiver.is_complete


def test_a_repeated_chunk_and_one_after_a_gap_change_nothing() -> None:
    blob, raw = _floats(8)
    receiver = Receiver(blob)
    receiver.grant(0.0)
    _take(receiver, raw, 0)

    assert (_take(receiver, raw, 0), _take(receiver, raw, 16), receiver.at) == ("repeated", "gap", 8)


Spoil = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (lambda raw: b"\1" + raw[1:], "corrupt", "chunk at byte 0 does not have the hash that the manifest names"),
        (lambda raw: raw[:7], "malformed", "chunk at byte 0 has 7 bytes, but must have 8"),
        (lambda raw: raw + b"\0", "malformed", "chunk at byte 0 has 9 bytes, but must have 8"),
        (lambda raw: raw[:0], "malformed", "chunk at byte 0 has 0 bytes, but must have 8"),
    ],
)
def test_a_chunk_that_is_not_what_the_manifest_says_is_refused(spoil: Spoil, code: str, reason: str) -> None:
    blob, raw = _floats(8)
    receiver = Receiver(blob)
    receiver.grant(0.0)

    with pytest.raises(RefusedError, match=reason) as caught:
        receiver.take(0, memoryview(spoil(raw[:8])), 0.0)

    assert (caught.value.code, receiver.at) == (code, 0)
    assert _take(receiver, raw, 0) == "new"


def test_a_chunk_beyond_the_credit_is_refused() -> None:
    blob, raw = _floats(8)
    receiver = Receiver(blob, window_chunks=2)

    with pytest.raises(RefusedError, match="chunk at byte 0 lies beyond the credit, which ends at 0"):
        _take(receiver, raw, 0)
    assert receiver.grant(0.0) == 16


def test_credit_that_was_withdrawn_is_gone_until_it_is_granted_again() -> None:
    blob, raw = _floats(8)
    receiver = Receiver(blob)
    receiver.grant(0.0)
    receiver.withdraw()

    with pytest.raises(RefusedError, match="beyond the credit"):
        _take(receiver, raw, 0)
    receiver.grant(0.0)
    assert _take(receiver, raw, 0) == "new"


def test_an_empty_blob_is_complete_from_the_start() -> None:
    blob = _blob([TensorSpec("nothing", "float32", (0,))], b"")

    assert Receiver(blob).is_complete
    assert Fetcher(blob, 0.0).ask(0.0) == []
    assert Sender(blob).go(0, 0) == []


def test_a_sender_says_nothing_before_it_is_told_to_go() -> None:
    blob, _ = _floats(8)

    assert Sender(blob).credit(32) == []


@pytest.mark.parametrize(("at", "upto"), [(3, 8), (8, 0), (0, 33), (40, 40)])
def test_a_sender_does_not_go_where_there_is_nothing_to_send(at: int, upto: int) -> None:
    blob, _ = _floats(8)

    assert Sender(blob).go(at, upto) == []


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(-1, 6), st.integers(0, 48)), max_size=12))
def test_a_sender_never_goes_beyond_its_credit(count: int, words: list[tuple[bool, int, int]]) -> None:
    """Planted bug: `credit` that adds to the credit instead of setting where it ends."""
    blob, raw = _floats(count)
    sender, most = Sender(blob), 0

    for is_go, chunk, upto in words:
        ranges = sender.go(chunk * CHUNK, upto) if is_go else sender.credit(upto)
        most = max(most, upto)
        assert all(at % CHUNK == 0 and at < most and at + size <= len(raw) for at, size in ranges)


def test_a_fetcher_keeps_a_window_under_way_and_no_more() -> None:
    blob, raw = _floats(24)
    fetcher = Fetcher(blob, 0.0, window_chunks=4)

    assert fetcher.ask(0.0) == [(0, 16), (16, 32)]
    fetcher.take(0, memoryview(raw)[:8], 0.0)
    assert fetcher.ask(0.0) == []
    fetcher.take(8, memoryview(raw)[8:16], 0.0)
    assert fetcher.ask(0.0) == [(32, 48)]


def test_a_fetcher_that_hears_nothing_asks_again_from_the_first_missing_byte_with_growing_patience() -> None:
    blob, raw = _floats(24)
    fetcher = Fetcher(blob, 0.0, window_chunks=4)
    fetcher.ask(0.0)
    fetcher.take(0, memoryview(raw)[:8], 1.0)

    asked = []
    for now in range(2, 100):
        fetcher.restart_if_quiet(float(now))
        asked += [(now, at) for at, _ in fetcher.ask(float(now))[:1]]

    assert asked == [(11, 8), (31, 8), (71, 8)]


def test_a_gap_is_asked_for_at_once_and_only_once() -> None:
    blob, raw = _floats(24)
    fetcher = Fetcher(blob, 0.0, window_chunks=4)
    fetcher.ask(0.0)

    assert not fetcher.take(8, memoryview(raw)[8:16], 0.0)
    assert fetcher.ask(0.0) == [(0, 16), (16, 32)]
    assert not fetcher.take(16, memoryview(raw)[16:24], 0.0)
    assert fetcher.ask(0.0) == []


@given(st.integers(0, 60), st.integers(1, 6), st.integers(0, 2**32).map(random.Random))
def test_a_download_over_a_network_that_loses_and_repeats_is_complete_and_right(
    count: int, window: int, chance: random.Random
) -> None:
    """Planted bug: `restart` that starts after the gap."""
    blob, raw = _floats(count)
    fetcher, got, now = Fetcher(blob, 0.0, window_chunks=window), bytearray(len(raw)), 0.0
    coming: list[int] = []

    while not fetcher.is_complete:
        now += 1.0
        fetcher.restart_if_quiet(now)
        coming += [at for start, stop in fetcher.ask(now) for at in range(start, stop, CHUNK)]
        if coming and chance.random() < 0.8:
            at = coming.pop(0) if chance.random() < 0.9 else coming[0]
            if chance.random() < 0.9 and fetcher.take(at, memoryview(raw)[at : at + CHUNK], now):
                got[at : at + CHUNK] = raw[at : at + CHUNK]
        assert now < 100_000

    assert bytes(got) == raw


def test_the_first_two_upload_and_the_third_follows_when_one_is_done() -> None:
    admission = Admission(2)

    assert [admission.enter(site) for site in "abc"] == [True, True, False]
    assert admission.crowded
    assert admission.leave("a") == ["c"]
    assert admission.leave("b") == []
    assert admission.enter("c")


def test_one_that_waits_may_leave_without_a_change_for_the_others() -> None:
    admission = Admission(1)
    for site in "abc":
        admission.enter(site)

    assert admission.leave("b") == []
    assert admission.leave("a") == ["c"]
