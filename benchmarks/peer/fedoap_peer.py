"""fedoap as a peer of the harness that runs one payload through many frameworks: the real daemons, a stand-in worker.

    python fedoap_peer.py prepare     configuration, first weights, one invitation a site, in the working folder
    python fedoap_peer.py coordinator runs the coordinator and tells $PEERS_EVENTS what it logs; checks the average
    python fedoap_peer.py node --k K  joins as site K, then becomes its daemon

The harness's folder is on the module path: `payload` holds the arrays and the check of the final average.
"""

import argparse
import datetime as dt
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the process that watches the coordinator is counted with it
    import numpy as np
    from numpy.typing import NDArray

    from fedoap.manifests import BlobManifest

SITES = 3
STANDIN = Path(__file__).absolute().parent / "standin.py"
CONFIG, FIRST, LOG, HOME, MODEL = map(Path, ("fed.toml", "first.blob", "state/log.jsonl", "home", "model"))
LOOK_SECONDS = 0.02


def main() -> None:
    """Do what the command line says, in the working folder."""
    options = _options()
    match options.what:
        case "prepare":
            prepare(options)
        case "coordinator":
            coordinate(options)
        case "node":
            become_node(options.k)


def prepare(options: argparse.Namespace) -> None:
    """Write the configuration, the first weights, and an invitation for each site."""
    from fedoap.tensors import write_blob

    payload = importlib.import_module("payload")
    names = [f"site{k}" for k in range(SITES)]
    endpoint = f"tcp://127.0.0.1:{options.port}"
    CONFIG.write_text(
        f'federation = "peers"\nsites = {json.dumps(names)}\n'
        f'[coordinator]\nbind = "{endpoint}"\nadvertise = "{endpoint}"\n'
        f'[rounds]\ncount = {options.rounds}\n[network]\nattention = "off"\n'
    )
    Path("datalist.json").write_text('{"training": ["1.png"]}')
    first = {f"layer{k:02d}": array for k, array in enumerate(payload.stream(options.mb))}
    Path(f"{FIRST}.manifest").write_bytes(write_blob(FIRST, first).pack())
    for name in names:
        Path(f"{name}.token").write_text(_run("fedoap_coordinator", "invite", name, "--config", str(CONFIG)))


def coordinate(options: argparse.Namespace) -> None:
    """Run the coordinator to its end, its rounds told as they pass, and check what it made."""
    command = [sys.executable, "-m", "fedoap_coordinator", "--config", str(CONFIG), "--exit-when-finished"]
    process = subprocess.Popen(command)
    for row in _log(process):
        opens_first = row["event"] == "task_opened" and row["kind"] == "train" and row["round"] == 1
        closes = row["event"] == "task_closed" and row["kind"] == "train" and row["outcome"] == "done"
        if opens_first or closes:
            moment = dt.datetime.fromisoformat(str(row["time"])).timestamp()
            _tell({"t": moment, "round": 0 if opens_first else row["round"]})
    if process.wait():
        raise SystemExit(f"the coordinator ended with code {process.returncode}")
    _tell({"t": time.time(), "done": True, "max_error": _largest_error(options)})


def become_node(number: int) -> None:
    """Join, let the stand-in work, and turn into the daemon."""
    name = f"site{number}"
    token = Path(f"{name}.token").read_text().strip()
    _run("fedoap_node", "join", token, "--home", str(HOME), "--data", "datalist.json")
    with (HOME / name / "site.toml").open("a") as text:
        text.write(f"command = {json.dumps([sys.executable, str(STANDIN)])}\nkeep_warm = true\nstay_seconds = 60\n")
    os.environ["STANDIN_FIRST"] = str(FIRST.absolute())
    daemon = ["-m", "fedoap_node", "--site", name, "--home", str(HOME), "--exit-when-finished"]
    os.execv(sys.executable, [sys.executable, *daemon])  # noqa: S606 - the harness watches this very process


class Final:
    """The arrays of the exported model, each read when its turn comes, so that the check holds one at a time."""

    def __init__(self, blob: Path, manifest: "BlobManifest") -> None:
        self._blob, self._manifest = blob, manifest

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._manifest.tensors)

    def __iter__(self) -> "Iterator[NDArray[np.float32]]":
        """Yield them in the payload's order."""
        from fedoap.tensors import as_float32

        with self._blob.open("rb") as blob:
            for spec in self._manifest.tensors:
                yield as_float32(blob.read(spec.size), spec.dtype).reshape(spec.shape)


def _largest_error(options: argparse.Namespace) -> float:
    from fedoap.manifests import BlobManifest

    _run("fedoap_coordinator", "export", str(MODEL), "--config", str(CONFIG))
    shared = json.loads((MODEL / "model.json").read_bytes())["shared"]
    final = Final(Path(shared["blob"]), BlobManifest.unpack(Path(shared["manifest"]).read_bytes()))
    return float(importlib.import_module("payload").check(final, options.mb, options.rounds))


def _log(process: "subprocess.Popen[bytes]") -> Iterator[dict[str, str | int | float]]:
    """Yield the coordinator's log lines until it has ended and all are read."""
    while not LOG.exists() and process.poll() is None:
        time.sleep(LOOK_SECONDS)
    with LOG.open(encoding="utf-8") as log:
        pending, is_over = "", False
        while not is_over:
            is_over = process.poll() is not None
            *lines, pending = (pending + log.read()).split("\n")
            yield from map(json.loads, lines)
            time.sleep(LOOK_SECONDS)


def _tell(event: dict[str, str | int | float | bool]) -> None:
    with Path(os.environ["PEERS_EVENTS"]).open("a") as events:
        events.write(json.dumps(event) + "\n")


def _run(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "coordinator", "node"])
    parser.add_argument("--port", type=int, default=18700)
    parser.add_argument("--mb", type=float, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--k", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
