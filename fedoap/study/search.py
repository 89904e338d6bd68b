"""The same small search for each variant: trials on the first fold and seed, judged by validation Dice alone.

The trials follow from the study's file; test cases have no influence on what is chosen.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from fedoap.errors import ConfigError
from fedoap.segmentation.streams import stream
from fedoap.study.config import Search, Study
from fedoap.study.tables import Table, nested


def trials(study: Study, variant: str) -> tuple[Table, ...]:
    """Return the settings of a variant's trials, none if it has no search of its own.

    Raises:
        ConfigError: its settings have fewer combinations than there are trials.
    """
    search = study.config.search
    if search is None or variant in search.like:
        return ()
    values = search.settings | search.variants.get(variant, {})
    combined = math.prod(len(each) for each in values.values())
    if combined < search.trials:
        raise ConfigError(
            f"{study.path}: search.variants.{variant} combines to {combined} settings, "
            f"but each variant has search.trials = {search.trials}"
        )
    order = stream(study.config.split_seed, f"trials of {variant}").permutation(combined)
    drawn = sorted(int(place) for place in order[: search.trials])
    every = list(itertools.product(*values.values()))
    return tuple(dict(zip(values, every[place], strict=True)) for place in drawn)


def check_trials(study: Study) -> None:
    """Check the settings of every trial, so that a mistake shows before the first run.

    Raises:
        ConfigError: naming file, variant, key, value and expectation.
    """
    for variant in study.config.variants:
        for settings in trials(study, variant):
            study.simulation(variant, nested(settings))


def searched_by(search: Search | None, variant: str) -> str:
    """Return the variant whose trials choose this one's settings."""
    return search.like.get(variant, variant) if search else variant


def best(dice: Sequence[Mapping[str, float]]) -> int:
    """Return which trial has the highest validation Dice on average over sites; the first where several have.

    >>> best([{"a": 0.5, "b": 0.3}, {"a": 0.1, "b": 0.9}, {"a": 0.9, "b": 0.1}])
    1
    """
    means = [round(math.fsum(each.values()) / len(each), 9) for each in dice]
    return means.index(max(means))


def variants_in_order(study: Study, only: Sequence[str]) -> Iterator[str]:
    """Yield the variants that are asked for, or all, in the file's order.

    Raises:
        ConfigError: there is no such variant.
    """
    for name in only:
        if name not in study.config.variants:
            known = ", ".join(study.config.variants)
            raise ConfigError(f"{study.path}: --only names {name}, but the variants are {known}")
    yield from (name for name in study.config.variants if not only or name in only)
