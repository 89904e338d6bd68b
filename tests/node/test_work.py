"""The task in hand, with real workers: how they die, hang and lie, and what is left of it."""

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedoap.config import DataConfig, NetworkConfig, Plan, SiteConfig, SiteData, WorkerConfig
from fedoap.manifests import BlobManifest, TaskManifest
from fedoap.protocol.events import SiteEvent, WorkDone, WorkFailed
from fedoap.seal import public_half
from fedoap.sitefolder import SiteFolder
from fedoap.tensors import write_blob
from fedoap_node.journal import Journal
from fedoap_node.state import SiteState, lock_state
from fedoap_node.work import Work

PLAN = Plan(federation="f", network=NetworkConfig(width=4, depth=1), data=DataConfig(size=(8, 8)))
WORKER = """
import json, sys, time
from pathlib import Path
output = Path(sys.argv[1]).parent
def leave(cases=3, metrics={"loss": 0.5}):
    (output / "result.json").write_text(json.dumps({"cases": cases, "metrics": metrics}))
"""
Make = Callable[[str], Work]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[SiteState]:
    folder = SiteFolder(tmp_path / "hospital_a")
    held = SiteState(folder, lock_state(folder))
    held.keep_plan(PLAN.to_bytes())
    yield held
    held.close()


@pytest.fixture
def make(state: SiteState, tmp_path: Path) -> Iterator[Make]:
    made: list[Work] = []

    def work(code: str, **worker: float) -> Work:
        command = (sys.executable, "-c", WORKER + code)
        config = SiteConfig(
            data=SiteData(datalist=tmp_path / "list.json"),
            worker=WorkerConfig(command=command, **worker),
        )
        journal = Journal(state.folder.log, "hospital_a", io.StringIO())
        made.append(Work(state, config, journal))
        return made[-1]

    yield work
    for one in made:
        one.close()
        one._journal.close()


def task(state: SiteState, **changes: object) -> TaskManifest:
    """A round of training whose model is here."""
    model = write_blob(state.folder.path / "weights", {"w": np.ones(4, np.float32)})
    if model.id not in state.blobs.stored():
        state.blobs.open(model.id, model)
        state.blobs.write(model.id, 0, (state.folder.path / "weights").read_bytes())
        state.blobs.finish(model.id, model)
    manifest = TaskManifest(
        "f", PLAN.digest, "train", 1, 1, ("hospital_a",), 600, model, seal_key=public_half(bytes([7] * 32))
    )
    return replace(manifest, **changes)  # type: ignore[arg-type]


def ended(work: Work) -> SiteEvent:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [event for event in work.news() if isinstance(event, WorkDone | WorkFailed)]
        work.settle()
        if found:
            return found[0]
        time.sleep(0.01)
    raise AssertionError("the work did not end")


def logged(state: SiteState, event: str) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in state.folder.log.read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def outputs(state: SiteState) -> list[Path]:
    return list((state.folder.state / "work").iterdir())


@pytest.mark.parametrize(
    ("code", "outside", "inside"),
    [
        ("sys.exit('case p17: no mask')", "the worker ended with exit code 1", "case p17: no mask"),
        ("import os; os.kill(os.getpid(), 9)", "the worker was killed by SIGKILL", "perhaps out of memory"),
        ("pass", "the worker's result cannot be used", "left no usable result"),
        ("leave(cases=10**30)", "the worker's result cannot be used", "cases"),
        ("leave(cases=-1)", "the worker's result cannot be used", "cases"),
        ("leave(metrics={'x' * 65: 1.0})", "the worker's result cannot be used", "metrics"),
        ("leave(metrics={'loss': float('nan')})", "the worker's result cannot be used", "result.json"),
    ],
)
def test_however_a_worker_fails_the_node_goes_on_and_tells_the_coordinator_nothing_of_the_site(
    make: Make, state: SiteState, code: str, outside: str, inside: str
) -> None:
    """Planted bugs: a number that no message can carry taken over; the worker's words passed on."""
    work = make(code)
    work.start(b"t" * 32, task(state))

    failed = ended(work)

    assert isinstance(failed, WorkFailed)
    assert failed.reason.startswith(outside)
    assert "p17" not in failed.reason
    assert str(state.folder.path) not in failed.reason
    assert outputs(state) == []
    if inside != "result.json":
        assert inside in logged(state, "work_failed")[0]["reason"]


