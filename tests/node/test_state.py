import fcntl
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from fedoap.errors import StorageError
from fedoap.manifests import BlobManifest, TaskManifest
from fedoap.tensors import write_blob
from fedoap_node.state import SiteState, lock_state, running
from tests.node.test_results import PLAN, folder, model, worked


def opened(tmp_path: Path) -> SiteState:
    return SiteState(folder(tmp_path), lock_state(folder(tmp_path)))


def test_a_second_daemon_on_the_same_site_is_refused_and_named(tmp_path: Path) -> None:
    state = opened(tmp_path)

    with pytest.raises(StorageError, match=r"another node runs on .*, process \d+"):
        opened(tmp_path)

    state.close()
    opened(tmp_path).close()


def test_a_look_at_whether_a_node_runs_does_not_keep_one_from_starting(tmp_path: Path) -> None:
    """Planted bug: refused at once, with exit code 2, because `fedoap-node status` looked at that moment."""
    site = folder(tmp_path)
    with (site.state / "lock").open("wb") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(looked_at, fcntl.LOCK_UN)).start()

        state = opened(tmp_path)

    assert running(site) == os.getpid()
    state.close()


def test_after_a_commit_only_its_own_result_and_blobs_are_left(tmp_path: Path) -> None:
    state = opened(tmp_path)
    weights = BlobManifest.unpack(model(tmp_path).manifest.read_bytes())
    task = TaskManifest("f", PLAN.digest, "train", 1, 1, ("hospital_a",), 60, model=weights)
    for work in (b"\1" * 32, b"\2" * 32, task.work):
        state.results.finish(work, worked(state.results, tmp_path, work=work))
    for manifest in (weights, write_blob(tmp_path / "other", {"v": np.ones(4, np.float32)})):
        state.blobs.open(manifest.id, manifest)
        state.blobs.finish(manifest.id, manifest)

    state.results.keep_only(task.work)
    state.blobs.keep_only([weights.id])

    assert [path.name for path in (tmp_path / "hospital_a/state/work").iterdir()] == [task.work.hex()]
    assert state.blobs.stored() == {weights.id}
    state.close()


@pytest.mark.parametrize("rotted", [b"short", bytes(16)])
def test_a_kept_result_that_rotted_on_disk_is_done_again(tmp_path: Path, rotted: bytes) -> None:
    """Planted bug: the size alone looked at, so that every attempt fails by the same damaged result."""
    state = opened(tmp_path)
    task = TaskManifest("f", PLAN.digest, "train", 1, 1, ("hospital_a",), 60)
    state.results.finish(task.work, worked(state.results, tmp_path, work=task.work))
    (tmp_path / "hospital_a/state/work" / task.work.hex() / "update.blob").write_bytes(rotted)

    assert state.finished(task) is None
    assert not (tmp_path / "hospital_a/state/work" / task.work.hex()).exists()
    state.close()
