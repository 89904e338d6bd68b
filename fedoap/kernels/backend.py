"""Which implementation of an operation runs."""

from typing import Literal, TypeAlias, get_args

Backend: TypeAlias = Literal["auto", "eager", "triton"]
"""`eager` is the plain PyTorch reference; `auto` takes the fastest that the inputs allow."""


def choose(backend: Backend, operation: str) -> Literal["eager"]:
    """Return the implementation that `backend` asks for.

    Raises:
        NotImplementedError: it asks for Triton kernels, which this version does not have.
        ValueError: there is no backend of this name.
    """
    match backend:
        case "auto" | "eager":
            return "eager"
        case "triton":
            raise NotImplementedError(f"{operation}: backend is 'triton', but this version has only 'eager'")
        case _:
            raise ValueError(f"{operation}: backend is {backend!r}, but must be one of {', '.join(get_args(Backend))}")
