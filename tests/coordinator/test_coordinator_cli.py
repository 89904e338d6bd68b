"""The command line: one line for what an operator can set right, and nothing that needs torch."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import fedoap
from fedoap.config import FederationConfig, ModelRecord, load_federation
from fedoap.errors import FedoapError, StorageError
from fedoap.identity import TASK_CONTEXT, sign
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap.protocol.events import FinishPart, OpenPart, RecordClosed, RecordOpened
from fedoap.seal import sealed_at
from fedoap.tensors import read_blob, write_blob
from fedoap_coordinator.cli import cli, main
from fedoap_coordinator.daemon import Daemon
from fedoap_coordinator.folder import open_ledger, prepare
from fedoap_coordinator.store import Made
from tests.coordinator.conftest import open_store

FED_TOML = """
federation = "demo"
sites = ["hospital_a", "hospital_b"]
"""


@pytest.fixture
def fed_toml(tmp_path: Path) -> Path:
    path = tmp_path / "fed.toml"
    path.write_text(FED_TOML)
    return path


def run(fed_toml: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--config", str(fed_toml)])


def with_one_round(config: FederationConfig) -> None:
    """Leave a finished `init` exchange of hospital_a in the configured state folder."""
    state = config.coordinator.state
    keys = prepare(state)
    manifest = TaskManifest("demo", config.plan.digest, "init", 0, 1, ("hospital_a",), 600)
    source = state / "made"
    blob = write_blob(source, {"weight": np.full(10, 7.0, np.float32)})
    upload = UploadManifest(b"t" * 32, "hospital_a", 12, (("loss", 0.25),), blob)
    with open_ledger(config) as ledger:
        store = open_store(ledger, state)
        signature = sign(keys.signing.secret, TASK_CONTEXT, manifest.pack())
        store.apply(RecordOpened(b"t" * 32, manifest, manifest.pack(), signature))
        store.apply(OpenPart(b"u" * 32, sealed_at(blob, blob.size)))
        store.apply(FinishPart(b"u" * 32, blob, upload, "hospital_a", b"s" * 64))
        store.publish(Made(blob, source))
        store.apply(RecordClosed(b"t" * 32, "done", (b"u" * 32,), blob))


def test_an_invitation_is_printed_alone_on_standard_output(fed_toml: Path) -> None:
    result = run(fed_toml, "invite", "hospital_a")

    assert result.exit_code == 0
    assert len(result.stdout.split()) == 1


@pytest.mark.parametrize(("address", "warned"), [("", True), ('coordinator.advertise = "tcp://127.0.0.1:7470"', False)])
def test_a_token_that_only_this_machine_can_use_is_said_unless_it_was_asked_for(
    fed_toml: Path, address: str, warned: bool
) -> None:
    fed_toml.write_text(FED_TOML + address)

    message = run(fed_toml, "invite", "hospital_a").stderr

    assert ("only this machine reaches; set coordinator.advertise" in message) == warned


def test_the_configuration_may_be_named_before_or_after_the_command(fed_toml: Path) -> None:
    before = CliRunner().invoke(cli, ["--config", str(fed_toml), "sites"])

    assert before.exit_code == 0
    assert before.output == run(fed_toml, "sites").output
    assert "hospital_b: not enrolled" in before.output


def test_a_part_that_no_network_has_is_refused_before_a_site_is_asked(fed_toml: Path) -> None:
    fed_toml.write_text(FED_TOML + 'strategy.personal = ["heads"]')

    error = run(fed_toml, "sites").exception

    assert isinstance(error, FedoapError)
    assert "fed.toml: strategy.personal names heads, which is no part of the network; did you mean head?" in str(error)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ('name = "fedaverage"', "strategy.name is fedaverage, which is no known strategy; did you mean fedavg?"),
        ('name = "pooled"', "strategy.name is pooled, which no coordinator runs: it needs all images in one place"),
        (
            'name = "fedavg", server_beta2 = 0.9',
            "strategy.server_beta2 is 0.9, but fedavg does not use it; fedadagrad",
        ),
    ],
)
def test_a_strategy_that_no_coordinator_runs_is_refused_in_one_line(fed_toml: Path, settings: str, text: str) -> None:
    """Planted bug: the strategy looked at only when a site builds its network."""
    fed_toml.write_text(FED_TOML + f"strategy = {{ {settings} }}")

    error = run(fed_toml, "sites").exception

    assert isinstance(error, FedoapError)
    assert f"fed.toml: {text}" in str(error)
    assert "\n" not in str(error)


def test_help_shows_its_example_as_it_is_typed() -> None:
    lines = CliRunner().invoke(cli, ["--help"]).output.splitlines()

    assert "    fedoap-coordinator --config fed.toml" in lines


def test_sites_shows_open_invitations(fed_toml: Path) -> None:
    run(fed_toml, "invite", "hospital_a", "--valid-hours", "5")

    assert "hospital_a: not enrolled, invitation open for 5.0 hours" in run(fed_toml, "sites").output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["invite", "hospitl_a"], "did you mean hospital_a?"),
        (["invite", "hospital_a", "--valid-hours", "nan"], "--valid-hours is nan, but must be above 0"),
        (["invite", "hospital_a", "--valid-hours", "1e300"], "--valid-hours is 1e+300, but must be above 0"),
        (["revoke", "hospital_b"], "there is nothing to revoke"),
        (["revoke", "nobody"], "site is nobody, but the configuration lists"),
        (["export", "out"], "no round is done, so there is no model to export"),
    ],
)
def test_what_an_operator_can_set_right_is_an_error_of_ours(fed_toml: Path, words: list[str], reason: str) -> None:
    result = run(fed_toml, *words)

    assert isinstance(result.exception, FedoapError)
    assert reason in str(result.exception)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "none.toml"], r"none\.toml: no such file"),
        ([], "name the configuration: --config fed.toml"),
        (["invite", "--config", "none.toml"], "Missing argument 'SITE'."),
        (["frobnicate"], "No such command 'frobnicate'."),
        (["--config", "fed.toml"], r"state/log\.jsonl: the system refused: Is a directory"),
    ],
)
def test_such_an_error_is_one_line_and_exit_code_2(fed_toml: Path, words: list[str], expected: str) -> None:
    """Planted bugs: click's own words, which come with two lines of usage; an `OSError` let through."""
    (fed_toml.parent / "state" / "log.jsonl").mkdir(parents=True)
    command = [sys.executable, "-Im", "fedoap_coordinator", *words]
    result = subprocess.run(command, cwd=fed_toml.parent, capture_output=True, text=True, timeout=30, check=False)

    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"fedoap-coordinator: [^\n]*{expected}\n", result.stderr), result.stderr


