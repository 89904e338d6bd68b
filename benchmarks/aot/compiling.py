"""Compiles what the product launches, for hardware that is not at hand.

Inside `compiling_for` a launch `kernel[grid](...)` goes through Triton's own JIT, which specialises on
the arguments as ever, finds a driver that names the target, compiles, and runs nothing. So host code,
tile tables and argument specialisation are the product's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fedoap.kernels.hardware import Hardware, assumed


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU to compile for."""

    name: str
    backend: str
    arch: int | str
    warp: int
    hardware: Hardware
    shared_bytes: int
    """What one block may have."""


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, "ampere", 166912),
        Target("sm_86", "cuda", 86, 32, "ada", 101376),
        Target("sm_90", "cuda", 90, 32, "hopper", 232448),
        Target("gfx942", "hip", "gfx942", 64, "cdna", 65536),
    )
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One compiled launch."""

    kernel: str
    config: str
    compiled: CompiledKernel


@dataclass(frozen=True, slots=True)
class _Driver:
    """What the JIT asks of a driver before it compiles."""

    target: Target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp)

    def get_current_device(self) -> int:
        # the JIT keeps its kernels by device: one for each target
        return list(TARGETS).index(self.target.name)

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Launch]]:
    """Compile each launch inside instead of running it, with the target's own tiles; the list grows by it."""
    launches: list[Launch] = []
    stock = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> CompiledKernel:
        compiled = stock(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.fn.__name__, _config(self, compiled), compiled))
        return compiled

    driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    try:
        with assumed(target.hardware):
            yield launches
    finally:
        JITFunction.run = stock


def _config(kernel: JITFunction, compiled: CompiledKernel) -> str:
    """Return the constants given by name in capitals, warps and stages: "ROWS=128 KEYS=64 w8 s3"."""
    named = {kernel.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    constants = [f"{name}={value}" for name, value in named.items() if name.isupper() and value is not None]
    return " ".join([*constants, f"w{compiled.metadata.num_warps}", f"s{compiled.metadata.num_stages}"])
