"""Training losses of AccVideo (arXiv 2503.19462, Eqs. 6 to 8). Latents are in model space; B is the batch."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def segment_velocity(noisier: Tensor, cleaner: Tensor, sigma_noisier: Tensor, sigma_cleaner: Tensor) -> Tensor:
    """Mean velocity of the teacher between two key points: (l[k] - l[k+1]) / (sigma[k] - sigma[k+1]).

    noisier, cleaner (B, C, T, H, W) are l[k+1] and l[k]; the sigmas (B,). One Euler step with it from the noisier point
    lands exactly on the cleaner one.
    """
    return (cleaner - noisier) / _levels(sigma_cleaner - sigma_noisier, noisier)


def trajectory_loss(velocity: Tensor, noisier: Tensor, cleaner: Tensor, sigma_noisier: Tensor, sigma_cleaner: Tensor) -> Tensor:
    """Eq. 6: mean squared error (scalar) of the student's velocity at the noisier key point to the segment velocity."""
    return torch.mean((velocity - segment_velocity(noisier, cleaner, sigma_noisier, sigma_cleaner)) ** 2)


def x0_loss(velocity: Tensor, noisier: Tensor, clean: Tensor, sigma_noisier: Tensor) -> Tensor:
    """What CausVid, Self-Forcing and others regress instead: mean squared error (scalar) of the clean latent that the velocity
    points at, noisier - sigma * velocity, to the trajectory's clean end (key 0)."""
    return torch.mean((noisier - _levels(sigma_noisier, noisier) * velocity - clean) ** 2)


def euler_step(noisier: Tensor, velocity: Tensor, sigma_noisier: Tensor, sigma_cleaner: Tensor) -> Tensor:
    """(B, C, T, H, W): one Euler step along the velocity from sigma_noisier to sigma_cleaner, both (B,)."""
    return noisier + _levels(sigma_cleaner - sigma_noisier, noisier) * velocity


class GanLoss(NamedTuple):
    """What is minimised, of each logit; logits of any shape, the larger the more real, D = sigmoid(logit).

    student  of what the student made
    real     of what a head should call real
    fake     of what it should call fake
    """

    student: Callable[[Tensor], Tensor]
    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]

    def head(self, real: Tensor, fake: Tensor) -> Tensor:
        """A head's loss, a scalar."""
        return self.real(real).mean() + self.fake(fake).mean()


def minus_log(logit: Tensor) -> Tensor:
    """-log D. Eq. 7 has the student minimise log(1 - D(fake)), whose gradient vanishes where the head wins, as it does at first;
    this is the usual non-saturating form with the same fixed point (Goodfellow et al., arXiv 1406.2661, section 3). A head
    minimises it of real logits and `minus_log_not` of fake ones: Eqs. 7 and 8 as it sees them."""
    return softplus(-logit)


def minus_log_not(logit: Tensor) -> Tensor:
    """-log(1 - D)."""
    return softplus(logit)


def hinge_real(logit: Tensor) -> Tensor:
    """max(0, 1 - logit), with `hinge_fake` no gradient from what is told apart by a margin (Lim and Ye, arXiv 1705.02894)."""
    return relu(1 - logit)


def hinge_fake(logit: Tensor) -> Tensor:
    """max(0, 1 + logit)."""
    return relu(1 + logit)


GAN_LOSSES: MappingProxyType[str, GanLoss] = MappingProxyType(
    {
        "softplus": GanLoss(minus_log, minus_log, minus_log_not),
        "hinge": GanLoss(torch.neg, hinge_real, hinge_fake),
    }
)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Scalar: mean of losses (B, ...), each sample's weighed with one of weights (B,), which are taken to be of mean 1."""
    return (weights * losses.flatten(1).mean(1)).mean()


def approximate_r1(real: Tensor, disturbed: Tensor) -> Tensor:
    """Mean square (scalar) of how far a head's logits move when a little noise is added to the real latents: with noise of
    deviation s it is about s**2 times the R1 penalty, without second derivatives (Seaweed-APT, arXiv 2501.08316, Eq. 5)."""
    return torch.mean((disturbed - real) ** 2)


def _levels(sigma: Tensor, latent: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1, 1), in the latent's dtype."""
    return sigma.to(latent.dtype).view(-1, *[1] * (latent.ndim - 1))
