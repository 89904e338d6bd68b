"""Four organs as their scanners show them, drawn from random numbers.

Each function draws a patient without lesions from the patient's own random numbers: the grey image, the
region that lesions may lie in, and structures that are as bright as a lesion. What follows, lesions, noise
and a scanner's shading, is drawn for every image anew. Grey is 0 to 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy import ndimage

from fedoap.config import Modality
from fedoap.segmentation.shapes import Floats, Lesion, Look, Random, Space, beyond, cover, paint, spots

Organ: TypeAlias = Literal["brain-mr", "liver-ct", "breast-us", "lung-ct"]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A patient without lesions."""

    image: Floats
    tissue: Floats
    """Level of the tissue that lesions grow in: they stay where it is below 1."""
    grey: float
    """Of that tissue."""


def brain(space: Space, random: Random) -> Anatomy:
    """Return a head in FLAIR: bright scalp, dark skull, folded cortex, dark ventricles with bright caps."""
    tilt = random.uniform(-0.15, 0.15)
    head = space.ellipsoid(
        (0.0, 0.0), (random.uniform(0.84, 0.94), random.uniform(0.7, 0.8)), turn=tilt, along=(-0.1, 1.0)
    )
    head = head * (1 + 0.015 * space.noise(random, 0.3))
    image = paint(np.zeros(space.shape), head, 0.8 + 0.06 * space.noise(random, 0.05), 0.015)
    image = paint(image, head / 0.92, 0.06, 0.015)
    image = paint(image, head / 0.87, 0.14, 0.015)
    folds = space.noise(random, 0.045)
    brain_level = head / (0.84 - 0.03 * np.abs(folds))
    image = paint(image, brain_level, 0.52 + 0.03 * space.noise(random, 0.03), 0.03)
    sulci = np.exp(-((folds / 0.22) ** 2)) * cover((1.45 - head), 0.06) * cover(brain_level, 0.03)
    image = image - 0.26 * sulci
    white = np.maximum(head / 0.6 * (1 + 0.16 * space.noise(random, 0.1)), head / 0.8)
    image = paint(image, white, 0.42 + 0.02 * space.noise(random, 0.04), 0.06)
    midline = np.abs(space.positions[1] - np.tan(-tilt) * space.positions[0]) / 0.015
    image = image - 0.2 * cover(midline, 0.3) * cover(1.55 - head, 0.1) * cover(brain_level, 0.03)
    spread, length = random.uniform(0.1, 0.15), random.uniform(0.22, 0.32)
    ventricles = np.full(space.shape, np.inf)
    for side in (-1, 1):
        horn = space.ellipsoid((0.02, side * spread), (length, 0.07), turn=tilt - side * 0.25, along=(0.0, 0.4))
        ventricles = np.minimum(ventricles, horn * (1 + 0.06 * space.noise(random, 0.1)))
    caps = np.exp(-(((ventricles - 1.15) / 0.14) ** 2)) * cover(1.45 - np.abs(space.positions[0]) / (0.7 * length), 0.1)
    image = image + 0.3 * caps * cover(brain_level)
    image = paint(image, ventricles, 0.1, 0.08)
    inner = (head < 0.8) & (ventricles > 1.25)
    image = paint(image, spots(space, random, inner, int(random.integers(2, 5)), (0.035, 0.06)), 0.78, 0.15)
    return Anatomy(image, np.maximum(head / 0.8, beyond(ventricles, 1.15)), 0.46)


