"""The network: its size, its shapes, its first weights, and what a bank does to it."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoap.config import Attention, NetworkConfig
from fedoap.errors import TensorsError
from fedoap.segmentation.network import Bank, FedOAPNet


def config(attention: Attention = "joint", **changes: int | bool) -> NetworkConfig:
    """Return a network small enough for tests: bottleneck of 16 channels in 2 heads of 8."""
    return NetworkConfig.model_validate({"width": 4, "depth": 2, "heads": 2, "attention": attention, **changes})


def bank(slots: int = 5, heads: int = 2, channels: int = 8) -> Bank:
    """Return a random bank."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(heads, slots, channels, generator=generator) for _ in range(2))
    return Bank(keys, values, torch.zeros(slots))


def size(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_authors_network_has_the_number_of_parameters_worked_out_by_hand() -> None:
    """A 3x3 convolution from i to o channels has 9 i o weights and no bias, an affine norm 2 o.

    stem          1 ->   64: 9*1*64     + 128  + 9*64*64     + 128  =     37 696
    down1        64 ->  128: 9*64*128   + 256  + 9*128*128   + 256  =    221 696
    down2       128 ->  256: 9*128*256  + 512  + 9*256*256   + 512  =    885 760
    down3       256 ->  512: 9*256*512  + 1024 + 9*512*512   + 1024 =  3 540 992
    bottleneck  512 -> 1024: 9*512*1024 + 2048 + 9*1024*1024 + 2048 = 14 159 872, twice
    attention: query, key, value, output 4 * 1024**2; norm 2*1024   =  4 196 352
    up from 1024: transposed 4*1024*512 + 512; block 1024 ->  512   =  2 097 664 + 7 079 936
    up from  512: transposed 4*512*256  + 256; block  512 ->  256   =    524 544 + 1 770 496
    up from  256: transposed 4*256*128  + 128; block  256 ->  128   =    131 200 +   442 880
    up from  128: transposed 4*128*64   + 64;  block  128 ->   64   =     32 832 +   110 848
    adapter: 9*64*64 + 128, twice; 64*64 + 128                      =     78 208
    head: 64 + 1                                                    =         65
    """
    network = FedOAPNet(NetworkConfig(width=64, depth=4, heads=1, attention="projection"))

    assert [size(stage) for stage in network.encoder] == [37_696, 221_696, 885_760, 3_540_992]
    assert [size(network.bottleneck_q), size(network.bottleneck_kv)] == [14_159_872, 14_159_872]
    assert size(network.attention) == 4_196_352
    assert [size(stage) for stage in network.decoder] == [9_177_600, 2_295_040, 574_080, 143_680]
    assert [size(network.adapter), size(network.head)] == [78_208, 65]
    assert size(network) == 49_470_913
    assert network.attention.norm.num_groups == 32


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([2, 3]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["off", "projection", "joint", "gated"]),
    st.booleans(),
)
def test_every_configuration_gives_one_logit_a_voxel_and_a_gradient_to_each_parameter(
    dimensions: int, channels: int, depth: int, attention: Attention, adapter: bool
) -> None:
    """Planted bugs: decoder stages in the encoder's order, adapter built but not called."""
    chosen = config(attention, dimensions=dimensions, in_channels=channels, depth=depth, adapter=adapter)
    network = FedOAPNet(chosen, tied=attention == "off")
    shape = tuple(2**depth * n for n in (1, 2, 2)[:dimensions])
    image = torch.randn(2, channels, *shape)

    logits = network(image, bank(channels=chosen.bottleneck // 2) if chosen.has_bank else None)
    torch.autograd.backward([logits.sum()])

    assert logits.shape == (2, 1, *shape)
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("attention", ["joint", "gated"])
@pytest.mark.parametrize("given", ["missing", "empty", "dead"])
def test_no_bank_or_an_empty_one_gives_what_projection_gives(attention: Attention, given: str) -> None:
    """Planted bug: gate added to the local logits as well."""
    network, projection = FedOAPNet(config(attention), seed=3), FedOAPNet(config("projection"), seed=3)
    projection.load_state_dict({name: value for name, value in network.state_dict().items() if "gate" not in name})
    image = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        network.attention.gate.fill_(0.7)
        dead = Bank(bank().keys, bank().values, torch.full((5,), -torch.inf))

        logits = network(image, {"missing": None, "empty": bank(slots=0), "dead": dead}[given])

        torch.testing.assert_close(logits, projection(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attention", "most"), [("joint", 0.1), ("gated", 0.0)])
def test_a_bank_is_nearly_silent_at_first_and_heard_once_its_gate_opens(attention: Attention, most: float) -> None:
    """`most` is the share of an open gate's effect that the first gate may have."""
    network = FedOAPNet(config(attention), seed=3)
    image = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        without, silent = network(image), network(image, bank())
        network.attention.gate.fill_(3.0)
        heard = network(image, bank())

    assert (heard - without).norm() > 0.02 * (without - without.mean()).norm()
    assert (silent - without).norm() <= most * (heard - without).norm()


def test_a_voxel_starts_as_unlikely_to_be_tumour_as_masks_make_it() -> None:
    """Planted bug: the head's bias left as PyTorch draws it (p = 0.5)."""
    with torch.no_grad():
        probability = torch.sigmoid(FedOAPNet(config("joint"))(torch.randn(2, 1, 32, 32))).mean()

    assert 0.05 < probability < 0.15


@pytest.mark.parametrize("attention", ["joint", "gated"])
def test_a_gate_learns_from_the_first_step(attention: Attention) -> None:
    network = FedOAPNet(config(attention))

    torch.autograd.backward([network(torch.randn(2, 1, 16, 16), bank()).square().sum()])

    assert network.attention.gate.grad is not None
    assert (network.attention.gate.grad != 0).all()


def test_the_first_weights_depend_on_the_seed_alone_and_leave_the_callers_generator() -> None:
    """Planted bug: torch.manual_seed without restoring the state."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digest = _digest(FedOAPNet(config(), seed=11))

    assert torch.equal(torch.rand(3), expected)
    assert _digest(FedOAPNet(config(), seed=11)) == digest
    assert _digest(FedOAPNet(config(), seed=12)) != digest


def test_tokens_are_the_keys_and_values_that_the_attention_reads() -> None:
    """All heads side by side: a bank made of an image's own tokens doubles each of them.

    Planted bug: heads interleaved instead of side by side.
    """
    network = FedOAPNet(config("joint"), seed=2)
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        network.attention.gate.zero_()
        tokens = network.tokens(image)  # each (1, 16, 16)
        keys, values = (side_by_side[0].view(16, 2, 8).transpose(0, 1) for side_by_side in tokens)
        own = Bank(keys, values, torch.zeros(16))

        torch.testing.assert_close(network(image, own), network(image), rtol=1e-4, atol=1e-5)


def test_a_network_without_attention_has_no_tokens() -> None:
    with pytest.raises(TensorsError, match="attention is off"):
        FedOAPNet(config("off")).tokens(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(
    ("attention", "wrong", "text"),
    [
        ("joint", bank(heads=1), r"keys has shape \(1, 5, 8\), but the network calls for \(2, 5, 8\)"),
        ("joint", bank(channels=16), r"keys has shape \(2, 5, 16\), but the network calls for \(2, 5, 8\)"),
        ("gated", Bank(bank().keys, bank(slots=4).values, torch.zeros(5)), r"values has shape \(2, 4, 8\)"),
        ("gated", Bank(bank().keys, bank().values, torch.zeros(4)), r"log_weights has shape \(4,\)"),
        ("projection", bank(), "given, but network.attention is projection"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(attention: Attention, wrong: Bank, text: str) -> None:
    with pytest.raises(TensorsError, match=text):
        FedOAPNet(config(attention))(torch.zeros(1, 1, 16, 16), wrong)


def test_a_published_bank_is_read_from_its_arrays() -> None:
    made = bank()
    arrays = {"keys": made.keys.numpy(), "values": made.values.numpy(), "log_weights": made.log_weights.numpy()}

    read = Bank.from_arrays(arrays)

    assert torch.equal(read.keys, made.keys)
    with pytest.raises(TensorsError, match="tensor values is missing"):
        Bank.from_arrays({"keys": arrays["keys"]})


def test_half_precision_runs_under_autocast() -> None:
    network = FedOAPNet(config("joint"))
    image = torch.randn(2, 1, 16, 16)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(image, bank())

    assert torch.isfinite(logits).all()
    assert (logits - network(image, bank())).norm() < 0.1 * logits.norm()


def _digest(network: FedOAPNet) -> str:
    content = b"".join(parameter.detach().numpy().tobytes() for parameter in network.parameters())
    return hashlib.sha256(content).hexdigest()
