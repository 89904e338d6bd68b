import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fedoap.config import BlobFiles, DataConfig, ModelRecord, NetworkConfig, Plan, SiteData, WireConfig
from fedoap.errors import StorageError, TrainingError
from fedoap.manifests import BlobManifest
from fedoap.sitefolder import SiteFolder
from fedoap.tensors import read_blob, write_blob
from fedoap_node import results as results_module
from fedoap_node.job import Job, JobKind, JobResult
from fedoap_node.results import Results

PLAN = Plan(federation="f", network=NetworkConfig(width=4, depth=1), data=DataConfig(size=(8, 8)))
PACKED = PLAN.model_copy(update={"wire": WireConfig(updates="packed")})
WORK = b"\1" * 32


def folder(tmp_path: Path) -> SiteFolder:
    site = SiteFolder(tmp_path / "hospital_a")
    site.state.mkdir(parents=True, exist_ok=True)
    return site


def model(tmp_path: Path) -> BlobFiles:
    files = BlobFiles(blob=tmp_path / "model", manifest=tmp_path / "model.manifest")
    files.manifest.write_bytes(write_blob(files.blob, {"w": np.ones(4, np.float32)}).pack())
    return files


def worked(
    results: Results,
    tmp_path: Path,
    kind: JobKind = "train",
    round_number: int = 1,
    work: bytes = WORK,
    *,
    plan: Plan = PLAN,
) -> Path:
    """Do what a worker does, and return its output."""
    output = results.start(work, 16)
    job = Job(
        kind=kind,
        site="hospital_a",
        round=round_number,
        plan=plan,
        data=SiteData(datalist=tmp_path / "none.json"),
        model=model(tmp_path),
        cache=tmp_path,
        output=output,
    )
    (output / "job.json").write_text(job.model_dump_json())
    update = {"w": np.full(4, round_number, np.float32)}
    (output / "update.manifest").write_bytes(write_blob(output / "update.blob", update).pack())
    (output / "personal").mkdir()
    (output / "personal" / "state.json").write_text(json.dumps({"round": round_number}))
    (output / "result.json").write_text(JobResult(cases=3, metrics={"loss": 0.5}).model_dump_json())
    return output


def personal_round(results: Results) -> int | None:
    place = results.personal
    return None if place is None else int(json.loads((place / "state.json").read_text())["round"])


def test_a_finished_work_is_found_again_after_a_restart_with_its_personal_state(tmp_path: Path) -> None:
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path))

    again = Results(folder(tmp_path))
    again.recover()

    kept = again.find(WORK)
    assert kept is not None
    assert (kept.cases, kept.metrics) == (3, (("loss", 0.5),))
    assert personal_round(again) == 1


def test_a_packed_update_is_what_is_sent_and_the_plain_one_the_sites_model(tmp_path: Path) -> None:
    """Planted bugs: packed for calibration too, which returns nothing; the packed one linked as the model."""
    results = Results(folder(tmp_path))

    result = results.finish(WORK, worked(results, tmp_path, plan=PACKED))

    assert result.blob.packing is not None
    assert result.path.stat().st_size == result.blob.size
    assert results.find(WORK) == result
    record = ModelRecord.model_validate_json(folder(tmp_path).model_record.read_bytes())
    plain = BlobManifest.unpack(record.shared.manifest.read_bytes())
    assert read_blob(record.shared.blob, plain)["w"].tolist() == [1.0] * 4
    calibrated = worked(results, tmp_path, "calibrate", 2, b"\2" * 32, plan=PACKED)
    assert results.finish(b"\2" * 32, calibrated).blob.packing is None


@pytest.mark.parametrize("spares", [1, 0])
def test_room_for_an_update_is_there_before_its_work_begins_or_the_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spares: int
) -> None:
    """Planted bugs: room looked for when hours of work are to be packed; spares that outlast a full disk."""
    results, really = Results(folder(tmp_path)), os.posix_fallocate
    old = tmp_path / "hospital_a/state/spare-updates"

    def fallocate(descriptor: int, at: int, size: int) -> None:
        if list(old.iterdir()) or not spares:
            raise OSError(errno.ENOSPC, "No space left on device")
        really(descriptor, at, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    if spares:
        (tmp_path / "old").write_bytes(bytes(16))
        results._spares.keep(tmp_path / "old")
        output = results.start(WORK, 1 << 20, packs=True)
        assert [(output / name).stat().st_size for name in ("update.blob", "packed.blob")] == [1 << 20] * 2
    else:
        with pytest.raises(StorageError, match="no room for an update of 1048576 bytes: No space left on device"):
            results.start(WORK, 1 << 20, packs=True)
        assert list((tmp_path / "hospital_a/state/work").iterdir()) == []


def test_output_of_a_worker_that_never_finished_changes_nothing_and_is_removed(tmp_path: Path) -> None:
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path))
    worked(results, tmp_path, round_number=2, work=b"\2" * 32)

    again = Results(folder(tmp_path))
    again.recover()

    assert again.find(b"\2" * 32) is None
    assert personal_round(again) == 1
    assert len(list((tmp_path / "hospital_a/state/work").iterdir())) == 1


