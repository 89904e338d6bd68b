"""Daemons that are killed at any time, over and over: the weights are those of a run that nobody disturbed.

`FEDOAP_KILLS=1000 pytest -s tests/end_to_end/test_killing.py` kills more often; `FEDOAP_KILLS_SEED` says when and whom.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedoap_coordinator.folder import LEDGER
from fedoap_coordinator.ledger import Ledger

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]
KILLS = int(os.environ.get("FEDOAP_KILLS", "30"))
SEED = int(os.environ.get("FEDOAP_KILLS_SEED", "1"))
ROUNDS = 12
LONGEST_PAUSE_SECONDS = 1.2
ROUGH = {"FEDOAP_TEST_ROUGH": "1", "FEDOAP_TEST_ROWS": "2000"}
"""Numbers that round, and 8 MB of them, so that a kill finds uploads under way."""
Weights = dict[str, bytes]
Make = Callable[[], "Federation"]


@pytest.fixture
def make(federation_type: "type[Federation]", tmp_path: Path) -> Iterator[Make]:
    """Make federations that all sites have joined; at most one is there at a time."""
    made: list[Federation] = []

    def build() -> "Federation":
        federation = federation_type(tmp_path / f"{len(made)}", rounds=ROUNDS, silence=300.0, environment=ROUGH)
        made.append(federation)
        federation.join_all()
        return federation

    yield build
    for one in made:
        one.close()


def test_killed_daemons_lose_nothing_and_end_with_the_weights_of_a_quiet_run(make: Make) -> None:
    """Planted bugs: an exchange's end and its counts recorded apart; each update replayed twice at a start."""
    rng, kills, runs, began = random.Random(SEED), {"coordinator": 0, "node": 0}, 0, time.monotonic()
    quiet = weights(run_to_the_end(make()))

    while sum(kills.values()) < KILLS:
        shaken = make()
        shake(shaken, rng, kills)
        run_to_the_end(shaken)
        runs += 1
        assert weights(shaken) == quiet
        check_books(shaken)

    sys.stdout.write(
        f"\nkills: {kills['coordinator']} of the coordinator, {kills['node']} of nodes, in {runs} runs of {ROUNDS} "
        f"rounds, {time.monotonic() - began:.0f} s: 0 updates lost, 0 counted twice, weights bit-identical\n"
    )


def shake(federation: "Federation", rng: random.Random, kills: dict[str, int]) -> None:
    """Kill a daemon every now and then, and start it again, until there was enough of it or the run is over."""
    start_all(federation)
    while sum(kills.values()) < KILLS and not has_finished(federation):
        wait_a_while(federation, rng)
        victim = rng.choice(("coordinator", rng.choice(federation.sites)))
        if federation.processes[victim].poll() is not None:
            return
        federation.kill(victim)
        kills["coordinator" if victim == "coordinator" else "node"] += 1
        time.sleep(rng.choice((0.0, rng.random())))
        start(federation, victim)


def wait_a_while(federation: "Federation", rng: random.Random) -> None:
    """Let some time pass; every other time until shortly after something happened at the coordinator."""
    deadline = time.monotonic() + rng.random() * LONGEST_PAUSE_SECONDS
    so_far, waits_for_news = len(federation.log("coordinator")), rng.random() < 0.5
    while time.monotonic() < deadline and not (waits_for_news and len(federation.log("coordinator")) > so_far):
        time.sleep(0.005)
    if waits_for_news:
        time.sleep(0.8 * rng.random() ** 2)


def run_to_the_end(federation: "Federation") -> "Federation":
    """Let a federation end, and return it."""
    if not federation.processes:
        start_all(federation)
    codes = [federation.ended(site) for site in federation.sites]
    assert codes == [0] * len(codes), [federation.said(site) for site in federation.sites]
    assert federation.stop("coordinator") == 0
    return federation


def start_all(federation: "Federation") -> None:
    for name in ("coordinator", *federation.sites):
        start(federation, name)


def start(federation: "Federation", name: str) -> None:
    """Start a daemon; the coordinator stays until it is told to go, as a node may be down when all is done."""
    if name == "coordinator":
        federation.start_coordinator()
    else:
        federation.start_node(name, "--exit-when-finished")


def has_finished(federation: "Federation") -> bool:
    return any(row["event"] == "finished" for row in federation.log("coordinator"))


def weights(federation: "Federation") -> Weights:
    return {name: values.tobytes() for name, values in federation.weights().items()}


def check_books(federation: "Federation") -> None:
    """Each result that a site was told is kept has counted once, in an exchange of its own."""
    said = {
        (row["kind"], row["round"], row["site"])
        for row in federation.log("coordinator")
        if row["event"] == "site_committed"
    }
    with Ledger(federation.root / "state" / LEDGER, "trial") as ledger:
        done = ledger.tasks()
        rows = [(task.manifest.kind, task.manifest.round, row) for task in done for row in ledger.updates(task.task)]
    assert {task.outcome for task in done} == {"done"}, [task.reason for task in done]
    counted = [(kind, number, row.site) for kind, number, row in rows if row.counted]
    assert len(done) == ROUNDS + 2
    assert len(counted) == len(set(counted)) == 3 * (ROUNDS + 1) + 1
    assert said <= set(counted)
