"""Training losses of AccVideo (arXiv 2503.19462). Latents are in model space; B is the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_velocity(noisier: Tensor, cleaner: Tensor, sigma_noisier: Tensor, sigma_cleaner: Tensor) -> Tensor:
    """Mean velocity of the teacher between two key points: (l[k] - l[k+1]) / (sigma[k] - sigma[k+1]).

    noisier, cleaner (B, C, T, H, W) are l[k+1] and l[k]; the sigmas (B,). One Euler step with it from the noisier point
    lands exactly on the cleaner one.
    """
    gap = (sigma_cleaner - sigma_noisier).view(-1, *[1] * (noisier.ndim - 1))
    return (cleaner - noisier) / gap


def trajectory_loss(velocity: Tensor, noisier: Tensor, cleaner: Tensor, sigma_noisier: Tensor, sigma_cleaner: Tensor) -> Tensor:
    """Eq. 6: mean squared error (scalar) of the student's velocity at the noisier key point to the segment velocity."""
    return torch.mean((velocity - segment_velocity(noisier, cleaner, sigma_noisier, sigma_cleaner)) ** 2)
