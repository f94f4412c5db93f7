"""Looking at a trajectory: a contact sheet from noise to clean, and a plot of how far and how fast it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import InvalidValueError
from ..media import BACKGROUND, GAP, INK, Pixels, beside, contact_sheet, label_bar, stack

Decode = Callable[[Tensor], Pixels]
"""One latent (C, T, H, W) in model space to frames (T', H', W', 3) uint8."""

_CURVES = ((255, 176, 0), (100, 143, 255))  # told apart by the colour-blind too


@dataclass(frozen=True)
class KeyFigures:
    """One key of a trajectory, in root mean squares over all elements.

    norm      of the latent
    step      of the way to it from the key before, the noisier one; None for the noise, where it begins
    velocity  of that segment: step / (difference of the sigmas)
    """

    key: int
    sigma: float
    norm: float
    step: float | None
    velocity: float | None


def key_figures(keys: Sequence[Tensor], sigmas: Sequence[float]) -> list[KeyFigures]:
    """From noise to clean. keys: key 0 .. m, each (C, T, H, W); sigmas: theirs (`Header.key_sigmas`)."""
    if len(keys) != len(sigmas) or len(keys) < 2:
        raise InvalidValueError(f"{len(keys)} key latents for {len(sigmas)} sigmas; give key 0 to m and the sigma of each")
    figures = []
    for k in range(len(keys) - 1, -1, -1):
        step = None if k == len(keys) - 1 else _rms(keys[k].double() - keys[k + 1].double())
        velocity = None if step is None else step / (sigmas[k + 1] - sigmas[k])
        figures.append(KeyFigures(k, sigmas[k], _rms(keys[k].double()), step, velocity))
    return figures


def trajectory_sheet(
    keys: Sequence[Tensor],
    sigmas: Sequence[float],
    decode: Decode | None = None,
    title: str = "",
    moments: int = 5,
    width: int = 160,
) -> Pixels:
    """An image (H, W, 3) uint8: a row of stills for each key, noise first, then the plot of `key_figures`.

    keys, sigmas  as `key_figures` has them
    decode        makes a latent frames; without it stills show the latents themselves (`project`)
    moments       stills in a row, evenly spread over the clip
    width         of a still, in pixels
    """
    figures = key_figures(keys, sigmas)
    show = decode or project(keys[0])
    rows = []
    for it in figures:
        ends = {0: ", clean", len(keys) - 1: ", noise"}.get(it.key, "")
        rows.append((f"key {it.key}{ends}, sigma {it.sigma:.4f}", _resized(show(keys[it.key].float()), moments, width)))
    sheet = contact_sheet(rows, moments, title=title)
    return stack([sheet, plot(figures, max(sheet.shape[1], 480))])


def plot(figures: Sequence[KeyFigures], width: int = 800, height: int = 220) -> Pixels:
    """Norm of the latent by key beside size of the step and velocity by segment, noise on the left; (height, width, 3)."""
    halves = (width - GAP) // 2
    segments = figures[1:]
    norm = _panel("norm of the latent (rms)", [f"key {it.key}" for it in figures], [[it.norm for it in figures]], halves, height)
    ways = [[it.step or 0.0 for it in segments], [it.velocity or 0.0 for it in segments]]
    names = [f"to key {it.key}" for it in segments]
    return beside([norm, _panel("step (orange) and velocity (blue), rms", names, ways, halves, height)])


def project(reference: Tensor) -> Decode:
    """A way to see latents without a decoder: the three directions in channel space along which `reference` (C, T, H, W)
    varies most, as red, green and blue, scaled so that its 1st to 99th percentile fills each."""
    points = rearrange(reference.double(), "c t h w -> (t h w) c")
    mean = points.mean(0)
    axes = torch.linalg.eigh(torch.cov(points.T).reshape(points.shape[1], -1)).eigenvectors.flip(1)[:, :3]
    axes = axes * axes.sum(0).sign().where(axes.sum(0) != 0, torch.ones(axes.shape[1]))  # an axis has no direction of its own
    seen = (points - mean) @ axes
    low, high = (torch.quantile(seen[:: 1 + len(seen) // 100_000], q, dim=0) for q in (0.01, 0.99))

    def show(latent: Tensor) -> Pixels:
        values = (rearrange(latent.double(), "c t h w -> t h w c") - mean) @ axes
        scaled = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
        pixels: Pixels = scaled.round().to(torch.uint8).numpy()
        return pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, -1)

    return show


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _resized(frames: Pixels, moments: int, width: int) -> Pixels:
    """The moments that will be shown, at the width of a still: small latents as squares, large frames smoothed."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, moments).round().astype(int))
    size = (width, max(1, round(width * frames.shape[1] / frames.shape[2])))
    how = Image.Resampling.NEAREST if frames.shape[2] <= width else Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frames[i]).resize(size, how)) for i in chosen])


def _panel(title: str, names: Sequence[str], curves: Sequence[Sequence[float]], width: int, height: int) -> Pixels:
    """Curves over named places, every point with its value."""
    head = label_bar(title, width)
    image = Image.new("RGB", (width, max(height - head.shape[0], 60)), (BACKGROUND,) * 3)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    top = max(max(map(max, curves)), 1e-12)
    left, right, bottom, ceiling = 24, width - 32, image.height - 22, 18
    draw.line([(left, bottom), (right, bottom)], fill=(INK // 2,) * 3)
    places = [left + (right - left) * (i + 0.5) / len(names) for i in range(len(names))]
    for x, name in zip(places, names, strict=True):
        draw.text((x, bottom + 4), name, font=font, fill=(INK,) * 3, anchor="ma")
    for colour, values in zip(_CURVES, curves, strict=False):
        points = [(x, bottom - (bottom - ceiling) * value / top) for x, value in zip(places, values, strict=True)]
        draw.line(points, fill=colour, width=2)
        for (x, y), value in zip(points, values, strict=True):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            draw.text((x, y - 5), f"{value:.3g}", font=font, fill=colour, anchor="mb")
    return stack([head, np.asarray(image)], gap=0)
