"""Who is who: keys, signatures, join tokens, certificates and the roster.

A federation has one Ed25519 key, a site has an Ed25519 key to sign with and a CURVE (X25519) key to
encrypt with; private keys never leave the machine that made them. Every signature is made over a
context and the payload, so that bytes signed for one purpose can never serve another. Keys are raw
32 bytes everywhere; ZeroMQ takes them as they are.
"""

import base64
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedoap.errors import IdentityError, StorageError
from fedoap.fields import ENDPOINT_PATTERN, NAME_PATTERN

TASK_CONTEXT = b"fedoap/1 task\0"
UPLOAD_CONTEXT = b"fedoap/1 upload\0"
ROUND_CONTEXT = b"fedoap/1 round\0"
HELLO_CONTEXT = b"fedoap/1 hello\0"
ENROL_CONTEXT = b"fedoap/1 enrol\0"
ROTATE_CONTEXT = b"fedoap/1 rotate\0"
CERTIFICATE_CONTEXT = b"fedoap/1 certificate\0"
TOKEN_CURVE_INFO = b"fedoap/1 token curve key"

KEY_BYTES = 32
SECRET_BYTES = 16
TOKEN_PREFIX = "fedoap1-"  # noqa: S105 - the public mark of every token
_CHECK_BYTES = 6


@dataclass(frozen=True, slots=True)
class Member:
    """A site that enrolled: its name, its public keys (32 bytes each), and whether it was revoked."""

    name: str
    curve_key: bytes
    signing_key: bytes
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Roster:
    """All sites that ever enrolled; the epoch grows with every change."""

    epoch: int
    members: tuple[Member, ...]

    def find(self, name: str) -> Member | None:
        """Return the member of this name, revoked or not."""
        return next((member for member in self.members if member.name == name), None)

    def active(self, name: str) -> Member | None:
        """Return the member of this name unless it is unknown or revoked."""
        member = self.find(name)
        return None if member is None or member.revoked else member


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A public key and its private half, 32 bytes each."""

    public: bytes
    secret: bytes = field(repr=False)


def signing_keys(seed: bytes) -> KeyPair:
    """Return the Ed25519 key pair of 32 random bytes."""
    return KeyPair(Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw(), seed)


def curve_keys(seed: bytes) -> KeyPair:
    """Return the CURVE (X25519) key pair of 32 random bytes."""
    return KeyPair(X25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw(), seed)


def fingerprint(public_key: bytes) -> str:
    """Return 80 bits of a public key's hash, to be compared by eye or over the telephone.

    >>> fingerprint(bytes(32))
    '6668-7aad-f862-bd77-6c8f'
    """
    digest = hashlib.sha256(public_key).hexdigest()
    return "-".join(digest[at : at + 4] for at in range(0, 20, 4))


def sign(private_key: bytes, context: bytes, payload: bytes) -> bytes:
    """Return the Ed25519 signature (64 bytes) of a payload in a context."""
    return Ed25519PrivateKey.from_private_bytes(private_key).sign(context + payload)


def is_signed(public_key: bytes, signature: bytes, context: bytes, payload: bytes) -> bool:
    """Return whether the signature is this key's over this payload in this context."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, context + payload)
    except (InvalidSignature, ValueError):
        return False
    return True


def hello_payload(nonce: bytes, federation: str, site: str, curve_key: bytes, protocol: int) -> bytes:
    """Return what a site signs to prove itself: bound to the challenge, the federation and the connection's key."""
    return b"\0".join([nonce, federation.encode(), site.encode(), curve_key, str(protocol).encode()])


def enrol_payload(federation: str, site: str, token_key: bytes, keys: tuple[bytes, bytes], protocol: int) -> bytes:
    """Return what a new site signs with its new signing key.

    Args:
        federation: the federation's name.
        site: the site's name.
        token_key: public half of `Token.curve_pair`, so that the request serves one invitation only.
        keys: the site's public CURVE and signing keys.
        protocol: `fedoap.messages.PROTOCOL_VERSION`.
    """
    return _pack([federation, site, token_key, *keys, protocol])


def rotate_payload(
    federation: str, site: str, old: tuple[bytes, bytes], new: tuple[bytes, bytes], protocol: int
) -> bytes:
    """Return what a site signs to replace its old public CURVE and signing keys by new ones."""
    return _pack([federation, site, *old, *new, protocol])


