"""The table `[strategy]` of `fed.toml`: which algorithm runs, and its numbers where they are not its own."""

import math
from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedoap.fields import Frozen, Positive


class StrategyConfig(Frozen):
    """Which federated algorithm runs: an entry of `fedoap.strategies.STRATEGIES`."""

    name: str = "fedoap"
    personal: tuple[str, ...] | None = None
    """Parts that stay at the site instead of the strategy's own list (see `fedoap.params.PARTS`)."""
    weighting: Literal["cases", "uniform"] = "uniform"
    """How much a site counts in the mean: by its training cases, or all alike."""
    rule: Literal["mean", "trimmed_mean", "median"] = "mean"
    """How the sites' weights become one model, coordinate by coordinate; the last two count all sites alike."""
    trim_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.34
    """Share of the values that `trimmed_mean` cuts at each end."""
    max_norm_ratio: Annotated[float, Field(ge=1)] | None = None
    """An update farther from the model than this multiple of the sites' median distance does not count."""
    server_learning_rate: Positive | None = None
    """eta of the server optimizer (`fedoap.server`); this and all below are the strategy's own if not given."""
    server_beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the server optimizer's first moment."""
    server_beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the server optimizer's second moment."""
    server_tau: Positive | None = None
    """tau of the server optimizer, which keeps its steps from growing where changes are small."""
    proximal: Annotated[float, Field(ge=0)] | None = None
    """mu of mu/2 ||w - w_t||^2, which holds a site's parameters near the shared weights that the round began with."""
    head_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a round's steps that move the personal parts before the others move the shared ones."""
    alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the site's own weights in the mixture that it predicts with."""

    @model_validator(mode="after")
    def _robust_rules_count_alike(self) -> Self:
        if self.rule != "mean" and self.weighting == "cases":
            raise ValueError(f'weighting is cases, but rule {self.rule} counts all sites alike: set it to "uniform"')
        return self

    @property
    def fewest(self) -> int:
        """The fewest updates among which no single one decides the result; 1 for the mean, which does not guard it."""
        if self.rule == "trimmed_mean":
            return math.ceil(1 / Decimal(str(self.trim_fraction)))
        return 3 if self.rule == "median" else 1

    def trimmed(self, updates: int) -> int:
        """Return how many of the updates' values `trimmed_mean` cuts at each end: floor(trim_fraction * updates)."""
        return int(Decimal(str(self.trim_fraction)) * updates)  # as floats 0.29 * 100 is 28.999...