def test_a_folder_that_lost_its_result_stops_no_start(tmp_path: Path) -> None:
    """Planted bug: whatever has a work's name taken for whole."""
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path))
    (folder(tmp_path).state / "work" / WORK.hex() / "result.json").unlink()

    results.recover()

    assert results.find(WORK) is None


def test_a_result_that_another_version_left_stops_no_start(tmp_path: Path) -> None:
    """Planted bug: pydantic's error let through, after which the node never starts again."""
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path))
    job = folder(tmp_path).state / "work" / WORK.hex() / "job.json"
    job.write_text(job.read_text().replace('"round"', '"number"'))

    results.recover()

    assert results.find(WORK) is None
    assert personal_round(results) == 1


def test_a_crash_between_result_and_promotion_is_made_good_at_the_next_start(tmp_path: Path) -> None:
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path))
    output = worked(results, tmp_path, round_number=2, work=b"\2" * 32)
    (output / "order").write_text("2")
    output.rename(output.with_name("02" * 32))

    again = Results(folder(tmp_path))
    again.recover()

    assert personal_round(again) == 2
    record = ModelRecord.model_validate_json(folder(tmp_path).model_record.read_bytes())
    assert record.round == 2
    assert record.personal == again.personal


def test_a_result_is_sealed_with_one_secret_a_task_whatever_restarts(tmp_path: Path) -> None:
    """Planted bug: a fresh secret each time, so that the same result is another upload after a restart."""
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path))
    first = results.seal_secret(WORK, b"t" * 32)

    again = Results(folder(tmp_path))
    again.recover()

    assert again.seal_secret(WORK, b"t" * 32) == first
    assert again.seal_secret(WORK, b"u" * 32) != first
    assert stat.S_IMODE((tmp_path / "hospital_a/state/work" / WORK.hex() / "seal.key").stat().st_mode) == 0o600


def test_recovery_done_twice_changes_nothing(tmp_path: Path) -> None:
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path))

    results.recover()
    before = folder(tmp_path).model_record.read_bytes()
    results.recover()

    assert folder(tmp_path).model_record.read_bytes() == before
    assert personal_round(results) == 1


def test_the_model_of_a_trained_round_is_the_network_that_the_site_trained(tmp_path: Path) -> None:
    results = Results(folder(tmp_path))
    kept = results.finish(WORK, worked(results, tmp_path, round_number=2))
    results.keep_only(b"\3" * 32)

    record = ModelRecord.model_validate_json(folder(tmp_path).model_record.read_bytes())

    assert BlobManifest.unpack(record.shared.manifest.read_bytes()) == kept.blob
    assert np.frombuffer(record.shared.blob.read_bytes(), np.float32).tolist() == [2.0] * 4


def test_a_worker_writes_over_an_old_update_but_never_over_the_sites_model(tmp_path: Path) -> None:
    """Planted bug: an update that is taken although the model is its second name."""
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path, round_number=1))
    results.finish(b"\2" * 32, worked(results, tmp_path, round_number=2, work=b"\2" * 32))
    old = folder(tmp_path).state / "work" / WORK.hex() / "update.blob"
    inode = old.stat().st_ino

    results.keep_only(b"\2" * 32)
    output = worked(results, tmp_path, round_number=3, work=b"\3" * 32)

    assert not old.exists()
    assert (output / "update.blob").stat().st_ino == inode
    results.finish(b"\3" * 32, output)
    for kept in (b"\3" * 32, b"\4" * 32):  # the second update is let go first, then the third, which is the model
        results.keep_only(kept)
        worked(results, tmp_path, round_number=5, work=kept)
    record = ModelRecord.model_validate_json(folder(tmp_path).model_record.read_bytes())
    assert np.frombuffer(record.shared.blob.read_bytes(), np.float32).tolist() == [3.0] * 4


def test_results_that_are_never_committed_do_not_pile_up(tmp_path: Path) -> None:
    """A site that is always late has none committed. Planted bug: results deleted after a commit alone."""
    results = Results(folder(tmp_path))
    for number in range(1, 5):
        work = bytes([number]) * 32
        results.finish(work, worked(results, tmp_path, round_number=number, work=work))

    assert [number for number in range(1, 5) if results.find(bytes([number]) * 32)] == [3, 4]
    assert len(list((tmp_path / "hospital_a/state/work").iterdir())) == 2