def test_a_command_without_a_configuration_says_how_to_name_one() -> None:
    result = CliRunner().invoke(cli, [])

    assert result.exit_code == 2
    assert "--config fed.toml" in result.output


def test_help_has_an_example_and_version_is_the_distributions() -> None:
    shown = CliRunner().invoke(cli, ["--help"]).output

    assert "fedoap-coordinator invite hospital_a --config fed.toml" in shown
    assert fedoap.__version__ in CliRunner().invoke(cli, ["--version"]).output


def test_results_are_json_with_every_exchange(fed_toml: Path) -> None:
    with_one_round(load_federation(fed_toml))

    results = json.loads(run(fed_toml, "results", "--json").output)

    assert results == {
        "federation": "demo",
        "finished": False,
        "exchanges": [
            {
                "kind": "init",
                "round": 0,
                "attempt": 1,
                "outcome": "done",
                "seconds": 0.0,
                "sites": {"hospital_a": {"cases": 12, "bytes": 40, "metrics": {"loss": 0.25}}},
            }
        ],
    }
    assert "hospital_a  cases 12  bytes 40  loss 0.25" in run(fed_toml, "results").output


def test_results_of_a_run_that_has_not_begun_are_said(fed_toml: Path) -> None:
    """Planted bug: an empty line."""
    assert run(fed_toml, "results").output == "no exchange was opened yet\n"


def test_export_writes_a_model_folder_that_stands_alone(fed_toml: Path, tmp_path: Path) -> None:
    config = load_federation(fed_toml)
    with_one_round(config)

    assert run(fed_toml, "export", str(tmp_path / "out" / "model")).exit_code == 0

    record = ModelRecord.model_validate_json((tmp_path / "out" / "model" / "model.json").read_bytes())
    manifest = BlobManifest.unpack(record.shared.manifest.read_bytes())
    assert (record.plan, record.round, record.bank, record.personal) == (config.plan, 0, None, None)
    assert read_blob(record.shared.blob, manifest)["weight"][0] == 7.0
    assert record.shared.blob.parent == tmp_path / "out" / "model"


def test_a_model_that_is_damaged_is_not_exported(fed_toml: Path, tmp_path: Path) -> None:
    """Planted bug: only its length looked at, as before."""
    config = load_federation(fed_toml)
    with_one_round(config)
    for blob in (config.coordinator.state / "blobs").iterdir():
        if not blob.suffix:
            blob.write_bytes(b"XXXX" + blob.read_bytes()[4:])

    refused = run(fed_toml, "export", str(tmp_path / "out"))

    assert "is damaged from byte 0 on; fedoap-coordinator verify says where" in str(refused.exception)
    assert not (tmp_path / "out" / "model.json").exists()


def test_a_state_folder_of_another_federation_is_refused(fed_toml: Path) -> None:
    run(fed_toml, "sites")
    fed_toml.write_text(FED_TOML.replace("demo", "other"))

    assert "belongs to federation demo, not to other" in str(run(fed_toml, "sites").exception)


def test_the_coordinator_starts_without_torch_and_in_half_a_second() -> None:
    code = (
        "import sys, time; sys.modules |= dict.fromkeys(('torch', 'monai', 'triton'))\n"
        "import fedoap_coordinator.cli; print(time.process_time())\n"
        "import fedoap_coordinator.service, fedoap_coordinator.aggregator; print(time.process_time())\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    command, whole = (min(float(run.stdout.split()[at]) for run in runs) for at in (0, 1))
    print(f"CPU seconds until imported: {command:.3f} for a command, {whole:.3f} for the daemon")  # noqa: T201

    assert command < 0.5


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "log"), StorageError("ledger full")]
)
def test_a_disk_that_refuses_a_coordinator_at_work_is_worth_another_start(
    fed_toml: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Planted bug: exit code 2, after which systemd leaves the coordinator down for good."""

    def run_out_of_room(_daemon: Daemon, *, exit_when_finished: bool) -> None:
        raise error

    monkeypatch.setattr(Daemon, "serve", run_out_of_room)
    monkeypatch.setattr(sys, "argv", ["fedoap-coordinator", "--config", str(fed_toml)])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 1
