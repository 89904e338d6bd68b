"""The table of parts against the network that it describes."""

import itertools

import pytest
from torch import nn

from fedoap.config import NetworkConfig
from fedoap.errors import ConfigError
from fedoap.params import PARTS, SELECTORS, check_matches, check_parts, is_personal, part_of, split
from fedoap.segmentation.network import FedOAPNet

NETWORKS = [
    FedOAPNet(NetworkConfig(width=4, depth=depth, attention=attention, adapter=adapter))
    for depth, attention, adapter in itertools.product([1, 3], ["off", "projection", "joint", "gated"], [False, True])
]


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_belongs_to_exactly_one_part(network: FedOAPNet) -> None:
    """Planted bug: a part `attention` beside `query`."""
    for name, _ in network.named_parameters():
        holders = [part for part in PARTS if is_personal(name, [part])]
        assert holders == [part_of(name)]


def test_every_part_has_a_parameter() -> None:
    names = [name for network in NETWORKS for name, _ in network.named_parameters()]

    check_matches(names, [*PARTS, *SELECTORS])


@pytest.mark.parametrize("network", NETWORKS)
def test_norms_selects_the_affine_parameters_of_all_norm_layers_and_nothing_else(network: FedOAPNet) -> None:
    """By type, whatever the names. Planted bug: a pattern that misses the adapter's residual_norm."""
    kinds = (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm)
    expected = {
        f"{module_name}.{name}"
        for module_name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, kinds)
        for name, _ in module.named_parameters()
    }

    assert {name for name, _ in network.named_parameters() if is_personal(name, ["norms"])} == expected


def test_shallow_is_the_stem_and_the_first_down_stage() -> None:
    names = [name for name, _ in NETWORKS[-1].named_parameters()]

    _, shallow = split(names, ["shallow"])

    assert {name.split(".")[1] for name in shallow} == {"0", "1"}
    assert all(part_of(name) == "encoder" for name in shallow)


def test_split_sorts_and_loses_nothing() -> None:
    names = [name for name, _ in NETWORKS[-1].named_parameters()]

    shared, personal = split(reversed(names), ["head", "norms"])

    assert sorted(shared + personal) == sorted(names)
    assert list(shared) == sorted(shared)
    assert {"head.weight", "attention.norm.bias"} <= set(personal)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("bottleneck", r"bottleneck, which is no part of the network; did you mean bottleneck_\w+\?"),
        ("norm", "did you mean norms?"),
        ("bn", "known are encoder, .*shallow"),
    ],
)
def test_an_unknown_part_is_refused_with_the_nearest_known_one(entry: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_parts(["head", entry])


def test_a_part_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="names gate, but this network has no such parameter"):
        check_matches(["head.weight"], ["head", "gate"])


def test_a_parameter_of_no_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parameter classifier\.weight belongs to no part"):
        part_of("classifier.weight")
