"""The segmentation network: a U-Net with decoupled cross-attention at its bottleneck.

    image -> encoder -> F -> bottleneck_q  -> queries                       (personal)
                        F -> bottleneck_kv -> keys, values                  (shared)
             attention(queries, keys, values, bank) -> decoder -> adapter (personal) -> head (personal)

FedOAP (arXiv 2511.18847) fixes the two branches, the one softmax over an image's own tokens
(`projection`), the adapter and the head. The bank, with `joint` and `gated`, is this project's; without
a bank, or with an empty one, both give what `projection` gives. Which part is whose: `fedoap.params`.

Shapes: B batch, C channels, *S spatial size (H, W) or (D, H, W), N tokens at the bottleneck, H heads
of D channels each, M bank slots. Submodules that normalise are named `norm...`: `fedoap.params` relies
on it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedoap.config import Attention, NetworkConfig
from fedoap.errors import TensorsError
from fedoap.kernels import decoupled_cross_attention

JOINT_GATE = -3.0
"""Initial gate of `joint`: the bank starts with e**-3 = 5 % of the weight of as many local tokens."""
GATED_GATE = 0.0
"""Initial gate of `gated`: tanh(0) = 0 silences the bank, while the gate's own gradient is not 0."""
HEAD_BIAS = -2.5
"""Initial bias of the head: every voxel starts as tumour with p = 8 %, close to the share of tumour in masks
(the prior of Lin et al. 2017, section 4.1, arXiv:1708.02002). From p = 50 % some seeds spend most of a short
course on learning that tumours are rare."""


