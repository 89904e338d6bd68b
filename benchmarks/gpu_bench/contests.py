"""Which shapes compete: those of docs/kernels.md, smaller ones where there is no GPU."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.competitors import attention, boundary
from benchmarks.competitors.attention import Attention, AttentionShape
from benchmarks.competitors.boundary import Boundary, ImageShape
from benchmarks.gpu_bench.contest import Contest, gradients

ATTENTION = (
    AttentionShape(8, 1, 256, 512, 1024),
    AttentionShape(8, 8, 256, 512, 128),
    AttentionShape(4, 8, 4096, 2048, 64),
    AttentionShape(8, 1, 256, 512, 1024, gated=True),
    AttentionShape(8, 8, 256, 512, 128, gated=True),
)
IMAGES = (ImageShape(64, (512, 512)), ImageShape(16, (256, 256)), ImageShape(2, (160, 160, 160)))
SMALL_ATTENTION = (AttentionShape(1, 2, 16, 24, 16), AttentionShape(1, 2, 16, 24, 16, gated=True))
SMALL_IMAGES = (ImageShape(2, (16, 16)), ImageShape(1, (16, 16, 16)))

ATTENTION_TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
LOSS_TOLERANCE = 1e-3
"""A competitor's sigmoid may take one voxel at the threshold for another."""


def attention_contest(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Contest[Attention]:
    """Return the contest of one shape of attention."""
    case = Attention.random(shape, device, dtype)
    precise = case.to(torch.float32)
    exact = attention.reference(precise)
    upstream = torch.randn(exact.shape, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    competitors = dict(attention.GPU if device.type == "cuda" else attention.CPU)
    competitors[f"sdpa ({attention.chosen_backend(case)})"] = competitors.pop("sdpa")
    if "products, compiled" in competitors and (shape.gated or shape.n > 1024):
        # autotuning takes a minute a shape: the two that are compared most get it
        competitors["products, compiled"] = partial(attention.compiled, mode="default")
    return Contest(
        f"DCA {shape}", case, competitors, case, exact.detach(),
        gradients(exact, precise.inputs, upstream.float()), upstream, ATTENTION_TOLERANCE[dtype],
    )  # fmt: skip


def boundary_contest(shape: ImageShape, device: torch.device) -> Contest[Boundary]:
    """Return the contest of one shape of images; all lay the same noise to be compared, their own to be timed."""
    case = Boundary.random(shape, device, torch.float32)
    checked = case.with_our_noise()
    exact = boundary.reference(checked)
    upstream = torch.ones((), device=device)
    competitors = boundary.GPU if device.type == "cuda" else boundary.CPU
    return Contest(
        f"PBL {shape}", case, competitors, checked, exact.detach(),
        gradients(exact, checked.inputs, upstream), upstream, LOSS_TOLERANCE, boundary.OTHER_RESULT,
    )  # fmt: skip


def contests(
    device: torch.device, *, only: str | None, quick: bool
) -> Iterator[Contest[Attention] | Contest[Boundary]]:
    """Yield what competes, one at a time, since each holds its tensors."""
    gpu = device.type == "cuda"
    shapes, images = (ATTENTION, IMAGES) if gpu else (SMALL_ATTENTION, SMALL_IMAGES)
    if only != "pbl":
        for shape in shapes[:2] if quick else shapes:
            yield attention_contest(shape, device, torch.bfloat16 if gpu else torch.float32)
    if only != "dca":
        for image in images[:1] if quick else images:
            yield boundary_contest(image, device)
