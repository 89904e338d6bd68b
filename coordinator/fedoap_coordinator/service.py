"""Sets a coordinator up in the one safe order, runs it, and takes it down again.

The folder is locked before anything is read, the ZAP handler runs before the port is bound, the port
is dialled with a stranger's key before anybody is told that it is ready.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

import zmq
from rich.console import Console as Terminal

from fedoap import __version__
from fedoap.config import FederationConfig
from fedoap.errors import ConfigError, DiskError, FedoapError, StorageError
from fedoap.heap import keep_freed_memory
from fedoap.protocol.coordinator import Coordinator
from fedoap.protocol.events import Note
from fedoap_coordinator import rows
from fedoap_coordinator.blobs import Blobs
from fedoap_coordinator.console import open_console
from fedoap_coordinator.daemon import Daemon
from fedoap_coordinator.damage import told
from fedoap_coordinator.descriptors import Doorkeeper, raise_limit
from fedoap_coordinator.downloads import Downloads
from fedoap_coordinator.enrolment import Enrolment
from fedoap_coordinator.folder import Keys, check_keys, open_ledger, prepare, read_endpoint, sole_owner, write_endpoint
from fedoap_coordinator.journal import Journal
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.merging import Merging
from fedoap_coordinator.metrics import MetricsServer
from fedoap_coordinator.notary import Notary
from fedoap_coordinator.port import Port
from fedoap_coordinator.reserve import Reserve
from fedoap_coordinator.store import Store
from fedoap_coordinator.zap import Doors, Zap

GOODBYE_MILLISECONDS = 500
SOFTWARE = f"fedoap {__version__}"


def run(config: FederationConfig, terminal: Terminal, *, exit_when_finished: bool) -> None:
    """Run a federation's coordinator until a signal or, if so asked, until the run is over.

    Raises:
        FedoapError: something that the operator can set right; nothing that a site was told is lost. A
            `DiskError` may be over by the next start.
    """
    keep_freed_memory()
    state = config.coordinator.state
    keys = prepare(state)
    with sole_owner(state), open_ledger(config) as ledger, Journal(state / "log.jsonl", time.time) as journal:
        check_keys(ledger, keys)
        check_plan(ledger, config)
        reserve = Reserve(state)
        reserve.make()
        try:
            with _daemon(config, keys, ledger, journal, terminal) as daemon, _until_signalled(daemon):
                daemon.serve(exit_when_finished=exit_when_finished)
        except StorageError as error:
            reserve.give_up()
            raise _noted(journal, DiskError(str(error))) from error
        except OSError as error:
            reserve.give_up()
            raise _noted(
                journal, DiskError(f"{error.filename or state}: the system refused: {error.strerror}")
            ) from error
        except FedoapError as error:
            raise _noted(journal, error) from error.__cause__


def _noted(journal: Journal, error: FedoapError) -> FedoapError:
    """Return the error, written down where the disk still takes it."""
    with suppress(OSError):
        journal.write(Note("ended_by_error", {"reason": str(error)}))
    return error


def check_plan(ledger: Ledger, config: FederationConfig) -> None:
    """Return if the run in the ledger was begun with this plan, or has not begun.

    Raises:
        ConfigError: naming the first setting that differs.
        StorageError: what the ledger holds is no plan.
    """
    begun = ledger.fact("plan") if ledger.tasks() else None
    if begun is None:
        ledger.set_fact("plan", config.plan.to_bytes())
        return
    with told(ledger.path):
        before = _flat(rows.parsed(begun, "plan"))
    after = _flat(config.plan.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            key_in_file = {"rounds": "rounds.count"}.get(key, key)
            raise ConfigError(
                f"{key_in_file} is {after.get(key)}, but the run in {config.coordinator.state} was begun with "
                f"{before.get(key)}: set it back, or name another coordinator.state for a new run"
            )


@contextmanager
def _daemon(
    config: FederationConfig, keys: Keys, ledger: Ledger, journal: Journal, terminal: Terminal
) -> Iterator[Daemon]:
    state = config.coordinator.state
    with ExitStack() as stack:
        notary = Notary(config.plan, SOFTWARE, keys.signing.secret)
        store = Store(ledger, Blobs(state), time.time, notary.sign, config.retention)
        stack.callback(store.blobs.close)
        merging = Merging(state, store, config.plan)
        stack.callback(merging.close)
        machine = _machine(config, keys, ledger, store)
        zap, port, endpoint = stack.enter_context(_listening(config, keys, ledger, store))
        console = open_console(terminal, time.monotonic)
        stack.callback(console.close)
        metrics = None
        if config.coordinator.metrics:
            metrics = MetricsServer(config.coordinator.metrics)
            stack.callback(metrics.close)
        daemon = Daemon(
            machine,
            port,
            Doorkeeper(port.shut, port.reopen, time.monotonic),
            zap,
            ledger,
            store,
            merging,
            Enrolment(config, ledger, keys),
            console,
            journal,
            Downloads(ledger, time.time),
            state,
            metrics,
        )
        if metrics:
            daemon.note(Note("metrics", {"address": metrics.address}))
        daemon.note(Note("ready", {"endpoint": endpoint}))
        yield daemon


def _machine(config: FederationConfig, keys: Keys, ledger: Ledger, store: Store) -> Coordinator:
    return Coordinator(
        config,
        ledger.roster(),
        store.history(),
        signing_key=keys.signing.secret,
        random_bytes=os.urandom,
        software=SOFTWARE,
        clock=time.time,
    )


@contextmanager
def _listening(config: FederationConfig, keys: Keys, ledger: Ledger, store: Store) -> Iterator[tuple[Zap, Port, str]]:
    """Bind the port behind a ZAP handler that is proved to be in force; yield both, and the real address."""
    raise_limit(len(config.sites))
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        zap = Zap(context, Doors.of(ledger.roster(), ledger.invites()))
        zap.start()
        stack.callback(zap.stop)
        port = Port(context, keys.curve, store.blobs.read)
        stack.callback(port.close, GOODBYE_MILLISECONDS)
        endpoint = port.bind(config.coordinator.bind, read_endpoint(config.coordinator.state))
        zap.prove(_reachable(endpoint), keys.curve.public)
        write_endpoint(config.coordinator.state, endpoint)
        yield zap, port, endpoint


@contextmanager
def _until_signalled(daemon: Daemon) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        daemon.stopping = True

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _reachable(endpoint: str) -> str:
    return endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(values, dict):
        return {prefix: values}
    nested = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
    return {key: value for part in nested for key, value in part.items()}
