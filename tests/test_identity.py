"""Keys, tokens, certificates and the files they lie in."""

import stat
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from fedoap.errors import IdentityError, StorageError
from fedoap.identity import (
    CERTIFICATE_CONTEXT,
    HELLO_CONTEXT,
    Certificate,
    Token,
    curve_keys,
    enrol_payload,
    hello_payload,
    is_signed,
    read_private,
    sign,
    signing_keys,
    write_private,
)

FEDERATION = signing_keys(bytes(range(32)))
SITE = signing_keys(b"s" * 32)
CURVE = curve_keys(b"c" * 32)


def token(secret: bytes = b"0123456789abcdef", site: str = "hospital_a") -> Token:
    endpoint = "tcp://fed.example.org:7470"
    return Token("demo", site, endpoint, CURVE.public, FEDERATION.public, 1_900_000_000, secret)


def certificate() -> Certificate:
    return Certificate.issue(FEDERATION.secret, "demo", "hospital_a", (CURVE.public, SITE.public))


def test_a_token_is_one_word_and_reads_back() -> None:
    word = token().encode()

    assert word.startswith("fedoap1-")
    assert len(word.split()) == 1
    assert Token.decode(word) == token()


def test_a_token_that_an_email_broke_into_lines_reads_back() -> None:
    word = token().encode()

    assert Token.decode(f"  {word[:70]}\n{word[70:140]}\r\n{word[140:]}\n") == token()


@given(cut=st.integers(min_value=0, max_value=185))
def test_a_truncated_token_is_called_truncated_wherever_it_is_cut(cut: int) -> None:
    """Planted bug: without the length in front, a cut at a multiple of 4 letters is called altered."""
    word = token().encode()
    body = word.removeprefix("fedoap1-")[: min(cut, len(word) - 9)]

    with pytest.raises(IdentityError, match=r"truncated after \d+ characters"):
        Token.decode("fedoap1-" + body)


@given(at=st.integers(min_value=12, max_value=184), letter=st.sampled_from("ABCxyz019-_"))
def test_a_token_with_one_letter_altered_is_refused(at: int, letter: str) -> None:
    """Planted bug: a checksum of the names alone lets an altered key or secret through."""
    word = token().encode()
    altered = word[:at] + letter + word[at + 1 :]

    if altered != word:
        with pytest.raises(IdentityError):
            Token.decode(altered)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hello", "an invitation begins with fedoap1-"),
        ("", "an invitation begins with fedoap1-"),
        ("fedoap2-AAAA", "begins with fedoap2-, but this version reads fedoap1-"),
        ("fedoap1-AAAA!AAAA", "holds a character that no token holds"),
        (token(site="../../etc").encode(), "fields are not those of version 1"),
    ],
)
def test_what_is_no_token_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(IdentityError, match=reason):
        Token.decode(text)


def test_a_tokens_curve_keys_fit_each_other_and_follow_from_its_secret() -> None:
    public, secret = token().curve_pair()

    assert zmq.curve_public(z85.encode(secret)) == z85.encode(public)
    assert token().curve_pair() == (public, secret)
    assert token(secret=b"another secret !").curve_pair()[0] != public
    assert token(site="hospital_b").curve_pair()[0] != public


def test_no_secret_shows_in_a_representation() -> None:
    shown = repr(token()) + repr(SITE)

    assert repr(token().secret) not in shown
    assert repr(SITE.secret) not in shown


def test_a_signature_serves_one_purpose_one_key_and_one_payload() -> None:
    signature = sign(SITE.secret, HELLO_CONTEXT, b"payload")

    assert is_signed(SITE.public, signature, HELLO_CONTEXT, b"payload")
    assert not is_signed(SITE.public, signature, CERTIFICATE_CONTEXT, b"payload")
    assert not is_signed(FEDERATION.public, signature, HELLO_CONTEXT, b"payload")
    assert not is_signed(SITE.public, signature, HELLO_CONTEXT, b"payloae")
    assert not is_signed(b"no key", signature, HELLO_CONTEXT, b"payload")


def test_what_a_site_signs_is_bound_to_everything_around_it() -> None:
    keys = (CURVE.public, SITE.public)
    enrolments = {
        enrol_payload("demo", "hospital_a", b"t" * 32, keys, 1),
        enrol_payload("demo2", "hospital_a", b"t" * 32, keys, 1),
        enrol_payload("demo", "hospital_b", b"t" * 32, keys, 1),
        enrol_payload("demo", "hospital_a", b"u" * 32, keys, 1),
        enrol_payload("demo", "hospital_a", b"t" * 32, keys[::-1], 1),
        enrol_payload("demo", "hospital_a", b"t" * 32, keys, 2),
    }
    hellos = {hello_payload(b"n" * 32, "demo", site, CURVE.public, 1) for site in ("a", "b")}

    assert len(enrolments) == 6
    assert len(hellos) == 2


def test_a_certificate_reads_back_and_holds_under_the_federations_key() -> None:
    read = Certificate.unpack(certificate().pack())

    assert read == certificate()
    read.verify(FEDERATION.public)


def test_a_certificate_of_another_federation_or_for_other_keys_is_refused() -> None:
    other = Certificate("demo", "hospital_a", SITE.public, CURVE.public, certificate().signature)

    with pytest.raises(IdentityError, match="certificate of hospital_a: not signed"):
        certificate().verify(SITE.public)
    with pytest.raises(IdentityError, match="not signed"):
        other.verify(FEDERATION.public)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", certificate().pack()[:-1], certificate().pack() + b"\0"])
def test_bytes_that_are_no_certificate_are_refused(data: bytes) -> None:
    with pytest.raises(IdentityError, match="certificate: "):
        Certificate.unpack(data)


def test_a_private_key_is_its_owners_alone_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"

    write_private(path, SITE.secret)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_private(path) == SITE.secret
    assert [entry.name for entry in tmp_path.iterdir()] == ["signing.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "signing.key"
    write_private(path, SITE.secret)
    path.chmod(mode)

    with pytest.raises(IdentityError, match=f"mode 0{mode:o}, but must be its owner's alone: chmod 600"):
        read_private(path)


def test_a_key_file_that_is_short_or_missing_is_refused(tmp_path: Path) -> None:
    write_private(tmp_path / "short.key", b"abc")

    with pytest.raises(IdentityError, match="has 3 bytes, but must have 32"):
        read_private(tmp_path / "short.key")
    with pytest.raises(IdentityError, match="No such file"):
        read_private(tmp_path / "none.key")


def test_a_key_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="key cannot be written"):
        write_private(tmp_path / "none" / "signing.key", SITE.secret)

    assert list(tmp_path.iterdir()) == []
