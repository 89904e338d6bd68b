"""Uploads of real daemons that are killed in the middle: how many bytes travel twice."""

import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from fedoap.pace import MOST_CHUNKS
from fedoap.transfer import CHECKPOINT_CHUNKS

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow
MIB = 1 << 20
ROWS = 33_000
"""126 MiB of first weights, which one site makes and sends."""


def durable(federation: "Federation") -> int:
    """How far the upload under way is on record at the coordinator."""
    with closing(sqlite3.connect(f"file:{federation.root}/state/fed.sqlite?mode=ro", uri=True, timeout=10)) as ledger:
        return max((at for (at,) in ledger.execute("select at from parts")), default=0)


def stop_in_mid_upload(federation: "Federation", site: str) -> int:
    """Freeze a node once its upload was made durable twice, and return how far it is on record."""
    deadline = time.monotonic() + 120
    while durable(federation) < 2 * CHECKPOINT_CHUNKS * MIB:
        assert time.monotonic() < deadline, federation.said("coordinator")
        time.sleep(0.002)
    federation.processes[site].send_signal(signal.SIGSTOP)
    at = durable(federation)
    assert at, "the upload was over before the node could be stopped"
    return at


def begun(federate: "Callable[..., Federation]") -> tuple["Federation", str, Callable[[], None]]:
    """A federation whose first weights are made but held, the site that made them, and what lets them go."""
    federation = federate(rounds=1, environment={"FEDOAP_TEST_ROWS": str(ROWS)})
    held = [federation.hold(site, "init", 0) for site in federation.sites]
    for site in federation.sites:
        federation.hold(site, "train", 1)
    federation.start_coordinator()
    for site in federation.sites:
        federation.start_node(site)
    opened = federation.wait_for("coordinator", "task_opened", kind="init")
    assert opened["attempt"] == 1

    def let_go() -> None:
        for path in held:
            path.unlink()

    return federation, federation.sites[0], let_go


def test_a_coordinator_killed_in_mid_upload_costs_a_window_and_a_checkpoint_at_most(
    federate: "Callable[..., Federation]",
) -> None:
    """Planted bug: uploads that are under way forgotten at the start."""
    federation, site, let_go = begun(federate)

    let_go()
    at = stop_in_mid_upload(federation, site)
    federation.kill("coordinator")
    federation.processes[site].send_signal(signal.SIGCONT)
    before = len(federation.log("coordinator"))
    federation.start_coordinator()
    resumed = federation.wait_for("coordinator", "upload_resumed", after=before, site=site)
    committed = federation.wait_for("coordinator", "site_committed", after=before, site=site, kind="init")
    sent = federation.wait_for(site, "result_committed", kind="init")["sent"]

    assert int(resumed["at"]) >= at
    assert int(committed["bytes"]) <= int(sent) <= int(committed["bytes"]) + (MOST_CHUNKS + CHECKPOINT_CHUNKS) * MIB
    assert federation.trained(site) == ["init 0"]


def test_a_node_killed_in_mid_upload_goes_on_with_the_very_same_upload(federate: "Callable[..., Federation]") -> None:
    """Planted bug: a fresh seal at each start, which makes another upload of the same result."""
    federation, site, let_go = begun(federate)

    let_go()
    at = stop_in_mid_upload(federation, site)
    federation.kill(site)
    before = len(federation.log(site))
    federation.start_node(site)
    committed = federation.wait_for("coordinator", "site_committed", site=site, kind="init")
    sent = federation.wait_for(site, "result_committed", after=before, kind="init")["sent"]

    assert int(sent) <= int(committed["bytes"]) - at
    assert federation.trained(site) == ["init 0"]
