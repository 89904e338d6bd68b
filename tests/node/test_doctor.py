"""What the doctor says of a site's folder and machine."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedoap.config import WorkerConfig
from fedoap.identity import Certificate, curve_keys, signing_keys
from fedoap_node.cli import cli
from fedoap_node.doctor import device, disk, memory_limit
from fedoap_node.membership import Membership

FEDERATION, SITE = signing_keys(b"f" * 32), signing_keys(b"s" * 32)
SERVER, CURVE = curve_keys(b"c" * 32), curve_keys(b"k" * 32)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Leave the folder of a site that has joined a coordinator that does not run."""
    folder = tmp_path / "hospital_a"
    (folder / "identity").mkdir(parents=True)
    (tmp_path / "list.json").write_text("{}")
    (folder / "site.toml").write_text('[data]\ndatalist = "../list.json"\n[worker]\ncommand = ["true"]\n')
    certificate = Certificate.issue(FEDERATION.secret, "demo", "hospital_a", (CURVE.public, SITE.public))
    address = ("tcp://127.0.0.1:1", SERVER.public, FEDERATION.public)
    Membership("demo", "hospital_a", *address, CURVE, SITE).write(folder / "identity")
    (folder / "identity/certificate").write_bytes(certificate.pack())
    return folder


def doctor(site: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["doctor", "--site", site.name, "--home", str(site.parent), *words])
    return done.exit_code, done.output


def test_what_is_wrong_is_a_line_each_and_exit_code_1(site: Path) -> None:
    code, said = doctor(site)

    assert code == 1
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["ok", "data"],
        ["ok", "disk"],
        ["ok", "node"],
        *([["ok", "memory"]] if "memory" in said else []),
        ["wrong", "line"],
    ]
    assert "tcp://127.0.0.1:1: refused, nothing listens there" in said


def test_a_fault_of_the_data_does_not_hide_one_of_the_line(site: Path) -> None:
    """Planted bug: the first fault ends it."""
    (site.parent / "list.json").unlink()

    said = {finding["check"]: finding for finding in json.loads(doctor(site, "--json")[1])["findings"]}

    assert "there is no such file" in said["data"]["text"]
    assert (said["data"]["verdict"], said["line"]["verdict"]) == ("wrong", "wrong")


def test_a_mistake_in_the_configuration_and_a_damaged_identity_are_named(site: Path) -> None:
    (site / "site.toml").write_text("[worker]\ndevise = 'cpu'\n")
    (site / "identity/certificate").write_bytes(b"x")

    told = json.loads(doctor(site, "--json")[1])

    said = {finding["check"]: finding["text"] for finding in told["findings"]}
    assert "unknown key worker.devise; did you mean worker.device?" in said["data"]
    assert "certificate: its fields are not those of version 1" in said["identity"]
    assert told["well"] is False


@pytest.mark.parametrize(
    ("free", "model", "verdict", "expected"),
    [
        (0, None, "wrong", "the disk is full; make room"),
        (10**9, None, "warning", "1.0 GB are free; how much a model needs is known after the first round"),
        (10**9, 2 * 10**8, "wrong", "but this model needs 1.2 GB (6 times its size)"),
        (2 * 10**9, 2 * 10**8, "ok", "this model needs 1.2 GB"),
    ],
)
def test_room_is_compared_with_what_the_model_needs(
    tmp_path: Path, free: int, model: int | None, verdict: str, expected: str
) -> None:
    finding = disk(tmp_path, lambda _: free, model)

    assert (finding.verdict, finding.check) == (verdict, "disk")
    assert expected in finding.text


@pytest.mark.parametrize(
    ("worker", "names", "verdict"),
    [
        (WorkerConfig(device="cpu"), [], "ok"),
        (WorkerConfig(), [], "warning"),
        (WorkerConfig(), ["H100"], "ok"),
        (WorkerConfig(gpus=2), ["H100"], "wrong"),
        (WorkerConfig(device="cuda"), [], "wrong"),
        (WorkerConfig(device="cuda:1"), ["H100"], "wrong"),
        (WorkerConfig(device="cuda:1"), ["H100", "H100"], "ok"),
    ],
)
def test_gpus_that_are_asked_for_must_be_seen(worker: WorkerConfig, names: list[str], verdict: str) -> None:
    finding = device(worker, "2.8", names)

    assert finding.verdict == verdict
    assert "\n" not in finding.text


def test_the_tightest_memory_limit_of_a_groups_parents_counts(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/system.slice/fedoap-node@a.service"
    group.mkdir(parents=True)
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text("0::/system.slice/fedoap-node@a.service\n")
    (group / "memory.max").write_text("max\n")
    assert memory_limit(7, tmp_path) is None

    (group / "memory.max").write_text("8000000000\n")
    (group.parent / "memory.max").write_text("4000000000\n")
    assert memory_limit(7, tmp_path) == 4_000_000_000
