"""Who is who: signatures and the roster.

A federation has one Ed25519 key, a site has an Ed25519 key to sign with and a CURVE (X25519) key to
encrypt with; private keys never leave the machine that made them. Every signature is made over a
context and the payload, so that bytes signed for one purpose can never serve another.
"""

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

TASK_CONTEXT = b"fedoap/1 task\0"
UPLOAD_CONTEXT = b"fedoap/1 upload\0"
HELLO_CONTEXT = b"fedoap/1 hello\0"
ENROL_CONTEXT = b"fedoap/1 enrol\0"
CERTIFICATE_CONTEXT = b"fedoap/1 certificate\0"


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
