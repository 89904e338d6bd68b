"""Somebody fills the coordinator's port with connections: those who are there go on, and others come later."""

import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow

ROOM = 8
"""Descriptors that are left when the flood begins."""
PROVE_WITH_FEW_LEFT = """
import os, resource, sys, zmq
from fedoap.errors import IdentityError
from fedoap.identity import Roster, curve_keys
from fedoap_coordinator.port import Port
from fedoap_coordinator.zap import Doors, Zap

keys = curve_keys(b"c" * 32)
context = zmq.Context()
zap = Zap(context, Doors.of(Roster(0, ()), ()))
zap.start()
port = Port(context, keys, lambda *_: None)
endpoint = port.bind("tcp://127.0.0.1:*", None)
soft = len(os.listdir("/proc/self/fd")) + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[2]))]
zmq.Frame(bytes(100), copy=False)
try:
    zap.prove(endpoint, keys.public)
    print("proved")
except (IdentityError, zmq.ZMQError) as error:
    print("refused:", error)
sys.stdout.flush()
os._exit(0)
"""


@contextmanager
def _flood(port: int) -> Iterator[None]:
    """Hold connections that say nothing, more than the coordinator has descriptors for."""
    with ExitStack() as stack:
        with suppress(ConnectionError):  # refused or reset: the port is shut by then
            for _ in range(10 * ROOM):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 5.0))
        yield


def _fill(federation: "Federation") -> None:
    """Leave the coordinator room for a few connections more."""
    pid = federation.processes["coordinator"].pid
    used = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + ROOM, used + ROOM + 64))


def test_sites_that_are_connected_finish_while_the_port_is_full_and_one_that_returns_gets_in_later(
    federate: "Callable[..., Federation]",
) -> None:
    """Planted bug: nobody at the door, so that the coordinator ends as it can open no blob."""
    federation = federate(rounds=1)
    training = federation.hold("hospital_a", "train", 1)
    the_end = federation.hold("hospital_b", "calibrate", 2)
    federation.start_all()
    federation.wait_for("coordinator", "task_opened", kind="train")
    _fill(federation)

    with _flood(federation.port):
        federation.wait_for("coordinator", "port_full")
        training.unlink()
        federation.wait_for("coordinator", "task_closed", kind="train", outcome="done")
    federation.kill("hospital_b")
    the_end.unlink()
    federation.start_node("hospital_b", "--exit-when-finished")
    federation.finish()

    assert sum(row["event"] == "port_full" for row in federation.log("coordinator")) == 1


@pytest.mark.parametrize("left", range(6))
def test_the_last_descriptors_end_no_start_by_an_abort(left: int) -> None:
    """libzmq aborts (-6) where it finds none for a new context. Planted bug: `prove` makes one of its own."""
    command = [sys.executable, "-c", PROVE_WITH_FEW_LEFT, "40", str(40 - left)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("refused: ", "proved"))
