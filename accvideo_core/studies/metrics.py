"""How two sets of clips differ, and how a set moves and how sharp it is, each number with its 95 % interval.

A statistic here is a function of the clips that take part, `statistic(index) -> float`: what is expensive (projections, kernels)
is computed once, and an interval then asks for it again with groups of clips left out; `index` names no clip twice. N clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidValueError
from ..tiny.clips import keyed_generator

Statistic = Callable[[Tensor], float]

# 0.975 quantile of Student's t for 1 .. 20 degrees of freedom; beyond, 1.96 + 2.4 / degrees is right to 0.005.
STUDENT: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
STUDENT += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the median distance


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def student(degrees: int) -> float:
    """How many standard errors a 95 % interval reaches to each side."""
    return STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96 + 2.4 / degrees


def of_values(values: Sequence[float]) -> Estimate:
    """Mean of independent values, one a seed say, with Student's interval; without bounds for a single value."""
    count, mean = len(values), math.fsum(values) / max(1, len(values))
    if count < 2:
        return Estimate(mean, -math.inf, math.inf)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = student(count - 1) * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def jackknife(statistic: Statistic, count: int, groups: int = 20) -> Estimate:
    """A statistic of `count` clips; its interval from leaving out one of `groups` groups at a time (delete-a-group jackknife,
    Shao and Tu 1995, section 2.3). InvalidValueError for fewer than 2 clips."""
    if count < 2:
        raise InvalidValueError(f"{count} clips have no interval; give at least 2, better 100")
    groups = min(groups, count)
    rows = torch.arange(count)
    without = [statistic(rows[rows % groups != group]) for group in range(groups)]
    mean = math.fsum(without) / groups
    error = math.sqrt((groups - 1) / groups * math.fsum((v - mean) ** 2 for v in without))
    value, half = statistic(rows), student(groups - 1) * error
    return Estimate(value, value - half, value + half)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 512, seed: int = 0) -> Statistic:
    """Sliced 2-Wasserstein distance of two sets (N, ...): over random directions, the root of the mean squared distance between
    sorted projections (Bonneel et al. 2015). In units of one coordinate: N(0, s^2) from N(0, 1) has |s - 1|."""
    x, y = _flat(x, y)
    generator = keyed_generator("directions", seed)  # not the seed itself: latents may have been made from noise of that seed
    directions = torch.randn(projections, x.shape[1], generator=generator, dtype=x.dtype)
    directions = torch.nn.functional.normalize(directions, dim=1).to(x.device)
    lines = [(directions @ z.T).sort(1) for z in (x, y)]

    def distance(index: Tensor) -> float:
        taken = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, index.to(x.device), True)
        left, right = (line.values[taken[line.indices]] for line in lines)  # what is left of a sorted line is sorted
        return float((left - right).square().mean().sqrt())

    return distance


def median_distance(x: Tensor) -> float:
    """Median Euclidean distance between different members of a set (N, ...): the scale of `mmd`'s kernels."""
    x = x.flatten(1)
    return float(torch.pdist(x).median())


def mmd(x: Tensor, y: Tensor, scale: float, bandwidths: Sequence[float] = BANDWIDTHS) -> Statistic:
    """Squared maximum mean discrepancy of two sets (N, ...), the mean over Gaussian kernels of bandwidth `scale` times each of
    `bandwidths`. Unbiased, so that equal distributions give values on both sides of 0; row i of both may share a prompt
    (Gretton et al. 2012, Eq. 4). An interval of a value near 0 is rough: the statistic degenerates there."""
    x, y = _flat(x, y)
    terms = torch.zeros(len(x), len(x), dtype=x.dtype, device=x.device)
    for a, b, sign in ((x, x, 1.0), (y, y, 1.0), (x, y, -2.0)):
        squared = torch.cdist(a, b).square_()
        for width in bandwidths:
            terms += sign / len(bandwidths) * torch.exp(squared / (-2 * (width * scale) ** 2))
    terms.fill_diagonal_(0)

    def discrepancy(index: Tensor) -> float:
        return float(terms[index][:, index].sum() / (len(index) * (len(index) - 1)))

    return discrepancy


def ratio(upper: Tensor, lower: Tensor) -> Statistic:
    """Mean of one number a clip (N,) over the mean of another."""
    upper, lower = upper.double(), lower.double()
    return lambda index: float(upper[index].mean() / lower[index].mean())


def root_ratio(upper: Tensor, lower: Tensor) -> Statistic:
    """The same of squares: root mean square over root mean square."""
    squares = ratio(upper, lower)
    return lambda index: math.sqrt(squares(index))


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """(N,) mean squared difference of each clip's numbers."""
    return (x - y).flatten(1).square().mean(1)


def temporal_energy(video: Tensor) -> Tensor:
    """(N,) mean squared difference of consecutive frames of (N, C, T, H, W)."""
    return video.diff(dim=2).flatten(1).square().mean(1)


def high_frequency_energy(video: Tensor) -> Tensor:
    """(N,) mean energy a pixel of what varies across (N, C, T, H, W)'s frames at more than half the Nyquist frequency, that is
    with waves shorter than 4 pixels; what blur takes away."""
    height, width = video.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]).to(video.device)
    power = torch.fft.fft2(video, norm="ortho").abs().square()
    return power.mul(radius > 0.25).flatten(1).mean(1)


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape:
        raise InvalidValueError(f"sets of {tuple(x.shape)} and {tuple(y.shape)}; compare as many clips of one shape")
    return x.flatten(1), y.flatten(1)
