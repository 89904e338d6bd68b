"""What a strategy's terms do to a site's gradients, after each backward pass and before they are clipped."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from fedoap.segmentation.objectives import add_proximal_gradient
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.strategies import Proximal, SharedPath, Term

Amend: TypeAlias = Callable[[int], None]
"""Changes the gradients of a step, which is told by its number in the site's course."""


def amendment(terms: Sequence[Term], model: SiteModel) -> Amend:
    """Return what all terms together do in a round that begins now."""
    amends = [amend for term in terms for amend in _amends(term, model)]

    def amend_all(step: int) -> None:
        for amend in amends:
            amend(step)

    return amend_all


def _amends(term: Term, model: SiteModel) -> list[Amend]:
    match term:
        case Proximal("shared", mu) if mu > 0:
            shared = list(model.shared_parameters().values())
            return [_pull(shared, shared, mu)]
        case Proximal("personal", mu) if mu > 0:
            twins = list(model.twins())
            return [_pull([own for _, own, _ in twins], [twin for _, _, twin in twins], mu)]
        case Proximal() | SharedPath():
            return []


def _pull(parameters: Sequence[Tensor], towards: Sequence[Tensor], mu: float) -> Amend:
    anchors = [one.detach().clone() for one in towards]
    return lambda _: add_proximal_gradient(parameters, anchors, mu)
