"""`verify` finds a single flipped bit wherever it lies, and says nothing of a sound folder."""

import json
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedoap.config import StrategyConfig
from fedoap.errors import StorageError
from fedoap.identity import Member, curve_keys, signing_keys
from fedoap.manifests import BlobManifest, Dtype, Packing, TensorSpec
from fedoap_coordinator.audit import audit
from fedoap_coordinator.blobcheck import first_difference
from fedoap_coordinator.cli import cli
from fedoap_coordinator.folder import open_ledger, prepare
from fedoap_coordinator.rows import Cell
from fedoap_coordinator.verify import Verdict, verify
from ran_federation import VALUES, Ran, config_of, run_federation

COLUMNS = {
    "facts": ("name", "value"),
    "site_keys": ("site", "signing_key"),
    "tasks": ("number", "task", "packed", "signature", "opened", "closed", "outcome", "reason", "result"),
    "updates": ("upload", "task", "site", "packed", "signature", "stored", "counted"),
    "published": ("blob", "manifest", "exact"),
    "records": ("number", "packed", "signature"),
}
NOT_YET = {
    "stored": "where task in (select task from tasks where outcome is not null)",
    "opened": "where outcome is not null",
}
"""Of an exchange that is open nothing is recorded yet."""
GONE_UNSEEN = {
    "tasks": "where outcome is not null",
    "updates": "where task in (select task from tasks where outcome is not null)",
}
"""Likewise."""
WORDS = {"records": "record ", "site_keys": "site_keys"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("run") / "state"
    run_federation(config_of(state))
    return state


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "state"))


def verdicts(state: Path) -> list[Verdict]:
    return list(verify(state, "demo", prepare(state).signing.public))


def faults(state: Path) -> list[str]:
    found = verdicts(state)
    assert all(bool(one.faults) == (one.finding == "BROKEN") for one in found)
    return [fault for one in found for fault in one.faults]