def liver(space: Space, random: Random) -> Anatomy:
    """Return an upper abdomen after contrast, with vessels, cysts and a gall-bladder in and at the liver."""
    image, body = _abdomen(space, random)
    lobe = space.ellipsoid((-0.02, -0.42), (0.5, 0.4), turn=random.uniform(-0.2, 0.2), along=(0.0, 0.85))
    left = space.ellipsoid((-0.28, -0.05), (0.22, 0.34), turn=0.3, along=(0.0, 0.7))
    whole = np.maximum(np.minimum(lobe, left) * (1 + 0.04 * space.noise(random, 0.15)), body / 0.81)
    tissue = random.uniform(0.52, 0.6)
    image = paint(image, whole, tissue + 0.02 * space.noise(random, 0.04), 0.03)
    starts = np.zeros((random.integers(4, 7), len(space.shape)))
    starts[:, :2] = (-0.05, -0.3)
    vessels = space.tubes(random, starts + 0.12 * random.standard_normal(starts.shape), 30, random.uniform(0.03, 0.045))
    image = image + random.choice((-0.13, 0.16)) * cover(vessels, 0.2) * cover(whole / 0.95, 0.03)
    inner = whole < 0.85
    cysts = spots(space, random, inner, int(random.integers(1, 4)), (0.04, 0.075))
    image = paint(image, cysts, tissue - 0.24, 0.12)
    bladder = space.ellipsoid((0.2, -0.2), (0.1, 0.15), turn=random.uniform(-0.6, 0.6), along=(0.0, 0.3))
    image = paint(image, bladder, tissue - 0.22, 0.08)
    return Anatomy(image, np.maximum(whole, beyond(np.minimum(cysts, bladder), 1.1)), tissue)


def breast(space: Space, random: Random) -> Anatomy:
    """Return a breast in ultrasound: skin, fat lobules, gland, muscle, ligaments with shadows; speckle comes later."""
    down = space.positions[0] + 0.05 * space.noise(random, 0.35, stretch=(1.0, 1.5))
    image = 0.36 + 0.05 * space.noise(random, 0.12, stretch=(0.6, 1.6))
    top, bottom = random.uniform(-0.6, -0.45), random.uniform(0.45, 0.65)
    gland = cover(1 + (top - down) / 0.1, 0.3) * cover(1 + (down - bottom) / 0.1, 0.3)
    image = image + gland * (0.22 + 0.06 * space.noise(random, 0.07, stretch=(0.7, 1.8)))
    everywhere = (down > -0.75) & (down < bottom)
    places = np.argwhere(everywhere)
    for _ in range(random.integers(6, 10)):  # fat lobules: flat, soft, nearly as dark as a lesion
        chosen = places[random.integers(len(places))]
        centre = [float(axis[tuple(chosen)]) for axis in space.positions]
        radii = (random.uniform(0.05, 0.09), random.uniform(0.14, 0.28))
        lobule = space.ellipsoid(
            (centre[0], centre[1]), radii, turn=random.uniform(-0.35, 0.35), along=(centre[-1], 0.25)
        )
        image = paint(image, lobule, random.uniform(0.27, 0.36), 0.22)
    image = paint(image, 1 + (down + 0.88) / 0.05, 0.85, 0.2)
    image = paint(image, 1 + (-0.99 - down) / -0.05, image, 0.2)
    muscle = cover(1 + (bottom - down) / 0.08, 0.3)
    fibres = np.sin(60 * (down + 0.15 * space.positions[1]) + 2 * space.noise(random, 0.3))
    image = image * (1 - muscle) + muscle * (0.34 + 0.12 * fibres)
    fascia = np.exp(-(((down - bottom) / 0.025) ** 2))
    image = image + 0.4 * fascia
    for _ in range(random.integers(2, 4)):  # ligaments and air throw shadows as dark as a lesion
        lane_across, width = random.uniform(-0.95, 0.95), random.uniform(0.03, 0.09)
        start = random.uniform(-0.7, 0.2)
        lane = np.exp(-(((space.positions[1] - lane_across - 0.15 * (space.positions[0] - start)) / width) ** 2))
        image = image * (1 - 0.6 * lane * cover(1 + (start - space.positions[0]) / 0.2, 0.3))
    return Anatomy(image, np.abs(down - (top + bottom) / 2) / ((bottom - top) / 2), 0.5)


