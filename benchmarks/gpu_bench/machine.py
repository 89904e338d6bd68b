"""What the machine is and what it can do at most, measured."""

import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_bench.timing import Stopwatch


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What nothing on this machine exceeds."""

    copy_tb_s: float
    """Bytes read and written a second by a copy that fits no cache."""
    tflop_s: float
    """Of the product of two large random bfloat16 matrices (float32 on a CPU)."""

    def floor_us(self, flops: float, moved: float) -> float:
        """Return the microseconds that so much work takes at least."""
        return max(flops / self.tflop_s, moved / self.copy_tb_s) / 1e6


def ceilings(watch: Stopwatch, *, quick: bool) -> Ceilings:
    """Return this machine's."""
    large = watch.device.type == "cuda"
    source = torch.empty(2**30 if large else 2**24, dtype=torch.uint8, device=watch.device).random_()
    target = torch.empty_like(source)
    size = 8192 if large else 1024
    a, b = (torch.randn(size, size, device=watch.device).to(torch.bfloat16 if large else torch.float32) for _ in "ab")
    taken = watch.interleaved({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 0.2 if quick else 1.0)
    best = {name: quantiles.p20 for name, quantiles in taken.items()}  # other programs only slow it down
    return Ceilings(2 * source.numel() / best["copy"] / 1e6, 2 * size**3 / best["product"] / 1e6)


def description(device: torch.device) -> dict[str, str]:
    """Return names and versions of what results depend on."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
    if device.type != "cuda":
        return {"device": platform.machine(), **facts}
    facts |= {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda or torch.version.hip)}
    return facts | _nvidia_smi()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _nvidia_smi() -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(zip(fields, done.stdout.strip().split(", "), strict=False)) if done.returncode == 0 else {}
