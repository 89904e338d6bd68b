"""What a strategy's terms do to a site's gradients after each backward pass, before they are clipped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedoap.errors import ConfigError
from fedoap.segmentation.objectives import add_proximal_gradient
from fedoap.segmentation.sitemodel import ControlVariates, SiteModel
from fedoap.strategies import Controls, HeadFirst, Inconsistency, Mixture, Proximal, SharedPath, Term

Amend: TypeAlias = Callable[[int], None]
"""Changes the gradients of a step, given its number in the round, from 0."""


@dataclass(frozen=True, slots=True)
class RoundTerms:
    """All terms together, in one round."""

    amends: tuple[Amend, ...]
    finishes: tuple[Callable[[], None], ...]

    def amend(self, step: int) -> None:
        """Change the gradients of a step."""
        for amend in self.amends:
            amend(step)

    def finish(self) -> None:
        """Store in the model what the round produced besides weights."""
        for finish in self.finishes:
            finish()


def begin_terms(terms: Sequence[Term], model: SiteModel, steps: int) -> RoundTerms:
    """Return what the terms do in the round of so many steps that begins now.

    Raises:
        ConfigError: a term needs more steps, or personal parts where there are none.
    """
    begun = [_begin(term, model, steps) for term in terms]
    return RoundTerms(
        tuple(amend for one in begun for amend in one.amends), tuple(finish for one in begun for finish in one.finishes)
    )


def _begin(term: Term, model: SiteModel, steps: int) -> RoundTerms:
    match term:
        case Proximal("shared", mu) if mu > 0:
            shared = list(model.shared_parameters().values())
            return RoundTerms((_pull(shared, shared, mu),), ())
        case Proximal("personal", mu) if mu > 0:
            twins = list(model.twins())
            return RoundTerms((_pull([own for _, own, _ in twins], [twin for _, _, twin in twins], mu),), ())
        case HeadFirst(fraction):
            return RoundTerms((_head_first(model, round(fraction * steps), steps),), ())
        case Controls():
            assert model.controls is not None
            return _correct(model.shared_parameters(), model.controls, steps)
        case Proximal() | SharedPath() | Mixture() | Inconsistency():  # these change no gradient
            return RoundTerms((), ())


def _pull(parameters: Sequence[Tensor], towards: Sequence[Tensor], mu: float) -> Amend:
    anchors = [one.detach().clone() for one in towards]
    return lambda _: add_proximal_gradient(parameters, anchors, mu)


def _head_first(model: SiteModel, head_steps: int, steps: int) -> Amend:
    """Let the first steps move only personal parameters, the others only shared ones.

    In algorithm 1 of Collins et al. 2021 (arXiv:2102.07078) the head's tau local updates come before those of
    the representation. The optimizer does not move a parameter whose gradient is removed.
    """
    head, body = list(model.personal_parameters().values()), list(model.shared_parameters().values())
    if not head:
        raise ConfigError(
            "strategy.personal is empty, but the strategy's first steps of a round move only personal parts"
        )
    if not 0 < head_steps < steps:
        told = f"training.steps_per_round is {steps}, of which {head_steps} are the head's"
        raise ConfigError(f"{told}, but head and body need at least one each")

    def amend(step: int) -> None:
        for parameter in body if step < head_steps else head:
            parameter.grad = None

    return amend


def _correct(parameters: dict[str, nn.Parameter], controls: ControlVariates, steps: int) -> RoundTerms:
    """Add c - c_i to each gradient; the mean of the uncorrected gradients becomes the new c_i.

    Algorithm 1 of Karimireddy et al. 2020 (arXiv:1910.06378), lines 10 to 12. Its option II computes the mean
    gradient from the distance that plain SGD covered; the mean itself equals that and is right for AdamW too.
    """
    device = next(iter(parameters.values())).device
    corrections = {name: torch.tensor(controls.common[name] - controls.own[name], device=device) for name in parameters}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    @torch.no_grad()
    def amend(step: int) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad
                parameter.grad += corrections[name]

    def finish() -> None:
        controls.own = {name: (one / steps).cpu().numpy() for name, one in sums.items()}
        controls.common = controls.own

    return RoundTerms((amend,), (finish,))