def flip_in_file(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flipped(value: Cell, rng: random.Random) -> Cell:
    match value:
        case bytes() | str():
            raw = bytearray(value.encode() if isinstance(value, str) else value)
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(7)
            return raw.decode() if isinstance(value, str) else bytes(raw)
        case int():
            return value ^ 1 << rng.randrange(1 if value in (0, 1) else 3)
        case float():
            (bits,) = struct.unpack("<Q", struct.pack("<d", value))
            (other,) = struct.unpack("<d", struct.pack("<Q", bits ^ 1 << rng.randrange(52)))
            return float(other)
        case None:
            raise AssertionError("nothing to flip")


@pytest.mark.parametrize("updates", ["plain", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_run_is_verified_to_the_last_bit(tmp_path: Path, dtype: Dtype, updates: str) -> None:
    """Planted bug: unpacked against the float32 original of a model that was rounded when it was published."""
    run_federation(config_of(tmp_path, dtype, updates=updates))

    assert [(one.title, one.finding) for one in verdicts(tmp_path)[1:]] == [
        ("first weights, attempt 1", "verified"),
        ("train of round 1, attempt 1", "verified"),
        ("seed after round 1, attempt 1", "verified"),
        ("seed after round 1, attempt 2", "verified"),
        ("train of round 2, attempt 1", "verified"),
        ("bank after round 2, attempt 1", "verified"),
        ("calibration, attempt 1", "verified"),
        ("train of round 4, attempt 1", "open"),
    ]
    assert faults(tmp_path) == []


def test_of_packed_bytes_the_tensor_is_named_that_they_stand_for() -> None:
    """Planted bug: an offset into packed bytes taken for one into the plain tensors."""
    tensors = tuple(TensorSpec(name, "float32", (3 << 18,)) for name in "az")
    packing = Packing(bytes(32), (1, 1, 1, 1 << 20, 1 << 20, 1 << 20))
    one = BlobManifest(tensors, bytes(4 * 32), packing=packing)
    other = replace(one, hashes=bytes(32) + b"\x01" * 32 + bytes(2 * 32))

    assert first_difference(one, other) == "they differ from chunk 1 on, which holds tensor z"


def test_a_run_by_the_median_under_a_norm_bound_is_verified_too(tmp_path: Path) -> None:
    """Planted bug: results are made anew by the default strategy."""
    strategy = StrategyConfig(rule="median", max_norm_ratio=100.0)
    run_federation(config_of(tmp_path).model_copy(update={"strategy": strategy}))

    assert faults(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_run_with_moments_is_verified_and_a_flipped_bit_of_a_moment_is_found(
    tmp_path: Path, name: str, dtype: Dtype
) -> None:
    """Planted bugs: moments made anew from nothing; what the coordinator keeps to itself not looked at."""
    run_federation(config_of(tmp_path, dtype).model_copy(update={"strategy": StrategyConfig(name=name)}))
    assert faults(tmp_path) == []
    kept = [path for path in (tmp_path / "blobs").glob("*.master") if path.stat().st_size > 2 * 4 * VALUES]

    for path in kept:
        flip_in_file(path, 8 * path.stat().st_size - 1)

        assert all(path.name in fault for fault in faults(tmp_path))
        assert faults(tmp_path)
        flip_in_file(path, 8 * path.stat().st_size - 1)
    assert len(kept) == 2


def test_a_flipped_bit_in_any_file_of_a_blob_or_manifest_is_found_there(copy: Path) -> None:
    """Planted bugs: the last chunk not hashed; the float32 original not looked at; no look at a manifest's file."""
    rng = random.Random(1)
    files = sorted((copy / "blobs").iterdir())
    assert len(files) > 40
    for path in files:
        size = 8 * path.stat().st_size
        for bit in [0, size - 1, rng.randrange(size)] if size else []:
            flip_in_file(path, bit)

            found = faults(copy)
            assert found, path
            assert all(str(path) in fault for fault in found), (path, found)

            flip_in_file(path, bit)
    assert faults(copy) == []


def test_the_chunk_and_the_tensor_of_a_flipped_bit_are_named(copy: Path) -> None:
    model = next(path for path in (copy / "blobs").glob("*.master") if path.stat().st_size > 1 << 20)
    flip_in_file(model, 8 * ((1 << 20) + 5))

    (fault, *_) = faults(copy)

    assert f"{model}: chunk 1 (bytes 1048576 to {model.stat().st_size}, tensor weight) is not what" in fault


@pytest.mark.parametrize(("table", "column"), [(table, column) for table in COLUMNS for column in COLUMNS[table]])
def test_a_flipped_bit_in_any_column_that_matters_is_found_there(copy: Path, table: str, column: str) -> None:
    """Planted bugs: `stored`, `reason`, `exact` or the times left out of the record; an upload's signature not
    checked; rows without an exchange not looked for; no comparison of row and record."""
    db, rng, tried = sqlite3.connect(copy / "fed.sqlite", isolation_level=None), random.Random(f"{table}.{column}"), 0
    for rowid, value in db.execute(f"select rowid, {column} from {table} {NOT_YET.get(column, '')}").fetchall():  # noqa: S608
        change = flipped(value, rng) if value not in (None, "", "epoch", b"3") else None
        if change is None or (column == "number" and change in range(1, 9)):
            continue
        db.execute(f"update {table} set {column}=? where rowid=?", (change, rowid))  # noqa: S608

        found = str(faults(copy))
        assert f"{table}.{column}" in found or f"{table} row" in found or WORDS.get(table, table) in found, (
            value,
            found,
        )

        db.execute(f"update {table} set {column}=? where rowid=?", (value, change if column == "number" else rowid))  # noqa: S608
        tried += 1
    db.close()
    assert tried
    assert faults(copy) == []


def test_a_flipped_bit_in_the_ledgers_file_is_found(copy: Path) -> None:
    """The same as on the disk, below SQLite: in a signature, an upload's manifest, a record."""
    db = sqlite3.connect(copy / "fed.sqlite")
    db.execute("pragma wal_checkpoint(truncate)")
    cells = [
        db.execute(f"select {cell} limit 1").fetchone()[0] for cell in ("signature from updates", "packed from records")
    ]
    cells.append(db.execute("select packed from updates where length(packed) < 500 limit 1").fetchone()[0])
    db.close()
    whole = (copy / "fed.sqlite").read_bytes()
    for cell in cells:
        at = whole.find(cell[:60])
        assert at > 0
        flip_in_file(copy / "fed.sqlite", 8 * at + 13)

        assert "fed.sqlite: " in str(faults(copy)) or "record " in str(faults(copy))

        flip_in_file(copy / "fed.sqlite", 8 * at + 13)


def test_no_flipped_bit_of_the_ledgers_file_ends_in_a_traceback(copy: Path) -> None:
    """Planted bug: only `sqlite3.Error` caught; a message of SQLite that quotes what is damaged is no UTF-8."""
    path, rng = copy / "fed.sqlite", random.Random(1)
    whole = path.read_bytes()
    places = [whole.index(b"CREATE TABLE members") + 13, *(rng.randrange(len(whole)) for _ in range(100))]
    found = 0
    for at in places:
        flip_in_file(path, 8 * at + 7)
        with suppress(StorageError):
            found += bool(faults(copy))
        with suppress(StorageError):
            audit(config_of(copy))
        path.write_bytes(whole)

    assert found > 10


def test_a_trigger_or_table_that_was_altered_is_found(copy: Path) -> None:
    """Planted bug: no look at the schema. A ledger without the trigger forgets with which keys sites have signed."""
    with sqlite3.connect(copy / "fed.sqlite") as db:
        db.execute("drop trigger key_of_new_member")
    db.close()

    assert faults(copy) == ["fed.sqlite: key_of_new_member: is not made as in version 2"]


@pytest.mark.parametrize("table", ["tasks", "updates", "published", "records", "site_keys"])
def test_any_row_that_was_taken_out_is_missed(copy: Path, table: str) -> None:
    """Planted bug: uploads that did not count left out of the record."""
    ledger = copy / "fed.sqlite"
    whole = ledger.read_bytes()
    rows = sqlite3.connect(ledger).execute(f"select rowid from {table} {GONE_UNSEEN.get(table, '')}").fetchall()  # noqa: S608
    for (rowid,) in rows:
        with sqlite3.connect(ledger) as db:
            db.execute(f"delete from {table} where rowid=?", (rowid,))  # noqa: S608
        db.close()

        assert faults(copy), rowid

        ledger.write_bytes(whole)


def test_an_exchange_taken_out_with_all_its_rows_is_missed_by_its_record(copy: Path) -> None:
    """Planted bug: no look at records without an exchange."""
    with sqlite3.connect(copy / "fed.sqlite") as db:
        db.execute("delete from updates where task in (select task from tasks where number >= 7)")
        db.execute("delete from tasks where number >= 7")
    db.close()

    assert faults(copy) == ["fed.sqlite: the exchange of record 7 is missing in tasks"]


def test_a_result_that_the_uploads_do_not_make_is_found_although_all_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: no recomputation. Whoever has the federation's key can sign a model that nobody trained."""
    ran = Ran(config_of(tmp_path))
    ran.exchange("init", 0)
    monkeypatch.setattr("fedoap.aggregation._step", lambda _old, _start, _stop, mean: (mean * 1.0001).astype("<f4"))
    ran.exchange("train", 1)
    monkeypatch.undo()
    ran.close_files()

    (ledger, first, second) = verdicts(tmp_path)

    assert (ledger.finding, first.finding, second.finding) == ("verified", "verified", "BROKEN")
    assert "its 3 uploads do not make the result" in second.line
    assert "chunk 0 on, which holds tensor bias" in second.line


def test_a_kept_file_that_is_missing_is_named(copy: Path) -> None:
    for path in sorted((copy / "blobs").iterdir()):
        content = path.read_bytes()
        path.unlink()

        found = faults(copy)
        assert any(str(path) in fault and "is missing, but the ledger keeps" in fault for fault in found), found

        path.write_bytes(content)


@pytest.mark.parametrize("content", [bytes(31), None])
def test_a_seals_key_that_cannot_be_read_is_named_and_the_rest_is_judged(copy: Path, content: bytes | None) -> None:
    """Planted bug: a key of 31 bytes ends `verify` in the middle of its list."""
    count, path = len(verdicts(copy)), min((copy / "seals").iterdir())
    path.write_bytes(content) if content else path.unlink()

    found = verdicts(copy)

    assert len(found) == count
    assert any(str(path) in fault for one in found for fault in one.faults), found


def test_a_file_that_the_disk_cannot_read_is_named_and_the_rest_is_judged(copy: Path) -> None:
    """A folder stands for a bad sector: to read it is an error. Planted bug: that ends `verify` then and there."""
    for path in sorted((copy / "blobs").iterdir()):
        path.rename(copy / "aside")
        path.mkdir()

        assert any(str(path) in fault for fault in faults(copy)), path

        path.rmdir()
        (copy / "aside").rename(path)


def test_what_is_deleted_as_it_should_be_meanwhile_is_not_missed(copy: Path) -> None:
    """Planted bug: no second look at the ledger."""
    running = verify(copy, "demo", prepare(copy).signing.public)
    found = [next(running), next(running)]

    Ran(config_of(copy, upload_rounds=0)).close_files()
    found += running

    assert {one.finding for one in found[2:]} == {"verified", "inputs no longer kept", "open"}


def test_rounds_whose_uploads_are_gone_are_checked_as_far_as_that_goes(tmp_path: Path) -> None:
    run_federation(config_of(tmp_path, upload_rounds=1))

    assert [one.finding for one in verdicts(tmp_path)[1:]] == [
        "inputs no longer kept",
        "inputs no longer kept",
        "verified",
        "inputs no longer kept",
        "verified",
        "verified",
        "verified",
        "open",
    ]


def test_a_site_that_joined_again_leaves_its_old_uploads_valid(copy: Path) -> None:
    with open_ledger(config_of(copy)) as ledger:
        ledger.enrol(b"n" * 32, Member("hospital_a", curve_keys(b"n" * 32).public, signing_keys(b"n" * 32).public), 9.0)

    assert faults(copy) == []


@pytest.mark.parametrize("is_in_use", [False, True])
def test_nothing_is_written(copy: Path, is_in_use: bool) -> None:
    """Planted bug: the ledger opened for writing."""
    ledger = open_ledger(config_of(copy))
    ledger.set_fact("touched", b"1")
    if not is_in_use:
        ledger.__exit__()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.suffix != ".sqlite-shm"}

    assert faults(copy) == []

    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.suffix != ".sqlite-shm"}
    assert after == before
    ledger.__exit__()


def test_the_command_says_a_line_a_round_and_its_exit_code_tells(copy: Path) -> None:
    config = copy.parent / "fed.toml"
    config.write_text('federation = "demo"\nsites = ["hospital_a", "hospital_b", "hospital_c"]\n')
    run: Callable[..., str] = lambda code, *words: _said(code, "verify", "--config", str(config), *words)  # noqa: E731

    lines = run(0).splitlines()
    assert lines[2] == "train of round 1, attempt 1: verified"
    assert lines[-1].startswith("exchanges: 7 verified, 1 open; signed by the federation's key ")

    flip_in_file(next((copy / "blobs").glob("*.master")), 77)
    assert ": BROKEN: " in run(1)
    assert json.loads(run(1, "--json"))["sound"] is False


def _said(code: int, *words: str) -> str:
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == code, result.output
    return result.stdout
