"""Augmentation of small pictures on white paper: geometry and colour, at a size that is known beforehand."""

from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image


@dataclass(frozen=True)
class Config:
    """How far a training picture may stray; every amount is drawn evenly from ± the value."""

    rotate: float = 10.0  # degrees
    scale: float = 0.15  # log2 of the zoom
    stretch: float = 0.15  # log2 of the change of aspect
    shift: float = 0.05  # of the side
    flip: float = 0.5  # probability of a mirror image
    hue: float = 0.03  # turns of the colour wheel
    colour: float = 0.2  # saturation may fall to 1 − 2 × this (below 0: complementary) or rise to 1 + this
    light: float = 0.15  # contrast and brightness
    grey: float = 0.05  # probability of no colour at all
    blur: float = 0.15  # probability of half resolution
    erase: float = 0.25  # probability that a rectangle of one colour hides a part (Zhong et al. 2020)


def augment(
    image: UInt8[np.ndarray, "h w 3"],
    height: int,
    width: int,
    cfg: Config,
    rng: np.random.Generator,
    strength: float = 1.0,
) -> UInt8[np.ndarray, "height width 3"]:
    """A picture bent and recoloured at random, at the size asked for; outside the original there is white paper.

    `strength` from 0 to 1 scales all amounts and probabilities but that of a mirror image.
    """
    if strength < 1:
        cfg = replace(cfg, **{f.name: strength * getattr(cfg, f.name) for f in fields(cfg) if f.name != "flip"})
    source = Image.fromarray(image)
    if rng.random() < cfg.blur:
        source = source.resize((max(8, source.width // 2), max(8, source.height // 2)), Image.Resampling.BILINEAR)
    out = np.asarray(_bend(source, height, width, cfg, rng), np.float32) / 255.0
    out = (np.clip(_recolour(out, cfg, rng), 0, 1) * 255.0 + 0.5).astype(np.uint8)
    if rng.random() < cfg.erase:
        tall, wide = (int(side * rng.uniform(0.2, 0.5)) for side in (height, width))
        top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
        out[top : top + tall, left : left + wide] = rng.integers(0, 256, 3)
    return out


def _bend(source: Image.Image, height: int, width: int, cfg: Config, rng: np.random.Generator) -> Image.Image:
    """The affine part: target pixel (x, y) reads the source at A (x, y) + b, about both centres."""
    angle = np.deg2rad(rng.uniform(-cfg.rotate, cfg.rotate))
    zoom = 2.0 ** rng.uniform(-cfg.scale, cfg.scale)
    stretch = 2.0 ** rng.uniform(-cfg.stretch, cfg.stretch)
    mirror = -1.0 if rng.random() < cfg.flip else 1.0
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_source = np.diag([source.width / width, source.height / height])
    a = to_source @ turn @ np.diag([mirror * stretch / zoom, 1 / (stretch * zoom)])
    centre = np.array([source.width / 2, source.height / 2])
    shift = rng.uniform(-cfg.shift, cfg.shift, 2) * (source.width, source.height)
    b = centre + shift - a @ np.array([width / 2, height / 2])
    coefficients = (a[0, 0], a[0, 1], b[0], a[1, 0], a[1, 1], b[1])
    return source.transform(
        (width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255)
    )


# NTSC luma and two chroma axes: a turn of the chroma plane changes hue and leaves lightness alone.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
_TO_RGB = np.linalg.inv(_TO_YIQ)


def _recolour(image: np.ndarray, cfg: Config, rng: np.random.Generator) -> np.ndarray:
    """One 3 × 3 matrix for hue and saturation, then contrast and brightness; white paper stays white under hue."""
    hue = 2 * np.pi * rng.uniform(-cfg.hue, cfg.hue)
    saturation = 0.0 if rng.random() < cfg.grey else rng.uniform(1 - 2 * cfg.colour, 1 + cfg.colour)
    c, s = saturation * np.cos(hue), saturation * np.sin(hue)
    matrix = _TO_RGB @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32) @ _TO_YIQ
    contrast = 2.0 ** rng.uniform(-cfg.light, cfg.light)
    brightness = rng.uniform(-cfg.light, cfg.light) / 2
    return (image @ matrix.T.astype(np.float32) - 0.5) * np.float32(contrast) + np.float32(0.5 + brightness)
