"""The node's loop against a coordinator that misbehaves, over a real connection."""

import hashlib
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from door import SERVER, SITE, Door
from fedoap.config import DataConfig, NetworkConfig, Plan, SiteConfig, SiteData, WorkerConfig
from fedoap.identity import TASK_CONTEXT, sign, signing_keys
from fedoap.manifests import TaskManifest
from fedoap.messages import (
    PROTOCOL_VERSION,
    Challenge,
    FromCoordinator,
    Go,
    Offer,
    Task,
    Welcome,
    decode_from_site,
    encode,
)
from fedoap.seal import public_half
from fedoap.sitefolder import SiteFolder
from fedoap_node.daemon import Node
from fedoap_node.journal import Journal
from fedoap_node.membership import Membership
from fedoap_node.state import SiteState, lock_state

FEDERATION, SIGNING = signing_keys(b"f" * 32), signing_keys(b"s" * 32)
PLAN = Plan(federation="f", network=NetworkConfig(width=4, depth=1), data=DataConfig(size=(8, 8)))
CHUNKS = 5
WORKER = f"""
import json, sys
from pathlib import Path
import numpy as np
from fedoap.tensors import write_blob
output = Path(sys.argv[1]).parent
blob = write_blob(output / "update.blob", {{"w": np.zeros({CHUNKS} << 18, np.float32)}})
(output / "update.manifest").write_bytes(blob.pack())
(output / "result.json").write_text(json.dumps({{"cases": 1, "metrics": {{}}}}))
"""


class Coordinator:
    """Says what a test wants, and hears only what it asks for."""

    def __init__(self, door: Door, node: Node) -> None:
        self._door, self._node = door, node
        self._route = b""

    def hear(self, kind: type) -> object:
        """Return the site's next message of this type; the node goes on meanwhile."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            self._node._turn()
            while self._door.socket.poll(0):
                self._route, header, body = self._door.socket.recv_multipart()
                message = decode_from_site(header, len(body))
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} came")

    def say(self, message: FromCoordinator, body: bytes = b"") -> None:
        self._door.socket.send_multipart([self._route, encode(message), body])


@pytest.fixture
def door() -> Iterator[Door]:
    with zmq.Context() as context, Door(context) as made:
        yield made


@pytest.fixture
def node(door: Door, tmp_path: Path) -> Iterator[Node]:
    folder = SiteFolder(tmp_path / "hospital_a")
    keys = (SERVER.public, FEDERATION.public, SITE, SIGNING)
    config = SiteConfig(
        data=SiteData(datalist=tmp_path / "list.json"), worker=WorkerConfig(command=(sys.executable, "-c", WORKER))
    )
    state, journal = SiteState(folder, lock_state(folder)), Journal(folder.log, "hospital_a", io.StringIO())
    made = Node(Membership("f", "hospital_a", door.endpoint, *keys), state, config, journal)
    yield made
    made._close()
    journal.close()


def test_a_coordinator_that_asks_without_taking_does_not_fill_the_node_s_memory(door: Door, node: Node) -> None:
    """Planted bug: every answer heard, whatever waits to be sent because of those before."""
    coordinator = Coordinator(door, node)
    coordinator.hear(object)
    coordinator.say(Challenge(PROTOCOL_VERSION, "door", bytes(32)))
    coordinator.hear(object)
    coordinator.say(Welcome("hospital_a", PLAN.digest), PLAN.to_bytes())
    task = TaskManifest("f", PLAN.digest, "init", 0, 1, ("hospital_a",), 60, seal_key=public_half(b"k" * 32))
    packed = task.pack()
    coordinator.say(Task(hashlib.sha256(packed).digest(), sign(FEDERATION.secret, TASK_CONTEXT, packed)), packed)
    offer = coordinator.hear(Offer)
    assert isinstance(offer, Offer)

    most, until = 0, time.monotonic() + 3
    while time.monotonic() < until:
        for _ in range(16):
            coordinator.say(Go(offer.upload, 0, CHUNKS << 20))
        node._turn()
        most = max(most, len(node._outbox))

    assert CHUNKS < most < 256 + 16 * CHUNKS
