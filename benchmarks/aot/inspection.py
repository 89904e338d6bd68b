"""Reads what a compiled kernel takes and does from its code."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

_DEFINED = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = ([\w.]+) ?(.*)$")
_VALUE = re.compile(r"%[\w#]+")
_FORWARDED: tuple[str, ...] = ("arith.ext", "arith.trunci", "arith.addi", "arith.subi", "arith.divsi")
_FORWARDED += (
    "arith.minsi",
    "arith.maxsi",
    "arith.select",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
)
"""What hands an offset on."""
_WIDE_LOADS = re.compile(
    r"ld\.global[\w.:]*\.v4\.[bfu]32|ld\.global[\w.:]*\.v2\.[bfu]64|cp\.async\.c[ag]\.shared\.global[^;]*0x10"
    r"|cp\.async\.bulk\.tensor|(?:global|buffer)_load_(?:dwordx4|b128)"
)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program takes."""

    registers: int
    """A thread's; on AMD vector and accumulation registers together."""
    stack: int
    """Bytes a thread keeps in memory: spilled registers, or arrays with computed indices."""
    shared: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Instructions:
    """How often what matters stands in the code."""

    wgmma: int
    mma: int
    mfma: int
    wide_loads: int
    """Loads from global memory of 16 bytes a thread, asynchronous copies among them."""

    @property
    def matrix(self) -> int:
        """Instructions for tensor cores of whatever kind."""
        return self.wgmma + self.mma + self.mfma


def resources(compiled: CompiledKernel) -> Resources:
    """Return what the assembler says."""
    if "cubin" in compiled.asm:
        registers, stack = _of_cubin(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers = _field(text, "vgpr_count")  # the sum: gfx90a and later share one file
        stack = _field(text, "private_segment_fixed_size") + _field(text, "vgpr_spill_count")
    return Resources(registers, stack, compiled.metadata.shared)


def instructions(compiled: CompiledKernel) -> Instructions:
    """Count in PTX, whose matrix instructions and loads the assembler takes over one for one, or in AMD's code."""
    text = compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]
    return Instructions(
        wgmma=text.count("wgmma.mma_async"),
        mma=len(re.findall(r"(?<!w)\bmma\.sync", text)),
        mfma=len(re.findall(r"\bv_mfma", text)),
        wide_loads=len(_WIDE_LOADS.findall(text)),
    )


def dot_kinds(ttir: str) -> set[str]:
    """Return the operand types of the kernel's products: "bf16", "f32 tf32", "f32 ieee" and so on."""
    kinds = set()
    for options, kind in re.findall(r"tt\.dot ([^\n:]*) : tensor<[\dx]+x(\w+)>", ttir):
        precision = re.search(r"inputPrecision = (\w+)", options)
        kinds.add(f"f32 {precision[1] if precision else 'ieee'}" if kind == "f32" else kind)
    return kinds


def narrow_offsets(ttir: str) -> list[str]:
    """Return the 32-bit products of an index and a run-time value that are added to an address: large tensors overflow.

    Products of arguments alone are sizes, and what is multiplied again in 64 bits is an index: both are fine.

    >>> narrow_offsets('''
    ...   %rows = arith.muli %row, %stride : tensor<64xi32>
    ...   %wide = arith.extsi %rows : tensor<64xi32> to tensor<64xi64>
    ...   %at = tt.addptr %base, %wide : tensor<64x!tt.ptr<f32>>, tensor<64xi64>''')
    ['%rows = %row * %stride']
    """
    return sorted(set(_narrow_offsets(ttir.splitlines())))


def _narrow_offsets(lines: list[str]) -> Iterator[str]:
    constant: set[str] = set()
    sizes: set[str] = set()  # of arguments and constants alone
    narrow: dict[str, str] = {}  # a value, and the product that it follows from
    for line in lines:
        if "tt.func" in line:
            sizes |= set(re.findall(r"(%\w+): i\d+", line))
        if (match := _DEFINED.match(line)) is None:
            continue
        name, operation, rest = match.groups()
        operands, kind = _VALUE.findall(rest.split(" : ")[0]), rest.rsplit(" : ", 1)[-1].split(" loc(")[0]
        for known in (constant, sizes):
            known.discard(name)  # regions beside each other reuse names
        causes = [narrow[operand] for operand in operands if operand in narrow]
        narrow.pop(name, None)
        hands_on = operation.startswith(_FORWARDED)
        if operation == "arith.constant" or (hands_on and operands and constant.issuperset(operands)):
            constant.add(name)
        elif (hands_on or operation == "arith.muli") and (sizes | constant).issuperset(operands):
            sizes.add(name)
        elif operation == "arith.muli" and "i64" in kind:
            continue
        elif operation == "arith.muli" and constant.isdisjoint(operands):
            narrow[name] = f"{name} = {operands[0]} * {operands[1]}"
        elif causes and (hands_on or operation == "arith.muli"):
            narrow[name] = causes[0]
        elif operation == "scf.for":
            starts = re.findall(r"(%[\w#]+) = (%[\w#]+)", rest)
            narrow |= {own: narrow[first] for own, first in starts if first in narrow}
        elif operation == "tt.addptr" and operands[1] in narrow:
            yield narrow[operands[1]]


def has_wide_multiply(ttir: str) -> bool:
    """Return whether addresses, or anything else, are multiplied in 64 bits."""
    return re.search(r"arith\.muli [^\n]* : (?:tensor<[\dx]+x)?i64", ttir) is not None


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    assert found is not None, name
    return int(found[1])


@cache
def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2]) + int(found[3])
