import contextlib
import dataclasses
import struct
from typing import Literal, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoap.bounds import Length, Range
from fedoap.errors import MessageError
from fedoap.messages import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    Bye,
    Chunk,
    Credit,
    Failed,
    FromCoordinator,
    FromSite,
    Message,
    Open,
    Progress,
    Sync,
    decode_from_coordinator,
    decode_from_site,
    encode,
)

FROM_SITE: tuple[type[Message], ...] = get_args(FromSite)
FROM_COORDINATOR: tuple[type[Message], ...] = get_args(FromCoordinator)
HASH = bytes(range(32))
PRINTABLE = st.characters(categories=["L", "M", "N", "P", "S"], include_characters=" ")


def _values(hint: object) -> st.SearchStrategy[object]:
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    kind, bound = get_args(hint)
    match bound:
        case Length(low, high) if kind is bytes:
            return st.binary(min_size=low, max_size=high)
        case Length(low, high):
            return st.text(PRINTABLE, min_size=low, max_size=min(high, 80))
        case Range(low, high) if kind is int:
            return st.integers(int(low), int(high))
        case Range(low, high):
            return st.floats(low, high)
    raise AssertionError(hint)


def _instances(kind: type[Message]) -> st.SearchStrategy[Message]:
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{field.name: _values(hints[field.name]) for field in dataclasses.fields(kind)})


ANY_FROM_SITE = st.one_of([_instances(kind) for kind in FROM_SITE])
ANY_FROM_COORDINATOR = st.one_of([_instances(kind) for kind in FROM_COORDINATOR])


@given(st.text(max_size=40))
def test_any_text_is_said_so_that_it_can_be_printed(reason: str) -> None:
    """Planted bugs: a line break is sent as it is, and refused; a lone surrogate, which no UTF-8 holds, is encoded."""
    said = decode_from_site(encode(Failed(HASH, reason)), 0)

    assert said == Failed(HASH, "".join(letter if letter.isprintable() else " " for letter in reason))


@given(ANY_FROM_SITE)
def test_what_a_site_says_is_understood(message: Message) -> None:
    """Planted bug: `encode` that leaves out the last field."""
    assert decode_from_site(encode(message), 0) == message


@given(ANY_FROM_COORDINATOR)
def test_what_the_coordinator_says_is_understood(message: Message) -> None:
    """Planted bug: `_check` that compares a length with `<` at its upper bound."""
    assert decode_from_coordinator(encode(message), 0) == message


@given(ANY_FROM_SITE, st.data())
def test_a_garbled_header_is_refused_or_still_well_formed(message: Message, data: st.DataObject) -> None:
    """Planted bug: `_unpack` that does not catch `RecursionError` or `UnicodeDecodeError`."""
    header = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    header = header[: data.draw(st.integers(0, len(header)))] if data.draw(st.booleans()) else header

    try:
        decoded = decode_from_site(bytes(header), 0)
    except MessageError:
        return

    assert isinstance(decoded, FROM_SITE)
    assert decode_from_site(encode(decoded), 0) == decoded


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_message_error(header: bytes) -> None:
    """Planted bug: `_decode` that takes a list as a map."""
    for decode in (decode_from_site, decode_from_coordinator):
        with pytest.raises(MessageError):
            decode(header, 0)


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary()
NAMES = sorted({kind.type for kind in (*FROM_SITE, *FROM_COORDINATOR)})
KEYS = sorted({field.name for kind in (*FROM_SITE, *FROM_COORDINATOR) for field in dataclasses.fields(kind)})


@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(KEYS), SCALARS | st.lists(SCALARS, max_size=2)))
def test_a_well_formed_map_with_wrong_values_raises_nothing_but_message_error(name: str, fields: object) -> None:
    """Planted bug: `_check` without the comparison of types, so that a length is asked of a number."""
    assert isinstance(fields, dict)
    header = msgpack.packb({"t": name, **fields})
    for decode in (decode_from_site, decode_from_coordinator):
        with contextlib.suppress(MessageError):
            decode(header, 0)


def _header(**fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (_header(t="shout"), "message type is 'shout', which is not one of"),
        (_header(task=b""), "message type is None"),
        (_header(t=["sync"]), "message type is|not msgpack"),
        (_header(t="sync"), "sync: keys 'task' are missing or unknown"),
        (_header(t="sync", task=b"", more=1), "sync: keys 'more' are missing or unknown"),
        (_header(t="sync", task="text"), "sync.task is a str, but must be a bytes"),
        (_header(t="sync", task=bytes(33)), "sync.task has length 33, but must have 0 to 32"),
        (_header(t="open", protocol=True, software="x"), "open.protocol is a bool, but must be a int"),
        (_header(t="open", protocol=-1, software="x"), "open.protocol is -1, but must lie in 0 to"),
        (
            _header(t="open", protocol=1, software="\x1b[2J"),
            "open.software holds a character that cannot be printed",
        ),
        (_header(t="open", protocol=1, software=""), "open.software has length 0, but must have 1 to 64"),
        (_header(t="get", blob=HASH, at=0, upto=2**48 + 1), "get.upto is 281474976710657, but must lie in"),
        (_header(t="credit", upload=HASH, upto=1), "message type is 'credit', which is not one of"),
        (msgpack.packb([1]), "header is a list|not msgpack"),
        (b"", "not msgpack"),
        (encode(Bye()) + b"\0", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (msgpack.packb(msgpack.Timestamp(1)), "not msgpack"),
    ],
)
def test_a_header_that_is_out_of_form_is_refused_with_its_reason(header: bytes, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        decode_from_site(header, 0)


def test_a_number_that_is_not_finite_is_refused() -> None:
    header = encode(Progress(HASH, "train", 1, 2, float("nan"), -1.0))

    with pytest.raises(MessageError, match=r"progress\.loss is nan, but must lie in"):
        decode_from_site(header, 0)


def test_a_header_that_is_too_long_is_refused_unread() -> None:
    header = encode(Sync(b"")) + bytes(MAX_HEADER_BYTES)

    with pytest.raises(MessageError, match="but at most 4096 are allowed"):
        decode_from_site(header, 0)


def test_a_body_that_is_too_long_is_refused() -> None:
    with pytest.raises(MessageError, match=f"body is {MAX_BODY_BYTES + 1} bytes, but at most {MAX_BODY_BYTES}"):
        decode_from_site(encode(Chunk(HASH, 0)), MAX_BODY_BYTES + 1)


@pytest.mark.parametrize("message", [Open(1, "x"), Sync(b""), Bye()])
def test_a_body_where_none_belongs_is_refused(message: FromSite) -> None:
    with pytest.raises(MessageError, match="body is 1 bytes, but at most 0 are allowed"):
        decode_from_site(encode(message), 1)


def test_each_direction_refuses_the_other_ones_messages() -> None:
    with pytest.raises(MessageError, match="message type is 'credit'"):
        decode_from_site(encode(Credit(HASH, 1)), 0)
    with pytest.raises(MessageError, match="message type is 'bye'"):
        decode_from_coordinator(encode(Bye()), 0)


def test_a_nested_bomb_is_refused() -> None:
    bomb = b"\x81\xa1t" + b"\x91" * 4000

    with pytest.raises(MessageError, match="not msgpack"):
        decode_from_site(bomb, 0)


def test_a_length_that_lies_is_refused() -> None:
    lie = b"\x81\xa1t\xc6" + struct.pack(">I", 2**31)

    with pytest.raises(MessageError, match="not msgpack"):
        decode_from_site(lie, 0)
