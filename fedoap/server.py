"""How the coordinator uses the sites' mean: averaging, momentum, or an adaptive step.

x are the weights that the sites started from, Delta = mean - x is the mean of their changes (the
pseudo-gradient of Reddi et al. 2021, arXiv:2003.00295), m and v are the moments, which only the
coordinator keeps. Every step works on one slice of values, in float64, so a merge with an optimizer
needs no more memory than a mean.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Average:
    """x + eta Delta, without moments; eta = 1 is plain averaging (McMahan et al. 2017, algorithm 1)."""

    eta: float = 1.0


@dataclass(frozen=True, slots=True)
class Momentum:
    """m = beta1 m + Delta, x + eta m: FedAvgM (Hsu et al. 2019, section 4.3, arXiv:1909.06335)."""

    eta: float = 1.0
    beta1: float = 0.9


@dataclass(frozen=True, slots=True)
class Adaptive:
    """m = beta1 m + (1 - beta1) Delta, x + eta m / (sqrt(v) + tau): algorithm 2 of Reddi et al. 2021.

    v becomes v + Delta^2 (`adagrad`), v - (1 - beta2) Delta^2 sign(v - Delta^2) (`yogi`) or
    beta2 v + (1 - beta2) Delta^2 (`adam`). Initially m = 0 and v = tau^2; there is no bias correction.
    """

    kind: Literal["adagrad", "adam", "yogi"]
    eta: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


Server: TypeAlias = Average | Momentum | Adaptive


def first_moments(server: Server) -> tuple[float, ...]:
    """Return the value that each of the optimizer's moments starts from, the same for every weight.

    >>> first_moments(Adaptive("adam", tau=0.5))
    (0.0, 0.25)
    """
    match server:
        case Average():
            return ()
        case Momentum():
            return (0.0,)
        case Adaptive(tau=tau):
            return (0.0, tau * tau)


def advance(server: Server, x: Values, mean: Values, moments: Values) -> tuple[Values, Values]:
    """Return the next weights and moments; `mean` may be overwritten.

    Args:
        server: the optimizer.
        x: the weights that the sites started from (values,).
        mean: the mean of their updates, or what the strategy's rule takes in its place (values,).
        moments: one row each (moments, values).
    """
    match server:
        case Average(eta):
            mean *= eta  # (1 - eta) x + eta mean: with eta = 1 the mean to the last bit
            return (mean if eta == 1.0 else mean + (1.0 - eta) * x), moments
        case Momentum(eta, beta1):
            m = beta1 * moments[0] + (mean - x)
            return x + eta * m, m[None]
        case Adaptive(kind, eta, beta1, beta2, tau):
            delta = mean - x
            m = beta1 * moments[0] + (1.0 - beta1) * delta
            v = _second_moment(kind, beta2, moments[1], np.square(delta))
            return x + eta * m / (np.sqrt(v) + tau), np.stack([m, v])


def _second_moment(kind: Literal["adagrad", "adam", "yogi"], beta2: float, v: Values, square: Values) -> Values:
    match kind:
        case "adagrad":
            return v + square
        case "adam":
            return beta2 * v + (1.0 - beta2) * square
        case "yogi":
            return v - (1.0 - beta2) * square * np.sign(v - square)
