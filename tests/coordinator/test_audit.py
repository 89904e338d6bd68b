"""`audit` lists every blob that entered or left, by site; `Downloads` writes down what left."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedoap.config import FederationConfig
from fedoap.errors import ConfigError
from fedoap_coordinator.audit import audit, audit_lines
from fedoap_coordinator.cli import cli
from fedoap_coordinator.downloads import Downloads
from fedoap_coordinator.evidence import DamagedError, read_evidence
from fedoap_coordinator.folder import open_ledger
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.rows import Download
from ran_federation import SITES, config_of, run_federation
from tests.coordinator.conftest import LONG_AGO, Clock

A, B = b"a" * 32, b"b" * 32


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> FederationConfig:
    config = config_of(tmp_path_factory.mktemp("run") / "state")
    run_federation(config)
    return config


def rows(ledger: Ledger) -> list[Download]:
    return list(read_evidence(ledger.path).downloads)


def test_every_upload_is_listed_with_what_became_of_it(ran: FederationConfig) -> None:
    found = audit(ran)

    assert list(found) == list(SITES)
    assert [(one["kind"], one["round"], one["attempt"], one["counted"]) for one in found["hospital_b"]["entered"]] == [
        ("train", 1, 1, False),
        ("seed", 2, 1, False),
        ("seed", 2, 2, True),
        ("train", 2, 1, True),
        ("bank", 3, 1, True),
        ("calibrate", 3, 1, True),
        ("train", 4, 1, None),
    ]
    first = found["hospital_a"]["entered"][0]
    assert (first["kind"], first["bytes"], first["cases"], first["kept"]) == ("init", 600_014, 3, True)
    assert first["time"].startswith("2023-11-14T22:13")


def test_what_left_is_named_by_what_made_it(ran: FederationConfig) -> None:
    with open_ledger(ran) as ledger:
        model = next(row.result for row in ledger.tasks() if row.manifest.kind == "train" and row.result)
        ledger.add_downloads([Download("hospital_c", model, LONG_AGO, LONG_AGO + 2, 600_014)])
        ledger.add_downloads([Download("hospital_c", B, LONG_AGO, LONG_AGO + 2, 5)])

    (first, second) = audit(ran, "hospital_c")["hospital_c"]["left"]

    assert (first["what"], first["bytes"], first["sent"]) == ("result of train round 1", 600_014, 600_014)
    assert (first["first"], first["last"]) == ("2023-11-14T22:13:20.000+00:00", "2023-11-14T22:13:22.000+00:00")
    assert (second["what"], second["bytes"], second["sent"]) == ("unknown", 0, 5)


def test_results_that_were_refused_come_from_the_log_as_far_as_it_can_be_read(ran: FederationConfig) -> None:
    late = {"time": "2023-11-14T22:13:20.000+00:00", "event": "refused", "site": "hospital_a", "code": "late"}
    lines = [late | {"reason": "closed", "count": 2}, late | {"code": "revoked", "reason": "x", "count": 1}]
    text = "\n".join(json.dumps(line) for line in lines)
    (ran.coordinator.state / "log.jsonl").write_text(text + '\n{"time": "2023-')

    found = audit(ran)

    refused = {"time": late["time"], "code": "late", "reason": "closed", "count": 2}
    assert found["hospital_a"]["refused"] == [refused]
    assert found["hospital_b"]["refused"] == []


def test_the_command_prints_lines_or_json_for_all_or_one(ran: FederationConfig) -> None:
    path = ran.coordinator.state.parent / "fed.toml"
    path.write_text(
        f'federation = "demo"\nsites = {json.dumps(SITES[:2])}\n'
    )  # the third has left the federation since

    def said(*words: str) -> str:
        result = CliRunner().invoke(cli, ["audit", "--config", str(path), *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "hospital_b: 7 uploads with " in said()
    assert list(json.loads(said("--json"))) == list(SITES)
    assert list(json.loads(said("--json", "--site", "hospital_c"))) == ["hospital_c"]
    assert [line[:6] for line in audit_lines(audit(ran, "hospital_b"))] == ["hospit", *["  in  "] * 7]


def test_a_site_that_never_was_is_an_error(ran: FederationConfig) -> None:
    with pytest.raises(ConfigError, match="hospital_x: is no site of federation demo; these are: hospital_a"):
        audit(ran, "hospital_x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("update updates set stored=1e300", "1e[+]300 is no time"),
        ("update updates set packed=x'00'", "upload: keys or types are not those of version 1"),
        ("update updates set task=x'00' where rowid=1", "updates names task 00, which tasks lacks"),
    ],
)
def test_a_row_that_makes_no_sense_is_told_in_one_line(tmp_path: Path, change: str, reason: str) -> None:
    """Planted bug: any error at all, ours too, is laid to the ledger, and nobody is told which."""
    config = config_of(tmp_path / "state")
    run_federation(config)
    with open_ledger(config) as ledger:
        ledger._run(change)

    with pytest.raises(DamagedError, match=f"ledger is damaged: {reason}; fedoap-coordinator verify says where"):
        audit(config)


def test_a_blob_is_in_the_ledger_before_its_first_byte_leaves(ledger: Ledger, clock: Clock) -> None:
    """Planted bug: what is new written down with the rest, every few seconds."""
    downloads = Downloads(ledger, clock)

    downloads.note("hospital_a", A, 10)
    downloads.write_new()

    assert rows(ledger) == [Download("hospital_a", A, LONG_AGO, LONG_AGO, 10)]


def test_a_thousand_chunks_cost_one_write_and_not_a_byte_is_forgotten(ledger: Ledger, clock: Clock) -> None:
    """Planted bugs: a write for each chunk; `bytes` set instead of added to."""
    downloads = Downloads(ledger, clock)
    downloads.note("hospital_a", A, 10)
    downloads.write_new()
    before = ledger._db.total_changes
    for _ in range(1000):
        clock.now += 1
        downloads.note("hospital_a", A, 10)
        downloads.write_new()
    assert ledger._db.total_changes == before

    downloads.write()
    downloads.write()

    assert rows(ledger) == [Download("hospital_a", A, LONG_AGO, LONG_AGO + 1000, 10_010)]
    assert ledger._db.total_changes == before + 1


def test_each_site_and_blob_has_a_row_of_its_own(ledger: Ledger, clock: Clock) -> None:
    downloads = Downloads(ledger, clock)
    for site, blob in [("hospital_a", A), ("hospital_a", B), ("hospital_b", A), ("hospital_a", A)]:
        downloads.note(site, blob, 1)
        downloads.write_new()
    downloads.write()

    assert {(one.site, one.blob): one.bytes for one in rows(ledger)} == {
        ("hospital_a", A): 2,
        ("hospital_a", B): 1,
        ("hospital_b", A): 1,
    }


def test_nothing_is_written_for_an_audit(ran: FederationConfig) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in ran.coordinator.state.rglob("*") if path.is_file()}

    before = files()
    audit(ran)

    assert files() == before