@dataclass(frozen=True, slots=True)
class Token:
    """An invitation: where the coordinator is, how to know it, and the secret that lets one site enrol once."""

    federation: str
    site: str
    endpoint: str
    server_key: bytes
    federation_key: bytes
    expires: int
    """Unix time in seconds; the coordinator's clock decides."""
    secret: bytes = field(repr=False)

    def curve_pair(self) -> tuple[bytes, bytes]:
        """Return the public and private CURVE key that the secret stands for."""
        info = TOKEN_CURVE_INFO + self.federation.encode() + b"\0" + self.site.encode()
        seed = HKDF(SHA256(), KEY_BYTES, salt=self.server_key, info=info).derive(self.secret)
        keys = curve_keys(seed)
        return keys.public, keys.secret

    def encode(self) -> str:
        """Return the token as one word."""
        names, keys = [self.federation, self.site, self.endpoint], [self.server_key, self.federation_key]
        body = _pack([*names, *keys, self.expires, self.secret])
        framed = len(body).to_bytes(2, "big") + body
        return TOKEN_PREFIX + base64.urlsafe_b64encode(framed + _check(framed)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return the token that `encode` wrote; white space from a line break in an e-mail does no harm.

        Raises:
            IdentityError: it is no token, one of another version, truncated or altered.
        """
        match _unpack(_token_body("".join(text.split())), "token"):
            case [
                str(federation),
                str(site),
                str(endpoint),
                bytes(server_key),
                bytes(federation_key),
                int(expires),
                bytes(secret),
            ] if (
                len(server_key) == len(federation_key) == KEY_BYTES
                and len(secret) == SECRET_BYTES
                and re.fullmatch(NAME_PATTERN, federation)
                and re.fullmatch(NAME_PATTERN, site)
                and re.fullmatch(ENDPOINT_PATTERN, endpoint)
            ):
                return cls(federation, site, endpoint, server_key, federation_key, expires, secret)
        raise IdentityError("token: its fields are not those of version 1; ask for a new one")


@dataclass(frozen=True, slots=True)
class Certificate:
    """The federation's signed word that a site's keys are these."""

    federation: str
    site: str
    curve_key: bytes
    signing_key: bytes
    signature: bytes

    @classmethod
    def issue(cls, federation_secret: bytes, federation: str, site: str, keys: tuple[bytes, bytes]) -> Self:
        """Return the certificate of a site's public CURVE and signing keys."""
        signature = sign(federation_secret, CERTIFICATE_CONTEXT, _pack([federation, site, *keys]))
        return cls(federation, site, *keys, signature)

    def pack(self) -> bytes:
        """Return the canonical bytes."""
        return _pack([self.federation, self.site, self.curve_key, self.signing_key, self.signature])

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the certificate that `pack` wrote; its signature is not looked at.

        Raises:
            IdentityError: it has another form.
        """
        match _unpack(data, "certificate"):
            case [str(federation), str(site), bytes(curve_key), bytes(signing_key), bytes(signature)]:
                if len(curve_key) == len(signing_key) == KEY_BYTES:
                    return cls(federation, site, curve_key, signing_key, signature)
        raise IdentityError("certificate: its fields are not those of version 1")

    def verify(self, federation_key: bytes) -> None:
        """Return if the federation signed this certificate.

        Raises:
            IdentityError: it did not.
        """
        statement = _pack([self.federation, self.site, self.curve_key, self.signing_key])
        if not is_signed(federation_key, self.signature, CERTIFICATE_CONTEXT, statement):
            raise IdentityError(f"certificate of {self.site}: not signed by the key of federation {self.federation}")


def write_private(path: Path, data: bytes) -> None:
    """Write a private key so that only its owner can read it; it is whole and durable, or not there.

    Raises:
        StorageError: the disk refused.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StorageError(f"{path}: key cannot be written: {error.strerror}") from None


def read_private(path: Path) -> bytes:
    """Return the private key of 32 bytes that `write_private` wrote.

    Raises:
        IdentityError: it is missing, of another size, or others than its owner may read it.
    """
    try:
        mode, data = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise IdentityError(f"{path}: key cannot be read: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise IdentityError(f"{path}: key has mode {stat.S_IMODE(mode):04o}, but must be its owner's alone: chmod 600")
    if len(data) != KEY_BYTES:
        raise IdentityError(f"{path}: key has {len(data)} bytes, but must have {KEY_BYTES}")
    return data


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable: what was renamed into it stays there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _token_body(word: str) -> bytes:
    if not word.startswith(TOKEN_PREFIX):
        if word.startswith("fedoap") and "-" in word:
            raise IdentityError(f"token: begins with {word.partition('-')[0]}-, but this version reads {TOKEN_PREFIX}")
        raise IdentityError(f"token: begins with {word[:8]!r}, but an invitation begins with {TOKEN_PREFIX}")
    text = word.removeprefix(TOKEN_PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise IdentityError("token: holds a character that no token holds; copy it again")
    whole = text[: len(text) - (len(text) % 4 == 1)]
    framed = base64.urlsafe_b64decode(whole + "=" * (-len(whole) % 4))
    size = int.from_bytes(framed[:2], "big") + 2
    if len(framed) < size + _CHECK_BYTES:
        raise IdentityError(f"token: truncated after {len(text)} characters; copy it again, to its end")
    if framed[size:] != _check(framed[:size]):
        raise IdentityError("token: altered on its way; copy it again")
    return framed[2:size]


def _check(framed: bytes) -> bytes:
    return hashlib.sha256(framed).digest()[:_CHECK_BYTES]


def _pack(values: Sequence[str | bytes | int]) -> bytes:
    return msgpack.packb(list(values), use_bin_type=True)  # type: ignore[no-any-return]


def _unpack(data: bytes, what: str) -> object:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise IdentityError(f"{what}: not msgpack of the allowed form: {type(error).__name__}") from None