def test_old_results_are_off_the_disk_for_good_before_their_place_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: no sync of the folder: a power cut could bring back a result with another's bytes."""
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path))
    synced = list[list[Path]]()
    monkeypatch.setattr("fedoap_node.results.sync_folder", lambda place: synced.append(list(place.iterdir())))

    results.keep_only(b"\2" * 32)

    assert synced == [[]]


def test_the_model_after_calibration_is_the_published_one(tmp_path: Path) -> None:
    results = Results(folder(tmp_path))
    results.finish(WORK, worked(results, tmp_path, round_number=2))
    results.finish(b"\2" * 32, worked(results, tmp_path, "calibrate", 3, b"\2" * 32))

    record = ModelRecord.model_validate_json(folder(tmp_path).model_record.read_bytes())

    assert np.frombuffer(record.shared.blob.read_bytes(), np.float32).tolist() == [1.0] * 4
    assert record.round == 3
    assert len(list(folder(tmp_path).model.iterdir())) == 3


@pytest.mark.parametrize("name", ["result.json", "update.blob"])
def test_a_result_with_a_part_missing_is_refused_and_not_kept(tmp_path: Path, name: str) -> None:
    results = Results(folder(tmp_path))
    output = worked(results, tmp_path)
    (output / name).unlink()

    with pytest.raises(TrainingError, match="no usable result"):
        results.finish(WORK, output)

    assert results.find(WORK) is None
    assert personal_round(results) is None


def test_an_update_that_names_a_personal_tensor_never_leaves(tmp_path: Path) -> None:
    """Planted bug: the check of names in `_read` taken out."""
    results = Results(folder(tmp_path))
    output = worked(results, tmp_path)
    personal = {"personal.head.weight": np.ones(2, np.float32)}
    (output / "update.manifest").write_bytes(write_blob(output / "update.blob", personal).pack())

    with pytest.raises(TrainingError, match=r"personal\.head\.weight, but personal tensors never leave"):
        results.finish(WORK, output)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """End the process, so to speak, before the disk is touched once more than `step` times."""
    left = iter(range(step))

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if next(left, None) is None:
                raise Killed
            return real(*arguments, **named)

        return call

    for name in ("sync_folder", "sync_tree", "share", "write_durably"):
        patch.setattr(results_module, name, dying(getattr(results_module, name)))
    for name in ("rename", "unlink", "rmdir"):  # of each file: a folder may be left half deleted
        patch.setattr(os, name, dying(getattr(os, name)))


def test_a_kill_at_any_step_of_keeping_a_result_leaves_one_whole_personal_state(tmp_path: Path) -> None:
    """Planted bug: the personal state promoted before the result has its name."""
    seen, whole = [], False
    for step in range(40):
        (place := tmp_path / str(step)).mkdir()
        results = Results(folder(place))
        results.finish(WORK, worked(results, place))
        output = worked(results, place, round_number=2, work=b"\2" * 32)
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            kill_at(step, patch)
            results.finish(b"\2" * 32, output)
            whole = True

        again = Results(folder(place))
        again.recover()

        rounds = personal_round(again)
        record = ModelRecord.model_validate_json(folder(place).model_record.read_bytes())
        assert rounds == (2 if again.find(b"\2" * 32) else 1)
        assert (record.round, record.personal) == (rounds, again.personal)
        assert record.shared.blob.stat().st_size == 16
        seen.append(rounds)
        if whole:
            break
    assert set(seen) == {1, 2}
    assert whole


def keep_the_second(results: Results) -> None:
    results.keep_only(b"\2" * 32)


def drop_the_first(results: Results) -> None:
    results.drop(WORK)


@pytest.mark.parametrize("delete", [keep_the_second, drop_the_first])
def test_a_kill_at_any_step_of_deleting_results_leaves_each_whole_or_gone(
    tmp_path: Path, delete: Callable[[Results], None]
) -> None:
    """Planted bug: a folder deleted under its own name."""
    steps = 0
    for step in range(40):
        (place := tmp_path / str(step)).mkdir()
        results, done = Results(folder(place)), False
        for number, work in ((1, WORK), (2, b"\2" * 32)):
            results.finish(work, worked(results, place, round_number=number, work=work))
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            kill_at(step, patch)
            delete(results)
            done = True

        again = Results(folder(place))
        again.recover()

        assert again.find(b"\2" * 32)
        assert personal_round(again) == 2
        assert done <= (again.find(WORK) is None)
        left = sorted(path.name for path in (folder(place).state / "work").iterdir())
        assert left == [work.hex() for work in (WORK, b"\2" * 32) if again.find(work)]
        steps = step
        if done:
            break
    assert 5 < steps < 39
