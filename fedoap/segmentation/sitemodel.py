"""A site's model: the shared network, which is complete, and the personal one, which shares most of it.

Both are `FedOAPNet`s. The personal one holds the very same Parameter objects as the shared one, except
where the strategy makes a part personal: there it has its own, which start as copies of their shared
twins. In the shared network bottleneck_kv also serves as bottleneck_q, so the personal bottleneck_q
starts from bottleneck_kv. A step on the personal path trains the common and the personal parameters, a
step on the shared path the shared network alone, which is what a site that took no part runs.

Shared parameters have plain names and travel. The names of personal ones start with `personal.`; they
stay. If the strategy has control variates, c travels with the shared parameters under names that start
with `control.`, and a site's own c_i stays. If the strategy mixes, the site predicts with a weighted sum of
each personal parameter and its twin; the personal one's name then starts with `personal.mixed.`.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from fedoap.config import Plan
from fedoap.errors import ConfigError, TensorsError
from fedoap.params import CONTROL_PREFIX, PERSONAL_PREFIX, check_matches, is_personal
from fedoap.segmentation.network import Bank, FedOAPNet
from fedoap.strategies import Controls, Mixture, personal_parts, terms

State: TypeAlias = dict[str, NDArray[np.float32]]
Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]
ModelPath: TypeAlias = Literal["personal", "shared"]

_MIXED = "mixed."
_QUERY_BRANCH = "bottleneck_q.block.conv1.weight"


@dataclass(slots=True)
class ControlVariates:
    """c, which travels, and c_i, the site's own, by the names of the shared parameters; both start at 0."""

    common: State
    own: State


