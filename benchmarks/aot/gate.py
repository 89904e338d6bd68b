"""What a compiled launch must keep to, and the record of each."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import triton

from benchmarks.aot.cases import cases
from benchmarks.aot.compiling import TARGETS, Launch, Target, compiling_for
from benchmarks.aot.inspection import (
    Instructions,
    Resources,
    dot_kinds,
    has_wide_multiply,
    instructions,
    narrow_offsets,
    resources,
)

SMALL = frozenset({"finalize_kernel", "column_sum_kernel", "fold_kernel", "pack_kernel", "grow_kernel"})
"""Kernels over a thousandth of the data: nothing hangs on the width of their loads."""

SPILLED = {("dkv_kernel", "sm_90"): 128, ("attend_kernel", "sm_90"): 8}
"""Bytes that a thread may keep in memory, where an H100 ran such tiles faster than any that spill nothing: at D = 128
56 us against 59 and more (benchmarks/results)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One launch as it was compiled."""

    case: str
    kernel: str
    config: str
    target: str
    triton: str
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    mfma: int
    wide_loads: int
    faults: tuple[str, ...]
    """What it does not keep to; empty if all is well."""


def records(target: Target) -> Iterator[Record]:
    """Yield the launches of all cases, each different one once, and those that do not compile."""
    seen: set[str] = set()
    for case in cases(target.hardware):
        with compiling_for(target) as launches, warnings.catch_warnings():
            warnings.simplefilter("error")  # Triton warns of what its next version compiles otherwise
            try:
                case.launch()
            except Exception as error:  # noqa: BLE001 - what does not compile is a result
                yield _broken(case.name, target, error)
        for launch in launches:
            if launch.compiled.hash not in seen:
                seen.add(launch.compiled.hash)
                yield _record(case.name, launch, target)


def _record(case: str, launch: Launch, target: Target) -> Record:
    taken, counts = resources(launch.compiled), instructions(launch.compiled)
    return Record(
        case, launch.kernel, launch.config, target.name, triton.__version__,
        taken.registers, taken.stack, taken.shared, counts.wgmma, counts.mma, counts.mfma, counts.wide_loads,
        tuple(faults(launch, target, taken, counts)),
    )  # fmt: skip


def _broken(case: str, target: Target, error: Exception) -> Record:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"does not compile: {type(error).__name__}: {lines[-1] if lines else ''}"[:300]
    return Record(case, "", "", target.name, triton.__version__, 0, 0, 0, 0, 0, 0, 0, (text,))


def faults(launch: Launch, target: Target, taken: Resources, counts: Instructions) -> Iterator[str]:
    """Yield what a launch does not keep to."""
    ttir: str = launch.compiled.asm["ttir"]
    allowed = SPILLED.get((launch.kernel, target.name), 0)
    if taken.stack > allowed:
        yield f"a thread keeps {taken.stack} bytes in memory, but must keep no more than {allowed}"
    if taken.shared > target.shared_bytes:
        yield f"a block takes {taken.shared} bytes of shared memory, but {target.name} has {target.shared_bytes}"
    kinds = dot_kinds(ttir)
    if kinds - {"f32 ieee", "f64"} and not counts.matrix:
        yield f"products of {', '.join(sorted(kinds))} compile to no matrix instruction"
    if target.name == "sm_90" and kinds & {"bf16", "f16"} and not counts.wgmma:
        yield "16-bit products compile to no wgmma"
    for offset in narrow_offsets(ttir):
        yield f"32-bit address arithmetic: {offset}"
    if launch.kernel not in SMALL:
        if not counts.wide_loads:
            yield "no load takes 16 bytes a thread"
        if not has_wide_multiply(ttir):
            yield "no multiplication in 64 bits: offsets of large tensors overflow"


def target_named(name: str) -> Target:
    """Return the target, or raise KeyError."""
    return TARGETS[name]
