"""A site's state on disk: one daemon at a time, and nothing that a crash at any point can spoil."""

import fcntl
import os
import time
from contextlib import suppress

from fedoap.config import Plan
from fedoap.errors import StorageError, TrainingError
from fedoap.identity import sync_folder
from fedoap.manifests import TaskManifest
from fedoap.sitefolder import SiteFolder
from fedoap.tensors import right_bytes
from fedoap_node.blobs import BlobStore
from fedoap_node.files import write_durably
from fedoap_node.results import Result, Results

LOOK_SECONDS = 0.5
"""A lock may be held for a moment by `running`, which only looks."""


class SiteState:
    """The state folder of one site, held by this process until `close` gives the lock back.

    Raises:
        StorageError: the disk refuses.
    """

    def __init__(self, folder: SiteFolder, lock: int) -> None:
        self.folder, self._lock = folder, lock
        self.blobs = BlobStore(folder.state)
        self.results = Results(folder)
        self.results.recover()
        self.cache = folder.state / "cache"
        self.cache.mkdir(exist_ok=True)
        for place in (folder.path, folder.state):  # what is made durable below needs a way there that is
            sync_folder(place)

    def keep_plan(self, plan: bytes) -> None:
        """Keep the plan that the coordinator sent."""
        write_durably(self.folder.state / "plan.json", plan)

    def plan(self) -> Plan:
        """Return the plan that was kept last.

        Raises:
            TrainingError: there is none yet.
        """
        try:
            return Plan.from_bytes((self.folder.state / "plan.json").read_bytes())
        except FileNotFoundError:
            raise TrainingError("plan: the coordinator has sent none yet") from None

    def finished(self, manifest: TaskManifest) -> Result | None:
        """Return the kept result of a task's work, if there is one; one that has rotted on the disk is removed."""
        with suppress(TrainingError):
            kept = self.results.find(manifest.work)
            if kept is None or right_bytes(kept.path, kept.blob) == kept.blob.size:
                return kept
        self.results.drop(manifest.work)
        return None

    def close(self) -> None:
        """Let another process hold the state."""
        self.blobs.close()
        self.results.close()
        os.close(self._lock)


def lock_state(folder: SiteFolder) -> int:
    """Return a descriptor that holds the site's lock until it is closed.

    Raises:
        StorageError: another process holds it, or the disk refuses.
    """
    path = folder.state / "lock"
    try:
        folder.state.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened: {error.strerror}") from None
    deadline = time.monotonic() + LOOK_SECONDS
    while not _is_locked(descriptor):
        if time.monotonic() < deadline:
            time.sleep(0.02)
            continue
        holder = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise StorageError(f"site {folder.name}: another node runs on {folder.path}, process {holder}") from None
    with suppress(OSError):  # on a full disk a node can still end in good order what it has in hand
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _is_locked(descriptor: int) -> bool:
    """Return whether the lock could be taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def running(folder: SiteFolder) -> int | None:
    """Return the process number of the node that runs on the folder, or nothing."""
    try:
        descriptor = os.open(folder.state / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return int(os.pread(descriptor, 20, 0) or b"0")
    finally:
        os.close(descriptor)
    return None
