"""A node's folder after a power cut, or a kill: each state that it may be left in, at each step of three rounds."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fedoap.config import DataConfig, ModelRecord, NetworkConfig, Plan, SiteData
from fedoap.errors import FedoapError
from fedoap.manifests import BlobManifest, TaskManifest
from fedoap.sitefolder import SiteFolder
from fedoap.tensors import read_blob, write_blob
from fedoap_node import results as results_module
from fedoap_node import state as state_module
from fedoap_node.files import remove
from fedoap_node.job import Job, JobResult
from fedoap_node.results import Results
from fedoap_node.state import SiteState, lock_state
from power import Recorder, cuts, lay_out

PLAN = Plan(federation="f", network=NetworkConfig(width=4, depth=1), data=DataConfig(size=(8, 8)))
ROUNDS, VALUES = 3, 600
GOES_ON = 10
"""On one state of so many the next round is done too."""


def test_no_power_cut_loses_what_the_coordinator_may_know_of_or_stops_a_start(fast_folder: Path) -> None:
    """Planted bugs: see below."""
    recorder = record(fast_folder)

    states = replay_all(recorder, fast_folder)

    assert len(recorder.said) == 5 * ROUNDS
    assert states > 500
    sys.stdout.write(
        f"\nnode's power cuts: {states} states of its folder at {len(recorder.moments)} steps: all whole\n"
    )


@pytest.mark.parametrize(
    ("left_out", "found"),
    [
        ("fdatasync", "0 bytes, but its manifest says 2400"),
        ("fsync", "TensorsError.*manifest"),
        ("fsync folder", "a blob is gone"),
    ],
)
def test_a_node_that_leaves_out_a_sync_is_caught(fast_folder: Path, left_out: str, found: str) -> None:
    recorder = record(fast_folder, frozenset({left_out}))

    with pytest.raises(AssertionError, match=found):
        replay_all(recorder, fast_folder)


def deletes_in_place(self: Results, folder: Path) -> None:
    """Delete a result under its own name."""
    remove(folder)


def copies(source: Path, target: Path) -> None:
    """Copy, and leave it to the system when the copy reaches the disk."""
    target.write_bytes(source.read_bytes())


@pytest.mark.parametrize(
    ("place", "name", "bug", "found"),
    [
        (results_module, "sync_tree", lambda _: None, r"personal/00000001\\?'\) is None"),
        (results_module, "share", copies, "manifest: not msgpack"),
        (state_module, "sync_folder", lambda _: None, "a blob is gone"),
    ],
)
def test_a_node_that_writes_carelessly_is_caught(
    fast_folder: Path, place: object, name: str, bug: object, found: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, bug)
        recorder = record(fast_folder)

    with pytest.raises(AssertionError, match=found):
        replay_all(recorder, fast_folder)


def test_a_node_that_deletes_results_under_their_own_names_is_caught(
    fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Results, "_drop", deletes_in_place)
    recorder = record(fast_folder)

    with pytest.raises(AssertionError, match="FileNotFoundError"):
        replay_all(recorder, fast_folder)


def test_a_node_that_forgets_which_result_came_last_is_caught(
    fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, order = record(fast_folder), results_module._order
    monkeypatch.setattr(results_module, "_order", lambda folder: -order(folder))

    with pytest.raises(AssertionError, match="the model is of another round"):
        replay_all(recorder, fast_folder)


def record(folder: Path, ignored: frozenset[str] = frozenset()) -> Recorder:
    """Return what a node's storage did in some rounds; the folder it did it in is free again for its replays."""
    site, made = folder / "hospital_a", folder / "made"
    made.mkdir()
    recorder = Recorder(site, ignored=ignored)
    (site / "state").mkdir(parents=True)
    with recorder.recording():
        state = SiteState(SiteFolder(site), lock_state(SiteFolder(site)))
        for number in range(1, ROUNDS + 1):
            do_round(state, made, number, lambda what: acknowledge(recorder, what))
        state.close()
    shutil.rmtree(site)
    return recorder


def acknowledge(recorder: Recorder, what: str) -> None:
    recorder.said.append(what.encode())
    recorder.look(what)


def do_round(state: SiteState, made: Path, number: int, said: Callable[[str], None]) -> None:
    """Let go of the model before, fetch one, train on it, keep the result until the coordinator has it."""
    task = task_of(number, made)
    assert task.model is not None
    said(f"task {number}")
    state.blobs.keep_only([task.model.id])
    state.blobs.open(task.model.id, task.model)
    state.blobs.write(task.model.id, 0, (made / f"{number}").read_bytes())
    state.blobs.finish(task.model.id, task.model)
    said(f"blob {number}")
    if state.finished(task) is None:
        state.results.finish(task.work, work(state, task))
    said(f"result {number}")
    state.results.seal_secret(task.work, secret_of(number))
    said(f"secret {number} {state.results.seal_secret(task.work, secret_of(number)).hex()}")
    state.results.keep_only(task.work)
    said(f"commit {number}")