class SiteModel(nn.Module):
    """The shared and the personal network of one site; the first weights depend on the plan alone.

    Args:
        plan: What to build.
        blank: leave the weights unset, for a caller that loads shared ones and then resets the personal.

    Raises:
        ConfigError: the strategy is unknown, or one of its parts is not in the plan's network.
    """

    def __init__(self, plan: Plan, *, blank: bool = False) -> None:
        super().__init__()
        _check_bottleneck(plan)
        parts = personal_parts(plan.strategy)
        self.shared = FedOAPNet(plan.network, seed=plan.seed, tied=True, blank=blank)
        # a second bottleneck makes sense only if the site has weights of its own for it;
        # blank, because every personal weight becomes a copy of its shared twin
        self.personal = FedOAPNet(plan.network, tied=not is_personal(_QUERY_BRANCH, parts), blank=True)
        if plan.strategy.personal is not None:
            check_matches(_names(self.personal), parts)
        if parts and not any(is_personal(name, parts) for name in _names(self.personal)):
            kept = ", ".join(parts)
            raise ConfigError(f"strategy.name is {plan.strategy.name}, which keeps {kept}: this network has none of it")
        twins = self._tie(parts)
        # what a network consists of never changes, and to walk through it takes as long as a small one's step
        self._shared = dict(sorted(self.shared.named_parameters()))
        own = dict(self.personal.named_parameters())
        self._twins = tuple((name, own[name], self._shared[twin]) for name, twin in twins.items())
        self.controls: ControlVariates | None = None
        self._alpha: float | None = None
        for term in terms(plan.strategy):
            match term:
                case Controls():
                    self.controls = ControlVariates(self._zeros(), self._zeros())
                case Mixture(alpha):
                    self._alpha = alpha
                case _:
                    pass
        self.reset_personal()

    def forward(self, image: Tensor, bank: Bank | None = None, *, path: ModelPath = "personal") -> Tensor:
        """Return the logits (B, 1, *S) of one of the two networks."""
        logits: Tensor
        if path == "personal" and self._alpha is not None:
            logits = functional_call(self.personal, self._mixture(self._alpha), (image, bank))
        else:
            logits = (self.personal if path == "personal" else self.shared)(image, bank)
        return logits

    def own_network(self) -> FedOAPNet:
        """Return a copy of what the site predicts with, which shares nothing with this model."""
        network = copy.deepcopy(self.personal)
        if self._alpha is not None:
            with torch.no_grad():
                for name, mixed in self._mixture(self._alpha).items():
                    network.get_parameter(name).copy_(mixed)
        return network

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return what the shared network consists of, by plain name, sorted."""
        return dict(self._shared)

    def personal_parameters(self) -> dict[str, nn.Parameter]:
        """Return the site's own parameters, by name with prefix, sorted."""
        return {name: own for name, own, _ in self.twins()}

    def twins(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield each personal parameter's name with prefix, itself and its shared twin."""
        prefix = PERSONAL_PREFIX if self._alpha is None else PERSONAL_PREFIX + _MIXED
        for name, own, twin in self._twins:
            yield prefix + name, own, twin

    def shared_state(self) -> State:
        """Return a copy of the shared weights, complete without any personal part, and of what travels with them."""
        controls = {} if self.controls is None else _named(CONTROL_PREFIX, self.controls.common)
        weights = {name: _array(parameter) for name, parameter in self.shared_parameters().items()}
        return dict(sorted((controls | weights).items()))

    def load_shared(self, state: Arrays) -> None:
        """Take over shared weights, and c if the state holds it; personal weights stay as they are.

        Raises:
            TensorsError: names, shapes or dtypes are not those of `shared_state`; nothing was changed.
        """
        weights, controls = self._apart(CONTROL_PREFIX, state)
        _load("shared weights", self.shared_parameters(), weights)
        if self.controls is not None and controls:
            self.controls.common = controls

    def personal_state(self) -> State:
        """Return a copy of the personal weights, by name with prefix, and of the site's own control variates."""
        controls = {} if self.controls is None else _named(PERSONAL_PREFIX + CONTROL_PREFIX, self.controls.own)
        return controls | {name: _array(parameter) for name, parameter in self.personal_parameters().items()}

    def load_personal(self, state: Arrays) -> None:
        """Take over personal weights, and the site's own control variates if the state holds them.

        Raises:
            TensorsError: names, shapes or dtypes are not those of `personal_state`; nothing was changed.
        """
        weights, controls = self._apart(PERSONAL_PREFIX + CONTROL_PREFIX, state)
        _load("personal weights", self.personal_parameters(), weights)
        if self.controls is not None and controls:
            self.controls.own = controls

    def _mixture(self, alpha: float) -> dict[str, Tensor]:
        """Return alpha v + (1 - alpha) w by the personal network's names; w is constant in it.

        Deng et al. 2020, algorithm 1 (arXiv:2003.13461). The gradient of v is alpha times that of the mixture.
        """
        prefix = PERSONAL_PREFIX + _MIXED
        return {name.removeprefix(prefix): torch.lerp(w.detach(), v, alpha) for name, v, w in self.twins()}

    def _apart(self, prefix: str, state: Arrays) -> tuple[Arrays, State]:
        """Return the weights of a state, and the control variates of that prefix where the strategy has any."""
        if self.controls is None:
            return state, {}
        rest = {name: value for name, value in state.items() if not name.startswith(prefix)}
        controls = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if controls:
            _check_all("control variates", self.shared_parameters(), controls)
        return rest, {name: np.array(value, np.float32) for name, value in sorted(controls.items())}

    @torch.no_grad()
    def reset_personal(self) -> None:
        """Set every personal parameter to its shared twin's value, and the own control variates to 0: a new site's."""
        for _, own, twin in self.twins():
            own.copy_(twin)
        if self.controls is not None:
            self.controls.own = self._zeros()

    def _zeros(self) -> State:
        return {name: np.zeros(tuple(one.shape), np.float32) for name, one in self.shared_parameters().items()}

    def _tie(self, parts: tuple[str, ...]) -> dict[str, str]:
        """Put the shared Parameter objects into the personal network; return personal name -> shared twin's."""
        shared = dict(self.shared.named_parameters())
        twins = {}
        for name in sorted(_names(self.personal)):
            twin = name if name in shared else name.replace("bottleneck_q.", "bottleneck_kv.", 1)
            if is_personal(name, parts):
                twins[name] = twin
            else:
                module, _, leaf = name.rpartition(".")
                self.personal.get_submodule(module).register_parameter(leaf, shared[twin])
        return twins


def _names(network: FedOAPNet) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def _named(prefix: str, state: State) -> State:
    return {prefix + name: value.copy() for name, value in state.items()}


def _array(parameter: nn.Parameter) -> NDArray[np.float32]:
    return np.array(parameter.detach().cpu().numpy(), dtype=np.float32)


@torch.no_grad()
def _load(what: str, parameters: Mapping[str, nn.Parameter], state: Arrays) -> None:
    _check_all(what, parameters, state)
    for name, parameter in parameters.items():
        parameter.copy_(torch.tensor(state[name]))


def _check_all(what: str, parameters: Mapping[str, nn.Parameter], state: Arrays) -> None:
    for name in state:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            raise TensorsError(f"{what}: unknown tensor {name}" + (f"; did you mean {near[0]}?" if near else ""))
    for name, parameter in parameters.items():
        _check(what, name, parameter, state)


def _check(what: str, name: str, parameter: nn.Parameter, state: Arrays) -> None:
    if name not in state:
        raise TensorsError(f"{what}: tensor {name} is missing")
    array, shape = state[name], tuple(parameter.shape)
    if array.shape != shape:
        raise TensorsError(f"{what}: tensor {name} has shape {array.shape}, but the network's has {shape}")
    if array.dtype != np.float32:
        raise TensorsError(f"{what}: tensor {name} is {array.dtype}, but must be float32")


def _check_bottleneck(plan: Plan) -> None:
    """Refuse an input that leaves one voxel at the bottleneck, which an instance norm would always set to 0."""
    step = 2**plan.network.depth
    if all(size == step for size in plan.data.seen):
        key = "data.patch" if plan.data.patch else "data.size"
        raise ConfigError(
            f"{key} is {plan.data.seen}, but network.depth = {plan.network.depth} leaves one voxel of it; "
            f"double a number or lower the depth"
        )
