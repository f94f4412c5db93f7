"""Samplers of the flow ODE: pure functions over a velocity function. They know nothing of files, text or ComfyUI.

A velocity function maps (latent (B, C, T, H, W) float32, sigma (B,) float32) to the velocity, same shape as the latent:
d latent / d sigma along the path, so that clean = latent - sigma * velocity. All state is float32, in model space.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .errors import InvalidValueError
from .schedule import Preset

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What an observer sees after a step: `latent` is at `sigma_next`, `velocity` and `denoised` were predicted at `sigma`."""

    index: int
    total: int
    sigma: float
    sigma_next: float
    latent: torch.Tensor
    velocity: torch.Tensor
    denoised: torch.Tensor


Observer = Callable[[Step], None]


def make_noise(shape: Sequence[int], seeds: Iterable[int]) -> torch.Tensor:
    """(B, ...) float32 standard normal noise on the CPU, one generator and one seed per sample.

    `shape` includes the batch, whose size must equal the number of seeds. A sample's noise depends on its own seed
    and shape alone, so batching never changes it; batch 1 equals ComfyUI's noise for that seed.
    """
    seeds = list(seeds)
    if len(seeds) != shape[0]:
        raise InvalidValueError(f"{len(seeds)} seeds for a batch of {shape[0]}; give one seed per sample")
    rows = []
    for seed in seeds:
        if not 0 <= int(seed) < 2**64:
            raise InvalidValueError(f"seed is {seed}; it must be from 0 to 2**64 - 1")
        rows.append(torch.randn(tuple(shape[1:]), generator=torch.Generator("cpu").manual_seed(int(seed)), dtype=torch.float32))
    return torch.stack(rows) if rows else torch.empty(tuple(shape), dtype=torch.float32)


def euler_flow(velocity: Velocity, noise: torch.Tensor, sigmas: torch.Tensor, observers: Iterable[Observer] = ()) -> torch.Tensor:
    """Integrate the flow ODE with Euler steps (paper, Eq. 5): l[j+1] = l[j] + (sigma[j+1] - sigma[j]) * v(l[j], sigma[j]).

    noise      (B, C, T, H, W), the state at sigmas[0]; for a start below sigma 1 it is the partly noised latent
    sigmas     (steps + 1,), falling, within [0, 1]
    observers  each called with a Step after every step; what they raise ends the sampling
    Returns the latent at sigmas[-1], float32, on the noise's device.
    """
    levels = check_sigmas(sigmas)
    observers = tuple(observers)
    latent = noise.float()
    total = len(levels) - 1
    for index in range(total):
        sigma, sigma_next = levels[index], levels[index + 1]
        v = velocity(latent, latent.new_full((latent.shape[0],), sigma)).float()
        previous, latent = latent, latent + (sigma_next - sigma) * v
        if observers:
            step = Step(index, total, sigma, sigma_next, latent, v, previous - sigma * v)
            for observe in observers:
                observe(step)
    return latent


def multistep_flow(velocity: Velocity, noise: torch.Tensor, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """Integrate the flow ODE by the two-step Adams-Bashforth method (Hairer, Norsett and Wanner, Solving ODEs I, III.1), the
    first step an Euler step: second order for one evaluation a step. Arguments as in `euler_flow`.

    Returns the latents at all sigmas, the noise first, float32, on the noise's device.
    """
    levels = check_sigmas(sigmas)
    latents, before = [noise.float()], None
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        latent = latents[-1]
        v = velocity(latent, latent.new_full((latent.shape[0],), sigma)).float()
        slope = v if before is None else v + (v - before) * ((sigma_next - sigma) / (sigma - levels[index - 1]) / 2)
        latents.append(latent + (sigma_next - sigma) * slope)
        before = v
    return latents


def few_step(velocity: Velocity, noise: torch.Tensor, preset: Preset, observers: Iterable[Observer] = ()) -> torch.Tensor:
    """Sample a student with its family's schedule (`preset.sigmas()`); arguments and result as in `euler_flow`.

    Raises InvalidValueError for a family whose students are not made for Euler steps (Wan's run UniPC).
    """
    if preset.solver != "euler":
        raise InvalidValueError(
            f"{preset.family} students are sampled with {preset.solver}, not with Euler steps; use ComfyUI's solver of that "
            "name, or euler_flow with preset.sigmas() if Euler is what you want"
        )
    return euler_flow(velocity, noise, preset.sigmas(), observers)


def check_sigmas(sigmas: torch.Tensor) -> list[float]:
    """The sigmas as Python floats; InvalidValueError unless they are finite, falling, within [0, 1] and at least two."""
    levels = [float(s) for s in sigmas]
    if len(levels) < 2:
        raise InvalidValueError(f"a schedule needs at least 2 sigmas, got {len(levels)}")
    if not all(0 <= s <= 1 for s in levels) or not all(a > b for a, b in itertools.pairwise(levels)):
        raise InvalidValueError(f"sigmas must fall strictly, within 1 to 0; got {levels}")
    return levels