@dataclass(frozen=True, slots=True)
class Bank:
    """Keys and values that stand for all sites' tokens, and the weight of each slot."""

    keys: Tensor  # (H, M, D)
    values: Tensor  # (H, M, D)
    log_weights: Tensor  # (M,), -inf for an empty slot

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]], device: torch.device | str = "cpu") -> Self:
        """Return the bank of a published blob, float32, on the device.

        Raises:
            TensorsError: a tensor is missing.
        """
        names = ("keys", "values", "log_weights")
        if missing := [name for name in names if name not in arrays]:
            raise TensorsError(f"bank: tensor {missing[0]} is missing")
        return cls(*(torch.tensor(arrays[name], dtype=torch.float32, device=device) for name in names))

    def check(self, config: NetworkConfig) -> None:
        """Return if this network can read the bank.

        Raises:
            TensorsError: naming the tensor whose shape does not fit.
        """
        if not config.has_bank:
            raise TensorsError(f"bank: given, but network.attention is {config.attention}")
        slots = self.keys.shape[1] if self.keys.dim() == 3 else "slots"
        shape = (config.heads, slots, config.bottleneck // config.heads)
        for name, tensor, expected in (
            ("keys", self.keys, shape),
            ("values", self.values, shape),
            ("log_weights", self.log_weights, (slots,)),
        ):
            if tuple(tensor.shape) != expected:
                text = ", ".join(map(str, expected))
                raise TensorsError(f"bank: {name} has shape {tuple(tensor.shape)}, but the network calls for ({text})")


class Block(nn.Module):
    """Twice: 3x3 convolution, instance norm, ReLU."""

    def __init__(self, dimensions: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        # the norm that follows would cancel a bias
        self.conv1 = _conv(dimensions, channels_in, channels_out, 3)
        self.norm1 = _instance_norm(channels_out)
        self.conv2 = _conv(dimensions, channels_out, channels_out, 3)
        self.norm2 = _instance_norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same spatial size."""
        x = torch.relu_(self.norm1(self.conv1(x)))
        return torch.relu_(self.norm2(self.conv2(x)))


class Down(nn.Module):
    """Halve the spatial size, then one block."""

    def __init__(self, dimensions: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if dimensions == 2 else nn.MaxPool3d(2)
        self.block = Block(dimensions, channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of half the spatial size."""
        features: Tensor = self.block(self.pool(x))
        return features


class Up(nn.Module):
    """Double the spatial size, concatenate the encoder's features, then one block."""

    def __init__(self, dimensions: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        convolution = nn.ConvTranspose2d if dimensions == 2 else nn.ConvTranspose3d
        self.up = convolution(channels_in, channels_out, kernel_size=2, stride=2)
        self.block = Block(dimensions, 2 * channels_out, channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return features of the skip connection's spatial size."""
        features: Tensor = self.block(torch.cat([skip, self.up(x)], 1))
        return features


class Adapter(nn.Module):
    """Two convolutions and a 1x1 residual: a last block of the site's own, at full resolution."""

    def __init__(self, dimensions: int, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(dimensions, channels, channels, 3)
        self.norm1 = _instance_norm(channels)
        self.conv2 = _conv(dimensions, channels, channels, 3)
        self.norm2 = _instance_norm(channels)
        self.residual = _conv(dimensions, channels, channels, 1)
        self.residual_norm = _instance_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        own = self.norm2(self.conv2(torch.relu_(self.norm1(self.conv1(x)))))
        return torch.relu_(own + self.residual_norm(self.residual(x)))


class CrossAttention(nn.Module):
    """Queries of one branch attend to the tokens of the other and to the bank."""

    def __init__(self, channels: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)
        self.norm = nn.GroupNorm(math.gcd(32, channels), channels)
        if attention in ("joint", "gated"):
            self.gate = nn.Parameter(torch.full((heads,), JOINT_GATE if attention == "joint" else GATED_GATE))

    def tokens(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of each voxel, all heads side by side."""
        flat = features.flatten(2).mT  # (B, N, C)
        return self.key(flat), self.value(flat)

    def forward(self, queries: Tensor, features: Tensor, bank: Bank | None) -> Tensor:
        """Return GroupNorm(output projection of the attention + queries), the queries' shape."""
        q = self._split(self.query(queries.flatten(2).mT))
        k, v = (self._split(tokens) for tokens in self.tokens(features))
        attended = self._attend(q, k, v, bank)  # (B, H, N, D)
        projected = self.output(attended.transpose(1, 2).flatten(2)).mT.reshape(queries.shape)
        normed: Tensor = self.norm(projected + queries)
        return normed

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bank: Bank | None) -> Tensor:
        if bank is None or self.attention == "projection":
            empty = k.new_empty(self.heads, 0, k.shape[-1])
            return decoupled_cross_attention(q, k, v, empty, empty)
        keys, values = bank.keys.to(k.dtype), bank.values.to(v.dtype)
        if self.attention == "joint":
            bias = bank.log_weights + self.gate[:, None]  # (H, M)
            return decoupled_cross_attention(q, k, v, keys, values, slot_bias=bias)
        gate = torch.tanh(self.gate)
        return decoupled_cross_attention(q, k, v, keys, values, slot_bias=bank.log_weights, gate=gate, mode="gated")

    def _split(self, tokens: Tensor) -> Tensor:
        batch, count, channels = tokens.shape
        return tokens.view(batch, count, self.heads, channels // self.heads).transpose(1, 2)  # (B, H, N, D)


class FedOAPNet(nn.Module):
    """The network; its initial weights depend on the arguments alone.

    Args:
        config: what to build.
        seed: of the weights; the caller's generators stay untouched.
        tied: let bottleneck_kv serve as bottleneck_q too, as the shared path does.
        blank: leave the weights unset, for a caller that sets all of them.
    """

    def __init__(self, config: NetworkConfig, *, seed: int = 0, tied: bool = False, blank: bool = False) -> None:
        super().__init__()
        self.config, self.tied = config, tied
        # otherwise building would draw from the caller's generator and use whatever device is the default
        with torch.random.fork_rng(devices=[]), torch.device("meta" if blank else "cpu"):
            torch.default_generator.manual_seed(seed)
            self._build()
        if blank:
            self.to_empty(device="cpu")

    def _build(self) -> None:
        config, d = self.config, self.config.dimensions
        widths = [config.width * 2**level for level in range(config.depth + 1)]
        stages = [Down(d, narrow, wide) for narrow, wide in pairwise(widths[:-1])]
        self.encoder = nn.ModuleList([Block(d, config.in_channels, config.width), *stages])
        # bottleneck_kv comes first: where both are one module, its parameters go by this name
        self.bottleneck_kv = Down(d, widths[-2], widths[-1])
        self.bottleneck_q = self.bottleneck_kv if self.tied else Down(d, widths[-2], widths[-1])
        if config.attention != "off":
            self.attention = CrossAttention(widths[-1], config.heads, config.attention)
        self.decoder = nn.ModuleList([Up(d, wide, narrow) for narrow, wide in reversed(list(pairwise(widths)))])
        if config.adapter:
            self.adapter = Adapter(d, config.width)
        self.head = _head(d, config.width)

    def forward(self, image: Tensor, bank: Bank | None = None) -> Tensor:
        """Return the logits (B, 1, *S) of the images (B, C, *S).

        Raises:
            TensorsError: the bank does not fit the network.
        """
        if bank is not None:
            bank.check(self.config)
        skips = self._encode(image)
        x = self.bottleneck_q(skips[-1])
        if self.config.attention != "off":
            features = x if self.tied else self.bottleneck_kv(skips[-1])
            x = self.attention(x, features, bank)
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            x = up(x, skip)
        logits: Tensor = self.head(self.adapter(x) if self.config.adapter else x)
        return logits

    def tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, N, C) of the images' tokens, all heads side by side.

        Raises:
            TensorsError: the network has no attention.
        """
        if self.config.attention == "off":
            raise TensorsError("network: attention is off, so that an image has no keys and values")
        return self.attention.tokens(self.bottleneck_kv(self._encode(image)[-1]))

    def _encode(self, image: Tensor) -> list[Tensor]:
        features = []
        for stage in self.encoder:
            image = stage(image)
            features.append(image)
        return features


def _conv(dimensions: int, channels_in: int, channels_out: int, size: int) -> nn.Module:
    convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
    return convolution(channels_in, channels_out, size, padding=size // 2, bias=False)


def _head(dimensions: int, channels: int) -> nn.Module:
    head = nn.Conv2d(channels, 1, 1) if dimensions == 2 else nn.Conv3d(channels, 1, 1)
    assert head.bias is not None
    nn.init.constant_(head.bias, HEAD_BIAS)
    return head


def _instance_norm(channels: int) -> nn.Module:
    # one group a channel is instance norm, and on a CPU 3 to 5 times as fast as nn.InstanceNorm2d
    return nn.GroupNorm(channels, channels)
