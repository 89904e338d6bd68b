"""Seeds: each names one federation and one schedule of faults, and says what must hold at its end."""

import random
from collections import Counter
from dataclasses import replace
from functools import cache

from federation_builders import config
from fedoap.config import FederationConfig
from fedoap.protocol.history import History
from simulated.network import Faults
from simulated.world import World

ATTEMPTS = 1000
SMALL = config(attempts=ATTEMPTS, sites=("alpha", "beta"), rounds=1, has_bank=False)
EVERYONE = config(attempts=ATTEMPTS)
TWO_OF_THREE = config(attempts=ATTEMPTS, quorum=2)
ONLY_TRAINING = config(attempts=ATTEMPTS, quorum=2, rounds=1, has_bank=False)


def federation_of(seed: int) -> FederationConfig:
    """Return whose faults the seed tells: most are small, so that there can be many."""
    if seed % 100 == 0:
        return EVERYONE if seed % 200 else TWO_OF_THREE
    return ONLY_TRAINING if seed % 20 == 1 else SMALL


def faults_of(seed: int) -> Faults:
    """Return the seed's faults; where a quorum is enough, work fails now and then."""
    federation, faults = federation_of(seed), replace(Faults.of(random.Random(seed)), work=3.0)
    return replace(faults, work_fails=0.1) if federation.quorum < len(federation.sites) else faults


def run(federation: FederationConfig, seed: int, faults: Faults, counts: Counter[str] | None = None) -> History:
    """Return how a federation under faults ended.

    Raises:
        AssertionError: naming the seed that shows it again.
    """
    world = World(federation, seed, faults)
    try:
        history = world.run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    if counts is not None:
        counts.update(world.counts())
    return history


@cache
def quiet(is_small: bool, /) -> History:
    """Return how a federation ends to which nothing happens."""
    return run(SMALL if is_small else EVERYONE, 0, Faults())


def check(seed: int, counts: Counter[str] | None = None) -> None:
    """Return if the seed's federation ends as it must.

    Raises:
        AssertionError: naming the seed that shows it again.
    """
    federation = federation_of(seed)
    history = run(federation, seed, faults_of(seed), counts)
    if federation.quorum == len(federation.sites):
        alone = quiet(federation is SMALL)
        assert history.model == alone.model, f"seed {seed}: the final model is another than in the quiet world"
        assert history.bank == alone.bank, f"seed {seed}: the final bank is another than in the quiet world"
    done = [one for one in history.closed if one.outcome == "done" and one.kind != "init"]
    assert all(len(one.counted) >= federation.quorum for one in done), f"seed {seed}: merged without a quorum"