def lung(space: Space, random: Random) -> Anatomy:
    """Return a chest in a lung window: bright wall, ribs and heart, dark lungs with branching vessels."""
    body = space.ellipsoid((0.0, 0.0), (random.uniform(0.72, 0.8), random.uniform(0.9, 0.97)), along=(0.0, 2.5))
    body = body * (1 + 0.012 * space.noise(random, 0.3))
    image = paint(np.zeros(space.shape), body, 0.55 + 0.02 * space.noise(random, 0.06), 0.015)
    image = paint(image, body / 0.9, 0.68 + 0.02 * space.noise(random, 0.04), 0.02)
    image = _ribs(space, random, image, 0.88, body)
    lungs = np.full(space.shape, np.inf)
    for side in (-1, 1):
        centre = (random.uniform(-0.05, 0.05), side * random.uniform(0.42, 0.46))
        one = space.ellipsoid(
            centre, (random.uniform(0.5, 0.56), random.uniform(0.34, 0.38)), turn=side * 0.15, along=(0.0, 0.95)
        )
        lungs = np.minimum(lungs, one)
    heart = space.ellipsoid((-0.12, 0.12), (0.26, 0.26), turn=0.4, along=(-0.2, 0.5))
    lungs = np.maximum(lungs * (1 + 0.035 * space.noise(random, 0.12)), 2.0 - np.minimum(heart, 1.9))
    image = paint(image, lungs, 0.13 + 0.025 * space.noise(random, 0.03), 0.025)
    spine = space.ellipsoid((0.52, 0.0), (0.13, 0.14), along=(0.0, 3.0))
    image = paint(image, spine, 0.9 + 0.05 * space.noise(random, 0.03), 0.06)
    starts = np.zeros((random.integers(10, 15), len(space.shape)))
    starts[:, 1] = np.where(np.arange(len(starts)) % 2 == 0, -0.25, 0.25)
    vessels = space.tubes(
        random, starts + 0.12 * random.standard_normal(starts.shape), 32, random.uniform(0.028, 0.038)
    )
    image = paint(image, np.maximum(vessels, lungs / 0.99), 0.6, 0.25)
    inner = lungs < 0.93
    image = paint(image, spots(space, random, inner, int(random.integers(3, 7)), (0.025, 0.045)), 0.62, 0.2)
    return Anatomy(image, lungs / 0.98, 0.13)


def _abdomen(space: Space, random: Random) -> tuple[Floats, Floats]:
    """Return fat, muscle, bones and every organ but the liver, and the level of the body."""
    body = space.ellipsoid((0.0, 0.0), (random.uniform(0.68, 0.76), random.uniform(0.88, 0.96)), along=(0.0, 2.5))
    body = body * (1 + 0.012 * space.noise(random, 0.3))
    image = paint(np.zeros(space.shape), body, 0.2 + 0.015 * space.noise(random, 0.05), 0.015)
    image = paint(image, body / 0.91, 0.48, 0.015)
    image = paint(image, body / 0.82, 0.22 + 0.03 * space.noise(random, 0.08), 0.02)
    image = _ribs(space, random, image, 0.865, body)
    organs = (
        ((random.uniform(-0.05, 0.1), 0.6), (0.26, 0.16), 0.58),  # spleen
        ((-0.25, random.uniform(0.28, 0.4)), (0.2, 0.26), 0.38),  # stomach
        ((0.32, -0.38), (0.14, 0.11), 0.66),
        ((0.32, 0.4), (0.14, 0.11), 0.66),  # kidneys
        ((0.24, 0.07), (0.07, 0.07), 0.82),  # aorta
        ((0.2, -0.1), (0.06, 0.08), 0.62),  # vena cava
    )
    for centre, radii, grey in organs:
        shape = space.ellipsoid(centre, radii, turn=random.uniform(-0.3, 0.3), along=(random.uniform(-0.2, 0.2), 0.7))
        image = paint(
            image, shape * (1 + 0.05 * space.noise(random, 0.12)), grey + 0.015 * space.noise(random, 0.03), 0.06
        )
    air = space.ellipsoid((-0.35, 0.34), (0.06, 0.12), along=(0.0, 0.3))
    image = paint(image, air, 0.0, 0.1)
    spine = space.ellipsoid((0.46, 0.0), (0.13, 0.15), along=(0.0, 3.0))
    image = paint(image, spine, 0.92 - 0.2 * cover(spine / 0.75, 0.08) + 0.05 * space.noise(random, 0.03), 0.06)
    return image, body