@cache
def task_of(number: int, made: Path) -> TaskManifest:
    model = write_blob(made / f"{number}", {"w": np.full(VALUES, -number, np.float32)})
    return TaskManifest("f", PLAN.digest, "train", number, 1, ("hospital_a",), 60, model=model)


def secret_of(number: int) -> bytes:
    return bytes([number]) * 32


def work(state: SiteState, task: TaskManifest) -> Path:
    """Do what a worker does, which syncs nothing, and return its output."""
    assert task.model is not None
    output = state.results.start(task.work, 4 * VALUES)
    job = Job(
        kind="train",
        site="hospital_a",
        round=task.round,
        plan=PLAN,
        data=SiteData(datalist=Path("/none.json")),
        model=state.blobs.files(task.model.id),
        cache=state.cache,
        output=output,
    )
    (output / "job.json").write_text(job.model_dump_json())
    update = write_blob(output / "update.blob", {"w": np.full(VALUES, task.round, np.float32)})
    (output / "update.manifest").write_bytes(update.pack())
    (output / "personal").mkdir()
    (output / "personal" / "state.json").write_text(json.dumps({"round": task.round}))
    (output / "result.json").write_text(JobResult(cases=3, metrics={"loss": 0.5}).model_dump_json())
    return output


def replay_all(recorder: Recorder, folder: Path) -> int:
    """Start on every state that a power cut may have left, and return how many there were."""
    seen, rng, place = set[object](), random.Random(1), folder / "hospital_a"
    for moment in recorder.moments:
        said = [entry.decode().split() for entry in moment.said]
        for left in cuts(moment, rng):
            if (key := (frozenset(left.items()), len(said))) in seen:
                continue
            seen.add(key)
            lay_out(left, place)
            try:
                check(SiteFolder(place), folder / "made", said, goes_on=len(seen) % GOES_ON == 0)
            except (AssertionError, FedoapError, OSError, ValueError) as error:
                raise AssertionError(f"before {moment.step}, after {said[-1:]}: {error!r}") from error
            shutil.rmtree(place)
    return len(seen)


def check(site: SiteFolder, made: Path, said: list[list[str]], *, goes_on: bool) -> None:
    """Start on what is left: what was acknowledged is there and whole, and the next round can be done."""
    site.state.mkdir(exist_ok=True)
    state = SiteState(site, lock_state(site))
    state.blobs.partly()
    known = {what: int(number) for what, number, *_ in said}
    for blob in state.blobs.stored():
        files = state.blobs.files(blob)
        assert whole(files.blob, files.manifest)[0] < 0
    if (number := known.get("blob", 0)) and number == known["task"]:
        model = task_of(number, made).model
        assert model is not None
        assert model.id in state.blobs.stored(), "a blob is gone"
    done = next((one for one in range(ROUNDS, 0, -1) if state.finished(task_of(one, made))), 0)
    assert done >= known.get("result", 0), "a result is gone"
    check_result(state, task_of(done, made), done)
    if "secret" in known and done == known["secret"]:
        (secret,) = (entry[2] for entry in said if entry[:2] == ["secret", str(done)])
        kept = state.results.seal_secret(task_of(done, made).work, secret_of(done))
        assert kept.hex() == secret, "a seal's secret is another"
    if goes_on:
        do_round(state, made, done + 1, lambda _: None)
        check_result(state, task_of(done + 1, made), done + 1)
    state.close()


def check_result(state: SiteState, task: TaskManifest, number: int) -> None:
    """The result is whole, and personal state and model are those that it left."""
    personal = state.results.personal
    if not number:
        assert personal is None
        return
    result = state.finished(task)
    assert result is not None
    assert read_blob(result.path, result.blob)["w"].tolist() == [number] * VALUES
    assert personal is not None
    assert json.loads((personal / "state.json").read_text()) == {"round": number}
    record = ModelRecord.model_validate_json(state.folder.model_record.read_bytes())
    assert (record.round, record.personal) == (number, personal), "the model is of another round"
    assert whole(record.shared.blob, record.shared.manifest) == [number] * VALUES


def whole(blob: Path, manifest: Path) -> list[float]:
    """Return a blob's numbers, each chunk's hash compared."""
    table = BlobManifest.unpack(manifest.read_bytes())
    values: list[float] = read_blob(blob, table)["w"].tolist()
    return values
