"""Distances, energies and their intervals, held against closed forms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accvideo_core.errors import InvalidValueError
from accvideo_core.studies import metrics

ROWS = torch.arange


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.5), (2.0, 1.0), (1.0, 0.5)])
def test_wasserstein_of_gaussians_in_one_dimension(mean: float, deviation: float) -> None:
    """W2^2 = mean^2 + (1 - deviation)^2 for unit x; exact on a grid of quantiles of unit variance."""
    x = torch.special.ndtri((ROWS(4000) + 0.5) / 4000)[:, None]
    x = x / x.square().mean().sqrt()
    y = mean + deviation * x[torch.randperm(4000, generator=torch.Generator().manual_seed(1))]
    expected = math.hypot(mean, 1 - deviation)
    assert metrics.sliced_wasserstein(x, y, 4)(ROWS(4000)) == pytest.approx(expected, rel=1e-5)


def test_sliced_wasserstein_of_gaussians_in_many_dimensions() -> None:
    """Directions see |mean|^2 / D of a shift: SW^2 = |mean|^2 / D + (1 - deviation)^2."""
    x, shift = normal(1500, 16, 1), torch.linspace(0, 1, 16, dtype=torch.float64)
    y = shift + 1.5 * normal(1500, 16, 2)
    expected = math.sqrt(float(shift.square().sum()) / 16 + 0.25)
    assert metrics.sliced_wasserstein(x, y, 3000)(ROWS(1500)) == pytest.approx(expected, rel=0.03)


def test_directions_have_nothing_to_do_with_noise_of_their_seed() -> None:
    x, y = torch.randn(2, 40, 512, generator=torch.Generator().manual_seed(0))
    assert metrics.sliced_wasserstein(x, y, seed=0)(ROWS(40)) < 0.5  # 1.3 along the samples themselves


def test_mmd_of_gaussians() -> None:
    """One kernel exp(-d^2 / 2 h^2): E k over N(a, 2 I) is (1 + 2/h^2)^(-D/2) exp(-|a|^2 / 2 (h^2 + 2))."""
    width, shift, h = 5, torch.full((5,), 0.4, dtype=torch.float64), 2.0
    x, y = normal(1000, width, 3), shift + normal(1000, width, 4)
    expected = 2 * (1 + 2 / h**2) ** (-width / 2) * (1 - math.exp(-float(shift.square().sum()) / (2 * (h**2 + 2))))
    estimate = metrics.jackknife(metrics.mmd(x, y, h, (1.0,)), 1000)
    assert estimate.low < expected < estimate.high and estimate.value == pytest.approx(expected, rel=0.2)
    assert metrics.median_distance(x) == pytest.approx(math.sqrt(2 * (width - 0.6)), rel=0.02)  # median of 2 chi^2


def test_mmd_of_equal_distributions_is_zero_on_average() -> None:
    values = [metrics.mmd(normal(40, 3, 2 * i), normal(40, 3, 2 * i + 1), 2.0)(ROWS(40)) for i in range(200)]
    assert abs(statistics.mean(values)) < 4 * statistics.stdev(values) / math.sqrt(200) and min(values) < 0 < max(values)


def test_equal_distributions_are_within_the_floor_and_others_are_not() -> None:
    """The teacher-against-teacher floor: rows share a prompt, which makes the sets alike row by row."""
    prompts = 3 * normal(300, 8, 5)
    first, second, third = (prompts + normal(300, 8, seed) for seed in (6, 7, 8))
    scale = metrics.median_distance(first)
    for measure in (lambda x: metrics.mmd(x, second, scale), lambda x: metrics.sliced_wasserstein(x, second)):
        floor, same, other = (metrics.jackknife(measure(x), 300) for x in (first, third, third + 1))
        assert other.low > max(floor.high, same.high) and abs(same.value - floor.value) < 0.1 * (other.value - floor.value)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    def covered(statistic: Callable[[Tensor, Tensor], metrics.Statistic], truth: float) -> float:
        pairs = (normal(40, 2, seed).unbind(1) for seed in range(200))
        found = [metrics.jackknife(statistic(x, y), 40) for x, y in pairs]
        return sum(e.low < truth < e.high for e in found) / len(found)

    assert 0.91 < covered(lambda x, y: lambda i: float(x[i].mean()), 0.0) < 0.985
    assert 0.90 < covered(lambda x, y: metrics.ratio(x + 5, y + 5), 1.0) < 0.985
    assert 0.87 < covered(lambda x, y: lambda i: float(x[i].var()), 1.0) < 0.985


def test_the_interval_of_a_mean_is_students() -> None:
    values = normal(12, 1, 9).flatten()
    ours = metrics.jackknife(lambda i: float(values[i].mean()), 12)
    theirs = metrics.of_values(values.tolist())
    assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.value, theirs.low, theirs.high))
    assert metrics.of_values([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.303 / math.sqrt(3))
    assert metrics.of_values([1.0]) == metrics.Estimate(1.0, -math.inf, math.inf)


def test_energies_of_waves_and_ramps() -> None:
    """A wave of amplitude 1 has energy 1/2, which counts if it is shorter than 4 pixels; a ramp differs by its slope."""
    x = torch.arange(24)
    for period, energy in ((3, 0.5), (8, 0.0), (4, 0.0)):
        wave = torch.sin(2 * math.pi * x / period).expand(1, 2, 3, 24, 24)
        assert metrics.high_frequency_energy(wave) == pytest.approx(energy, abs=1e-5)
        assert metrics.high_frequency_energy(wave.mT) == pytest.approx(energy, abs=1e-5)
    ramp = 0.25 * torch.arange(5.0)[:, None, None].expand(2, 3, 5, 4, 6)
    assert metrics.temporal_energy(ramp).tolist() == [0.0625, 0.0625]


def test_distance_of_pairs_is_twice_the_variance() -> None:
    x, y = normal(2000, 40, 10), normal(2000, 40, 11)
    assert float(metrics.squared_distance(x, y).mean()) == pytest.approx(2, rel=0.02)
    assert metrics.root_ratio(9 * torch.ones(3), torch.ones(3))(ROWS(3)) == 3


def test_sets_that_cannot_be_compared_are_named() -> None:
    with pytest.raises(InvalidValueError, match=r"\(3, 2\) and \(4, 2\)"):
        metrics.sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(InvalidValueError, match="1 clips"):
        metrics.jackknife(lambda index: 0.0, 1)
