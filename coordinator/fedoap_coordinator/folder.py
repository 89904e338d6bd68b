"""The coordinator's state folder: its keys, its lock, the address it listens on.

Everything in it is its owner's alone (0700): it holds the federation's private keys and, while a
round is under way, the sites' updates.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedoap.config import CoordinatorConfig, FederationConfig
from fedoap.errors import ConfigError, IdentityError, StorageError
from fedoap.identity import (
    KEY_BYTES,
    TASK_CONTEXT,
    KeyPair,
    curve_keys,
    is_signed,
    read_private,
    signing_keys,
    write_private,
)
from fedoap_coordinator.blobs import BLOBS
from fedoap_coordinator.ledger import Ledger

LEDGER = "fed.sqlite"
LOCK = "lock"
ENDPOINT = "endpoint"
FROM_BACKUP = "put the whole state folder back from a backup"


@dataclass(frozen=True, slots=True)
class Keys:
    """The federation's signing keys and the server's CURVE keys."""

    signing: KeyPair = field(repr=False)
    curve: KeyPair = field(repr=False)


def prepare(state: Path) -> Keys:
    """Return the keys of a state folder, which are made, with the folder, where there are none.

    Raises:
        StorageError: the disk refused.
        IdentityError: a key file is damaged, others may read it, or it is gone from a folder that was in use.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = state / "keys"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{state}: state folder cannot be made: {error.strerror}") from None
    with _locked(folder / LOCK):
        for path in (folder / "federation.key", folder / "curve.key"):
            if not path.exists():
                _check_new(path, state / LEDGER)
                write_private(path, os.urandom(KEY_BYTES))
    return Keys(signing_keys(read_private(folder / "federation.key")), curve_keys(read_private(folder / "curve.key")))


def open_ledger(config: FederationConfig) -> Ledger:
    """Return the ledger of the configured state folder.

    Raises:
        StorageError: it cannot be opened, or is gone from a folder that was in use.
    """
    path, blobs = config.coordinator.state / LEDGER, config.coordinator.state / BLOBS
    if not is_written(path) and blobs.is_dir() and any(blobs.iterdir()):  # a new one would have them all deleted
        raise StorageError(
            f"{path}: ledger is missing, but {blobs} holds blobs that it knew: {FROM_BACKUP}, "
            "or name another coordinator.state for a new run"
        )
    return Ledger(path, config.federation)


def is_written(path: Path) -> bool:
    """Return whether there is a ledger with anything in it."""
    return path.exists() and bool(path.stat().st_size or path.with_name(f"{path.name}-wal").exists())


def check_keys(ledger: Ledger, keys: Keys) -> None:
    """Return if the newest task in the ledger, if any, was signed with this signing key.

    Raises:
        IdentityError: it was not.
    """
    for row in ledger.tasks()[-1:]:
        if not is_signed(keys.signing.public, row.signature, TASK_CONTEXT, row.packed):
            place = ledger.path.parent / "keys" / "federation.key"
            raise IdentityError(f"{place}: is not the key that signed the rounds in {ledger.path}: {FROM_BACKUP}")


def _check_new(key: Path, ledger: Path) -> None:
    if is_written(ledger):  # with a new key no site would know its coordinator, and no record would be signed by it
        raise IdentityError(f"{key}: key is missing, but {ledger} was written with it: {FROM_BACKUP}")


@contextmanager
def sole_owner(state: Path) -> Iterator[None]:
    """Keep every other coordinator from the folder as long as the context lasts.

    Raises:
        StorageError: another one runs, and which.
    """
    descriptor = os.open(state / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            raise StorageError(f"{state}: another coordinator, process {pid}, runs on this state folder") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def running(state: Path) -> int | None:
    """Return the process number of the coordinator that runs on the folder, or nothing."""
    try:
        descriptor = os.open(state / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return int(os.pread(descriptor, 20, 0) or b"0")
    finally:
        os.close(descriptor)
    return None


def invited_endpoint(config: CoordinatorConfig) -> str:
    """Return the address that an invitation names, with the real port where `bind` leaves it open.

    It is `advertise`, else `bind`; where that listens on every address, this machine's own, 127.0.0.1.

    Raises:
        ConfigError: the port is chosen at the start and the coordinator never started.
    """
    address = config.advertise or _dialled(config.bind)
    if not config.bind.endswith(":*"):
        return address
    listening = read_endpoint(config.state)
    if listening is None:
        raise ConfigError(
            f"coordinator.bind is {config.bind}, whose port is chosen at the start: "
            "start the coordinator before you invite, or name a port"
        )
    return re.sub(r":[^:]*$", f":{listening.rpartition(':')[2]}", address)


def is_local(endpoint: str) -> bool:
    """Return whether only processes on this machine reach the address."""
    return re.match(r"tcp://(127\.|localhost:|\[::1\])", endpoint) is not None


def _dialled(bind: str) -> str:
    """Return an address that reaches what listens at `bind`."""
    return re.sub(r"^tcp://(0\.0\.0\.0|\*|\[::\]):", "tcp://127.0.0.1:", bind)


def read_endpoint(state: Path) -> str | None:
    """Return the address that the coordinator listens on or last listened on, or nothing."""
    try:
        return (state / ENDPOINT).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def write_endpoint(state: Path, endpoint: str) -> None:
    """Note the address that the coordinator listens on."""
    draft = state / f".{ENDPOINT}"
    draft.write_text(endpoint + "\n")
    draft.replace(state / ENDPOINT)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
