"""The doctor and a real coordinator: an enrolled site is welcome, its running node stays, a revoked one is told."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

import fedoap

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow


def examined(federation: "Federation", site: str) -> tuple[int, dict[str, dict[str, Any]]]:
    command = [sys.executable, "-m", "fedoap_node", "doctor", "--json", "--site", site]
    home = str(federation.root / "sites")
    done = subprocess.run([*command, "--home", home], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_the_doctor_lets_a_node_at_work_be_and_tells_a_revoked_site(federate: "Callable[..., Federation]") -> None:
    """Planted bug: a doctor that says hello."""
    federation = federate()
    federation.hold("hospital_a", "init", 0)
    federation.start_coordinator()
    for site in federation.sites:
        federation.start_node(site)
    federation.wait_for("hospital_a", "work_started")

    code, found = examined(federation, "hospital_a")

    assert code == 0, found
    assert f"the coordinator runs fedoap {fedoap.__version__}" in found["welcome"]["text"]
    assert found["clock"]["verdict"] == "ok"
    assert found["node"]["text"] == f"runs, process {federation.processes['hospital_a'].pid}"
    time.sleep(6)  # longer than a site's pause between two questions
    assert federation.processes["hospital_a"].poll() is None, federation.said("hospital_a")
    joined = [row for row in federation.log("coordinator") if row["event"] == "site_joined"]
    assert sorted(str(row["site"]) for row in joined) == list(federation.sites)

    federation.command("revoke", "hospital_b")
    assert federation.ended("hospital_b") == 2
    code, found = examined(federation, "hospital_b")

    assert code == 1
    assert "site hospital_b: not enrolled there, or revoked" in found["key"]["text"]
    for name in list(federation.processes):
        federation.stop(name)
