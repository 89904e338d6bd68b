"""A site that a test speaks for: it joins a real coordinator with a real site's keys, then says what it is told."""

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import zmq

from fedoap.identity import HELLO_CONTEXT, UPLOAD_CONTEXT, hello_payload, sign
from fedoap.manifests import TaskManifest, UploadManifest
from fedoap.messages import (
    PROTOCOL_VERSION,
    Challenge,
    Chunk,
    Commit,
    Credit,
    FromCoordinator,
    FromSite,
    Go,
    Hello,
    Offer,
    Open,
    Sync,
    Task,
    Welcome,
    decode_from_coordinator,
    encode,
)
from fedoap.seal import Seal
from fedoap.sitefolder import SiteFolder
from fedoap_node.membership import Membership

SEAL_SECRET = b"s" * 32
PATIENCE_MILLISECONDS = 20_000


@dataclass
class ScriptedSite:
    """One connection; `folder` is the site's, as joining left it."""

    context: "zmq.Context[zmq.Socket[bytes]]"
    folder: Path
    member: Membership = field(init=False)
    socket: "zmq.Socket[bytes]" = field(init=False)
    exchange: bytes = field(init=False, default=b"")
    """Public key of the exchange whose task came last."""

    def __post_init__(self) -> None:
        self.member = Membership.read(SiteFolder(self.folder))
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.curve_serverkey = self.member.server_key
        self.socket.curve_publickey, self.socket.curve_secretkey = self.member.curve.public, self.member.curve.secret
        self.socket.connect(self.member.endpoint)

    def say(self, message: FromSite, body: bytes = b"") -> None:
        self.socket.send_multipart([encode(message), body])

    def hear(self) -> tuple[FromCoordinator, bytes]:
        assert self.socket.poll(PATIENCE_MILLISECONDS), "the coordinator says nothing"
        header, body = self.socket.recv_multipart()
        return decode_from_coordinator(header, len(body)), body

    def join(self) -> None:
        """Say hello and be welcome."""
        self.say(Open(PROTOCOL_VERSION, "scripted site"))
        challenge, _ = self.hear()
        assert isinstance(challenge, Challenge)
        member = self.member
        said = hello_payload(challenge.nonce, member.federation, member.site, member.curve.public, PROTOCOL_VERSION)
        self.say(Hello(challenge.nonce, sign(member.signing.secret, HELLO_CONTEXT, said)))
        welcome, _ = self.hear()
        assert isinstance(welcome, Welcome)

    def await_task(self) -> bytes:
        """Return the packed manifest of the task that is due."""
        until = time.monotonic() + PATIENCE_MILLISECONDS / 1000
        while time.monotonic() < until:
            self.say(Sync(b""))
            answer, body = self.hear()
            time.sleep(0.1)
            if isinstance(answer, Task):
                self.drain()  # it is told without being asked, too
                self.exchange = TaskManifest.unpack(body).seal_key
                return body
        raise AssertionError("no task is due")

    def offer(self, upload: UploadManifest) -> tuple[Offer, bytes]:
        body = upload.pack()
        signature = sign(self.member.signing.secret, UPLOAD_CONTEXT, body)
        return Offer(hashlib.sha256(body).digest(), signature), body

    def upload(self, upload: UploadManifest, raw: bytes) -> None:
        """Return once the coordinator holds an honest upload for good."""
        offer, body = self.offer(upload)
        seal = Seal.of_site(upload, SEAL_SECRET, self.exchange)
        self.say(offer, body)
        at = 0
        while True:
            answer, _ = self.hear()
            match answer:
                case Commit(offer.upload):
                    return
                case Go(offer.upload):
                    at = answer.at
                case Credit(offer.upload):
                    pass
                case _:
                    continue  # an answer to what was said before
            while at < answer.upto:
                size, _ = upload.blob.chunk(at)
                self.say(Chunk(offer.upload, at), seal.close(at, raw[at : at + size]))
                at += size

    def drain(self) -> list[tuple[FromCoordinator, bytes]]:
        """Return what has come, without waiting."""
        heard = []
        while self.socket.poll(0):
            header, body = self.socket.recv_multipart()
            heard.append((decode_from_coordinator(header, len(body)), body))
        return heard

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