def _ribs(space: Space, random: Random, image: Floats, ring: float, body: Floats) -> Floats:
    angles = np.linspace(0, 2 * np.pi, 11)[:-1] + random.uniform(0, 0.5)
    down, across = space.positions[0], space.positions[1]
    for angle in angles:
        direction = np.cos(angle) * down * 1.25 + np.sin(angle) * across
        off = np.sin(angle) * down * 1.25 - np.cos(angle) * across
        along = 0.12 * np.sin(6 * space.positions[2]) if len(space.shape) == 3 else 0.0
        rib = np.hypot((body - ring) / 0.045, (off + along) / 0.1)
        image = paint(image, np.where(direction > 0, rib, np.inf), 0.95, 0.15)
    return image


def magnetic(space: Space, random: Random, image: Floats, _lesions: list[Lesion]) -> Floats:
    """Return the image with a coil's shading and Rician noise."""
    shading = 1 + 0.14 * np.clip(space.noise(random, 0.7), -2, 2)
    level = random.uniform(0.02, 0.045)
    real = image * shading + level * random.standard_normal(space.shape)
    return np.asarray(np.hypot(real, level * random.standard_normal(space.shape)))


def tomographic(space: Space, random: Random, image: Floats, _lesions: list[Lesion]) -> Floats:
    """Return the image with a scanner's grainy noise."""
    return np.asarray(image + random.uniform(0.02, 0.04) * space.noise(random, 0.9 / space.voxels))


def sonographic(space: Space, random: Random, image: Floats, lesions: list[Lesion]) -> Floats:
    """Return the image with what a lesion casts below it, fading with depth, and speckle."""
    for one in lesions:
        shade = random.choice((0.55, 0.8, 1.25))
        above = np.maximum.accumulate(cover(one.level, 0.1), axis=0) - cover(one.level, 0.1)
        image = image * (1 + (shade - 1) * np.clip(ndimage.gaussian_filter(above, 0.02 * space.voxels), 0, 1))
    image = image * (1.05 - random.uniform(0.1, 0.25) * space.positions[0])
    grain = 0.75 / space.voxels
    echo = np.hypot(space.noise(random, grain, stretch=(0.8, 1.5)), space.noise(random, grain, stretch=(0.8, 1.5)))
    return np.asarray(np.clip(image, 0.02, None) * (0.45 + 0.44 * echo))


@dataclass(frozen=True, slots=True)
class Kind:
    """One organ in one modality."""

    modality: Modality
    anatomy: Callable[[Space, Random], Anatomy]
    scanner: Callable[[Space, Random, Floats, list[Lesion]], Floats]
    look: Look


KINDS: Mapping[Organ, Kind] = {
    "brain-mr": Kind("mr", brain, magnetic, Look(core=0.12, rim=0.3, radius=(0.12, 0.27))),
    "liver-ct": Kind("ct", liver, tomographic, Look(core=-0.3, rim=-0.14, radius=(0.12, 0.26))),
    "breast-us": Kind("ultrasound", breast, sonographic, Look(core=-0.38, rim=-0.26, radius=(0.16, 0.32))),
    "lung-ct": Kind("ct", lung, tomographic, Look(core=0.3, rim=0.52, radius=(0.09, 0.24))),
}
