"""Processes that stand still: nobody closes their connections, so only time can tell."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import zmq

from fedoap.sitefolder import SiteFolder
from fedoap_node import link as node_link
from fedoap_node.link import Address, Link, News
from fedoap_node.membership import Membership

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow


@contextmanager
def _dialled(federation: "Federation") -> Iterator[Link]:
    member = Membership.read(SiteFolder(federation.site("hospital_a")))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Link(context, Address(member.endpoint, member.server_key), member.curve)
    try:
        yield link
    finally:
        link.close()
        context.term()


def _await(link: Link, wanted: News) -> None:
    until = time.monotonic() + 30
    while wanted not in list(link.news(time.monotonic())):
        assert time.monotonic() < until, f"never heard of {wanted}"
        link.dial(time.monotonic())
        time.sleep(0.02)


def test_a_frozen_node_is_not_waited_for_and_goes_on_when_it_thaws(federate: "Callable[..., Federation]") -> None:
    """Planted bug: a site that was let in once counts as live for ever."""
    federation = federate(quorum=2, silence=8.0)
    federation.hold("hospital_c", "train", 1)
    second = federation.hold("hospital_a", "train", 2)
    federation.start_all()
    federation.wait_for("hospital_c", "work_started", kind="train", round=1)

    federation.processes["hospital_c"].send_signal(signal.SIGSTOP)
    federation.wait_for("coordinator", "site_silent", site="hospital_c")
    federation.wait_for("coordinator", "task_closed", kind="train", round=1, outcome="done", counted=2)
    federation.processes["hospital_c"].send_signal(signal.SIGCONT)
    (federation.root / "gate" / "hold-hospital_c-train-1").unlink()
    second.unlink()

    federation.finish()
    assert "calibrate 3" in federation.trained("hospital_c")


def test_a_frozen_coordinator_is_given_up_and_dialled_again_until_it_thaws(
    federate: "Callable[..., Federation]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: no heartbeats, so that nobody notices."""
    monkeypatch.setattr(node_link, "HEARTBEAT_MS", node_link.HEARTBEAT_MS // 20)
    monkeypatch.setattr(node_link, "SILENCE_MS", node_link.SILENCE_MS // 20)
    federation = federate()
    federation.start_coordinator()
    with _dialled(federation) as link:
        _await(link, News.UP)

        federation.processes["coordinator"].send_signal(signal.SIGSTOP)
        _await(link, News.DOWN)
        federation.processes["coordinator"].send_signal(signal.SIGCONT)
        _await(link, News.UP)

    assert federation.stop("coordinator") == 0
