"""The daemons by themselves: who waits for whom, who is refused, and how each leaves."""

import os
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import pytest
import zmq

from easy_site import write_easy_site
from fedoap.identity import curve_keys, fingerprint
from fedoap.sitefolder import SiteFolder
from fedoap_node.link import Address, Link, News
from fedoap_node.membership import Membership

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow


def last_line(federation: "Federation", name: str) -> str:
    return federation.said(name).splitlines()[-1]


def test_a_node_waits_for_its_coordinator_and_a_second_one_on_the_same_site_is_refused(
    federate: "Callable[..., Federation]",
) -> None:
    federation = federate()
    federation.start_node("hospital_a")
    federation.wait_for("hospital_a", "waiting")
    assert "nobody answers at tcp://127.0.0.1" in federation.said("hospital_a")

    federation.start_coordinator()
    federation.wait_for("hospital_a", "connected")
    federation.wait_for("coordinator", "site_joined", site="hospital_a")

    first = federation.processes.pop("hospital_a")
    federation.start_node("hospital_a")
    assert federation.ended("hospital_a") == 2
    said = f"another node runs on {federation.site('hospital_a')}, process {first.pid}"
    assert said in last_line(federation, "hospital_a")
    federation.processes["hospital_a"] = first
    assert federation.stop("hospital_a") == 0
    assert federation.stop("coordinator") == 0


def test_a_node_asked_to_end_ends_its_worker_and_says_goodbye(federate: "Callable[..., Federation]") -> None:
    federation = federate()
    federation.hold("hospital_a", "init", 0)
    federation.start_all()
    federation.wait_for("hospital_a", "work_started", kind="init")
    workers = psutil.Process(federation.processes["hospital_a"].pid).children(recursive=True)

    began = time.monotonic()
    assert federation.stop("hospital_a") == 0

    assert time.monotonic() - began < 5
    assert workers
    assert not [worker for worker in workers if worker.is_running()]
    assert federation.stop("coordinator") == 0


def test_an_unknown_key_is_refused_and_both_sides_say_so(federate: "Callable[..., Federation]") -> None:
    federation = federate()
    federation.start_coordinator()
    member = Membership.read(SiteFolder(federation.site("hospital_a")))
    with zmq.Context() as context:
        link = Link(context, Address(member.endpoint, member.server_key), curve_keys(bytes(range(32))))
        heard = list[News]()
        while News.KEY_REFUSED not in heard:
            link.monitor.poll(5000)
            heard += link.news(time.monotonic())
        link.close()
    said = federation.wait_for("coordinator", "refused", code="unknown_site")
    assert said["reason"] == f"key {fingerprint(curve_keys(bytes(range(32))).public)} is not enrolled"

    (federation.site("hospital_a") / "identity/curve.key").write_bytes(bytes(range(32)))
    federation.start_node("hospital_a")

    assert federation.ended("hospital_a") == 2
    assert "is not about site hospital_a and its keys" in last_line(federation, "hospital_a")


def test_a_node_does_not_speak_with_another_sites_identity(federate: "Callable[..., Federation]") -> None:
    federation = federate()
    shutil.rmtree(federation.site("hospital_a") / "identity")
    shutil.copytree(federation.site("hospital_b") / "identity", federation.site("hospital_a") / "identity")
    federation.start_node("hospital_a")

    assert federation.ended("hospital_a") == 2
    assert "is that of site hospital_b, but the folder is hospital_a's" in last_line(federation, "hospital_a")


def test_a_missing_mask_stops_the_node_before_it_costs_the_federation_a_round(
    federate: "Callable[..., Federation]",
) -> None:
    federation = federate()
    folder = federation.site("hospital_a")
    write_easy_site(folder / "data")
    (folder / "data/training0-mask.png").unlink()
    (folder / "site.toml").write_text('[data]\ndatalist = "data/datalist.json"\nmodality = "photo"\n')
    federation.start_node("hospital_a")

    assert federation.ended("hospital_a") == 2
    assert "case training0: label" in last_line(federation, "hospital_a")


def test_a_private_key_that_others_can_read_stops_the_node(federate: "Callable[..., Federation]") -> None:
    federation = federate()
    key = federation.site("hospital_a") / "identity/signing.key"
    key.chmod(0o644)
    federation.start_node("hospital_a")

    assert federation.ended("hospital_a") == 2
    assert "chmod 600" in last_line(federation, "hospital_a")


def test_a_site_without_data_or_torch_is_told_in_one_line(
    federate: "Callable[..., Federation]", monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = federate()
    path = federation.site("hospital_a") / "site.toml"
    path.write_text("")
    federation.start_node("hospital_a")
    assert federation.ended("hospital_a") == 2
    assert "section [data] is missing" in last_line(federation, "hospital_a")

    (federation.root / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'torch' else real(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(federation.root)]))
    path.write_text(f'[data]\ndatalist = "{federation.root}/datalist.json"\n')
    federation.start_node("hospital_a")
    assert federation.ended("hospital_a") == 2
    assert "torch is not installed" in last_line(federation, "hospital_a")
