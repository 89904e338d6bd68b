"""Which implementation of an operation runs.

A caller's `backend` decides; `auto` leaves it to the environment variable FEDOAP_KERNELS, and where that
is unset or `auto` too, to the inputs: Triton on a GPU, plain PyTorch elsewhere.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal, ParamSpec, TypeAlias, TypeVar, get_args

import torch

Backend: TypeAlias = Literal["auto", "eager", "triton"]
"""`eager` is the plain PyTorch reference; `auto` takes the fastest that the inputs allow."""

P = ParamSpec("P")
T = TypeVar("T")

VARIABLE = "FEDOAP_KERNELS"
_OLDEST_CAPABILITY = (8, 0)  # bfloat16, tf32 and asynchronous copies


def constant_to_compilers(function: Callable[P, T]) -> Callable[P, T]:
    """Let torch.compile call a function while it compiles, instead of tracing into what asks settings or the driver."""
    # torch.compiler.assume_constant_result sets the same, but loads the compiler for it
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def choose(
    backend: Backend, operation: str, device: torch.device, unsupported: str | None = None
) -> Literal["eager", "triton"]:
    """Return the implementation to run.

    Args:
        backend: what the caller asks for.
        operation: the caller's name, for errors.
        device: where its tensors are.
        unsupported: what in the inputs keeps kernels from running, if anything does: "q is torch.float64".

    Raises:
        ValueError: a name is unknown, or Triton is asked for and cannot run.
    """
    asked, source = backend, "backend"
    if backend == "auto":
        # an unknown value must not pass for `auto`
        asked, source = os.environ.get(VARIABLE) or "auto", VARIABLE  # type: ignore[assignment]
    if asked not in get_args(Backend):
        raise ValueError(f"{operation}: {source} is {asked!r}, but must be one of {', '.join(get_args(Backend))}")
    if asked == "eager" or (asked == "auto" and device.type != "cuda"):
        return "eager"
    obstacle = unsupported or _obstacle(device.type, device.index or 0)
    if obstacle is None:
        return "triton"
    if asked == "triton":
        raise ValueError(f"{operation}: {source} is 'triton', but {obstacle}")
    if not torch.compiler.is_compiling():
        # Python shows a text once for each place
        warnings.warn(f"{operation}: {obstacle}; plain PyTorch runs in place of Triton", stacklevel=3)
    return "eager"


@constant_to_compilers
def _obstacle(kind: str, index: int) -> str | None:
    """Return what keeps Triton from running on a device, or None."""
    return _asked_once(kind, index)


@cache
def _asked_once(kind: str, index: int) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if kind == "cuda":
        return _capability_obstacle(index)
    if kind != "cpu":
        return f"tensors are on {kind}"
    return (
        None if _interpreted() else "tensors are on cpu, where kernels run only if TRITON_INTERPRET is 1 from the start"
    )


def _capability_obstacle(index: int) -> str | None:
    """Return None for a GPU new enough; also where none is at hand, for the tensor is a fake then."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST_CAPABILITY:
        return None
    return f"compute capability of cuda:{index} is {capability[0]}.{capability[1]}, less than 8.0"


def _interpreted() -> bool:
    """Whether Triton interprets what is decorated, which it decides on import."""
    import triton.language  # noqa: PLC0415 - loading it takes a second, and nobody else on a CPU needs it
    from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415

    return isinstance(triton.language.cdiv, InterpretedFunction)