def test_a_worker_that_fails_after_its_log_was_taken_away_is_told_as_any_other(make: Make, state: SiteState) -> None:
    """Planted bug: the system's error let through, which ends the daemon."""
    work = make("time.sleep(0.3); sys.exit(1)")
    work.start(b"t" * 32, task(state))
    state.folder.worker_log.unlink()

    assert isinstance(ended(work), WorkFailed)


def test_a_worker_that_cannot_be_started_leaves_no_folder(make: Make, state: SiteState) -> None:
    """Planted bug: the output, with room for an update, left until the next start."""
    work = make("leave()")
    state.folder.worker_log.mkdir()

    failed = work.start(b"t" * 32, task(state))

    assert isinstance(failed, WorkFailed)
    assert outputs(state) == []


def test_a_result_whose_table_fits_into_no_message_is_refused_here(make: Make, state: SiteState) -> None:
    """Planted bug: offered, at which the coordinator's socket hangs up, for ever."""
    names = {f"{number:06d}{'x' * 240}": np.ones(1, np.float32) for number in range(5000)}
    blob = write_blob(state.folder.path / "large", names)
    (state.folder.path / "large.manifest").write_bytes(blob.pack())
    place = str(state.folder.path)
    work = make(f"""
import shutil
shutil.copy({place!r} + "/large", output / "update.blob")
shutil.copy({place!r} + "/large.manifest", output / "update.manifest")
leave()
""")
    work.start(b"t" * 32, task(state))

    failed = ended(work)

    assert isinstance(failed, WorkFailed)
    assert "but a message holds" in logged(state, "work_failed")[0]["reason"]


def hanging(make: Make, state: SiteState, deadline: int) -> tuple[Work, int]:
    """Return the work whose worker was frozen as soon as it had begun, and the worker's process."""
    place = state.folder.path / "pids"
    work = make(f"""
import os
with open({str(place)!r}, "a") as pids: pids.write(f"{{os.getpid()}}\\n")
time.sleep(60)
""")
    work.start(b"t" * 32, task(state, deadline_seconds=deadline))
    while not place.exists() or not place.read_text().endswith("\n"):
        time.sleep(0.01)
    pid = int(place.read_text())
    os.kill(pid, signal.SIGSTOP)
    return work, pid


@pytest.mark.parametrize(
    ("deadline", "silent", "goes_on"), [(3600, 3599, True), (3600, 3601, False), (60, 899, True), (60, 901, False)]
)
def test_a_worker_that_hangs_is_replaced_at_the_next_attempt(
    make: Make, state: SiteState, monkeypatch: pytest.MonkeyPatch, *, deadline: int, silent: float, goes_on: bool
) -> None:
    """Planted bugs: any worker that is busy with the same work left to it; a slow one ended before its time."""
    work, pid = hanging(make, state, deadline)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + silent)

    assert work.start(b"u" * 32, task(state, attempt=2)) is None

    running = work._running
    assert running is not None
    assert running.task == b"u" * 32
    assert (running.trainer._process.pid == pid) is goes_on
    assert len(logged(state, "work_hangs")) == (not goes_on)
    os.kill(pid, signal.SIGKILL)


def test_a_command_that_says_it_is_done_but_takes_no_job_gets_none(make: Callable[..., Work], state: SiteState) -> None:
    """Planted bug: kept for its `stay_seconds`, at whose next job the daemon fails."""
    work = make("leave(); print('{\"done\": true}', flush=True)", stay_seconds=60)
    first, second = task(state), task(state, round=2)

    for name, manifest in ((b"t" * 32, first), (b"u" * 32, second)):
        work.start(name, manifest)
        done = ended(work)
        assert isinstance(done, WorkDone)
        assert done.upload.blob == BlobManifest((), b"")
