"""`fedoap-node doctor`: what a site needs for its part in a federation, looked at piece by piece.

Each finding is one line; the first that is wrong does not keep the others from being looked at.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from fedoap.config import ModelRecord, SiteConfig, WorkerConfig, load_site
from fedoap.errors import FedoapError
from fedoap.sitefolder import SiteFolder
from fedoap_node.membership import Membership
from fedoap_node.probe import Finding, probe
from fedoap_node.ready import check_data
from fedoap_node.state import running
from fedoap_node.tunnel import Proxy

MODELS_ON_DISK = 6
"""Room that a site needs, in sizes of its model: download, personal state before and after, result, model folder."""
LITTLE_BYTES = 2 * 10**9
"""Less than this is too little to start with while the model's size is not known."""
TORCH_SECONDS = 180
_ASK_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps([torch.__version__, [torch.cuda.get_device_name(n) for n in range(count)]]))
"""


def examine(folder: SiteFolder) -> Iterator[Finding]:
    """Yield what there is to say of a site's folder, machine and line, in this order."""
    config = SiteConfig()
    try:
        config = load_site(folder.config)
        check_data(config, folder)
        yield Finding("data", "ok", f"{folder.config} and its datalist are in order")
    except FedoapError as error:
        yield Finding("data", "wrong", str(error))
    if config.worker.command is None:
        yield _device(config.worker)
    yield disk(folder.path, lambda path: shutil.disk_usage(path).free, _model_bytes(folder))
    process = running(folder)
    yield Finding(
        "node", "ok", f"runs, process {process}" if process else f"does not run: fedoap-node --site {folder.name}"
    )
    limit = memory_limit(process)
    if limit is not None:
        yield Finding("memory", "ok", f"node and worker together are limited to {limit / 1e9:.1f} GB (control group)")
    try:
        member = Membership.read(folder)
    except FedoapError as error:
        yield Finding("identity", "wrong", str(error))
        return
    yield from probe(member, Proxy.parse(config.network.proxy) if config.network.proxy else None)


def disk(place: Path, free: Callable[[Path], int], model_bytes: int | None) -> Finding:
    """Return whether there is room; `free` gives the bytes that are free at a path."""
    room = free(place)
    need = LITTLE_BYTES if model_bytes is None else MODELS_ON_DISK * model_bytes
    said = f"{place}: {room / 1e9:.1f} GB are free"
    if room < 1_000_000:
        return Finding("disk", "wrong", f"{place}: the disk is full; make room")
    if model_bytes is None:
        said += "; how much a model needs is known after the first round"
        return Finding("disk", "ok" if room >= need else "warning", said)
    if room < need:
        what = f"but this model needs {need / 1e9:.1f} GB ({MODELS_ON_DISK} times its size) besides prepared images"
        return Finding("disk", "wrong", f"{said}, {what}; make room")
    return Finding("disk", "ok", f"{said}, this model needs {need / 1e9:.1f} GB besides prepared images")


def device(worker: WorkerConfig, version: str, names: list[str]) -> Finding:
    """Return whether PyTorch sees the GPUs that `site.toml` asks for."""
    seen = f"PyTorch {version} sees {', '.join(names) if names else 'no GPU'}"
    asked, _, number = worker.device.partition(":")
    needed = max(worker.gpus, int(number or 0) + 1)
    if asked == "cpu":
        return Finding("device", "ok", f"worker.device is cpu; {seen}")
    if asked == "auto" and worker.gpus == 1:
        return Finding("device", "ok" if names else "warning", seen + ("" if names else ", so training is slow"))
    if len(names) < needed:
        what = f"worker.device is {worker.device} with gpus {worker.gpus}, but {seen}"
        todo = "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that the service may open /dev/nvidia*"
        return Finding("device", "wrong", f"{what}; {todo}")
    return Finding("device", "ok", seen)


def memory_limit(process: int | None, root: Path = Path("/")) -> int | None:
    """Return how many bytes the control group of a process, or ours, may use in all; nothing if it is not limited."""
    try:
        line = (root / "proc" / str(process or "self") / "cgroup").read_text().splitlines()[-1]
    except (OSError, IndexError):
        return None
    group, limits = root / "sys/fs/cgroup" / line.rpartition("::")[2].strip("/"), []
    while group != root / "sys/fs" and group != group.parent:
        with suppress(OSError, ValueError):  # `max`, or no file: not limited here
            limits.append(int((group / "memory.max").read_text()))
        group = group.parent
    return min(limits, default=None)


def _device(worker: WorkerConfig) -> Finding:
    """Ask a child process: a command that looks at a line need not load PyTorch."""
    command = [sys.executable, "-Ic", _ASK_TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("device", "wrong", f"PyTorch does not start within {TORCH_SECONDS} s; is a GPU hung? nvidia-smi")
    if done.returncode:
        last = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding("device", "wrong", f"PyTorch does not start: {last}; pip install 'fedoap[node]'")
    version, names = json.loads(done.stdout.splitlines()[-1])
    return device(worker, version, names)


def _model_bytes(folder: SiteFolder) -> int | None:
    try:
        return ModelRecord.model_validate_json(folder.model_record.read_bytes()).shared.blob.stat().st_size
    except (OSError, ValidationError):
        return None
