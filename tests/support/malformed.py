"""Messages that no coordinator may accept, made by chance from ones that it would."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace

import msgpack

from fedoap.errors import TensorsError
from fedoap.identity import UPLOAD_CONTEXT, sign
from fedoap.manifests import UploadManifest
from fedoap.messages import Chunk, Failed, Get, Hello, Message, Offer, Progress, Sync, encode

Frames = list[bytes]
HASH = bytes(range(32))
BOMBS = (
    b"\x91" * 4000 + b"\xc0",
    b"\x81\xa1t" + b"\x91" * 4000,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
)
ODD: tuple[object, ...] = (
    None,
    True,
    -1,
    2**63,
    2**64 - 1,
    1.5,
    float("nan"),
    "",
    "x" * 600,
    b"",
    b"x" * 33,
    [],
    {},
    [1],
)
WELL_FORMED: tuple[Message, ...] = (
    Sync(HASH),
    Progress(HASH, "train", 1, 2, 0.5, -1.0),
    Get(HASH, 0, 64),
    Chunk(HASH, 0),
    Failed(HASH, "no"),
    Hello(HASH, HASH + HASH),
    Offer(HASH, HASH + HASH),
)


class Malformed:
    """Makes them; `upload` is what an honest site would offer, `secret` its signing key."""

    def __init__(self, rng: random.Random, upload: UploadManifest, secret: bytes) -> None:
        self._rng, self._upload, self._secret = rng, upload, secret
        self._packed = upload.pack()
        self._forged = [self._offer(body) for body in self._wrong_manifests()]
        cheap = (
            self._noise,
            self._cut_short,
            self._garbled,
            self._value,
            self._keys,
            self._kind,
            self._frames,
            self._bomb,
        )
        self._kinds: tuple[Callable[[], Frames], ...] = (*cheap * 6, self._body, self._refused, self._forged_offer)

    def one(self) -> Frames:
        """Return the frames of one message."""
        return self._rng.choice(self._kinds)()

    def _noise(self) -> Frames:
        return [b"\xc1" + self._rng.randbytes(self._rng.randrange(60)), b""]

    def _cut_short(self) -> Frames:
        header = encode(self._rng.choice(WELL_FORMED))
        return [header[: self._rng.randrange(len(header))], b""]

    def _garbled(self) -> Frames:
        """Flip bits of a message that stays worthless if it stays well-formed: it is about an upload of nobody's."""
        header = bytearray(encode(Chunk(self._rng.randbytes(32), 0)))
        for _ in range(self._rng.choice((1, 2, 3))):
            header[self._rng.randrange(len(header))] ^= 1 << self._rng.randrange(8)
        return [bytes(header), self._rng.randbytes(8)]

    def _value(self) -> Frames:
        fields = self._fields()
        key = self._rng.choice([key for key in fields if key != "t"])
        return [self._pack({**fields, key: self._rng.choice((None, True, [], {}, [1], -1, 2**63))}), b""]

    def _keys(self) -> Frames:
        fields = self._fields()
        if self._rng.random() < 0.5:
            return [self._pack({**fields, self._rng.choice(("more", "", "T", "upto2")): 1}), b""]
        fields.pop(self._rng.choice([key for key in fields if key != "t"]))
        return [self._pack(fields), b""]

    def _kind(self) -> Frames:
        odd = self._rng.choice((*ODD, "commit", "CHUNK", "welcome", b"sync"))
        return [self._pack({**self._fields(), "t": odd}), b""]

    def _frames(self) -> Frames:
        header = encode(self._rng.choice(WELL_FORMED))
        return self._rng.choice(([header], [header, b"", b""], [b"", header, b""], [b"", b"", b"", b""]))

    def _bomb(self) -> Frames:
        return [self._rng.choice(BOMBS), b""]

    def _body(self) -> Frames:
        return [encode(self._rng.choice(WELL_FORMED[:3])), self._rng.randbytes(self._rng.randrange(1, 5000))]

    def _refused(self) -> Frames:
        """Well-formed, and about something that does not exist."""
        message = self._rng.choice(WELL_FORMED[2:])
        return [encode(message), self._rng.randbytes(64) if isinstance(message, Chunk | Offer) else b""]

    def _forged_offer(self) -> Frames:
        return self._rng.choice(self._forged)

    def _wrong_manifests(self) -> list[bytes]:
        upload, packed = self._upload, self._packed
        foreign = [replace(upload, site="hospital_b"), replace(upload, task=HASH)]
        flipped = [packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :] for at in range(1, len(packed), 7)]
        return [packed[: len(packed) // 2], b"", *[one.pack() for one in foreign], *filter(_is_none, flipped)]

    def _offer(self, body: bytes) -> Frames:
        """Well signed by the site, so that what is signed must be looked at too."""
        honest = sign(self._secret, UPLOAD_CONTEXT, body)
        return [encode(Offer(hashlib.sha256(body).digest(), honest)), body]

    def _fields(self) -> dict[str, object]:
        fields: dict[str, object] = msgpack.unpackb(encode(self._rng.choice(WELL_FORMED)))
        return fields

    def _pack(self, fields: dict[str, object]) -> bytes:
        packed: bytes = msgpack.packb(fields)
        return packed


def _is_none(packed: bytes) -> bool:
    try:
        UploadManifest.unpack(packed)
    except TensorsError:
        return True
    return False
