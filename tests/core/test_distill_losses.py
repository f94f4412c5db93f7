"""The losses of distillation against their definitions, and their gradients against float64 finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accvideo_core.distill.losses import (
    GAN_LOSSES,
    approximate_r1,
    euler_step,
    segment_velocity,
    trajectory_loss,
    x0_loss,
)
from accvideo_core.schedule import key_sigmas

SIGMAS = key_sigmas(50, 5, 7.0).double()
HIGH, LOW = SIGMAS[[0, 2, 4]], SIGMAS[[1, 3, 5]]


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NOISIER, CLEANER = made(3, 2, 1, 2, 2, seed=1), made(3, 2, 1, 2, 2, seed=2)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "trajectory": lambda v: trajectory_loss(v, NOISIER, CLEANER, HIGH, LOW),
    "x0": lambda v: x0_loss(v, NOISIER, CLEANER, HIGH),
    "softplus student": lambda v: GAN_LOSSES["softplus"].student(v).mean(),
    "softplus head": lambda v: GAN_LOSSES["softplus"].head(v[:1], v[1:]),
    "hinge student": lambda v: GAN_LOSSES["hinge"].student(v).mean(),
    "hinge head": lambda v: GAN_LOSSES["hinge"].head(v[:1], v[1:]),
    "r1": lambda v: approximate_r1(v[:1], v[1:2]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], (made(3, 2, 1, 2, 2, seed=3).requires_grad_(),))


def test_an_euler_step_along_the_segment_velocity_lands_on_the_cleaner_key_where_the_trajectory_loss_is_zero() -> None:
    v = segment_velocity(NOISIER, CLEANER, HIGH, LOW)
    torch.testing.assert_close(euler_step(NOISIER, v, HIGH, LOW), CLEANER)
    assert float(trajectory_loss(v, NOISIER, CLEANER, HIGH, LOW)) == 0
    torch.testing.assert_close(float(trajectory_loss(v + 0.5, NOISIER, CLEANER, HIGH, LOW)), 0.25)


def test_the_x0_loss_is_zero_where_the_velocity_points_at_the_clean_end_and_weighs_noise_levels_by_their_square() -> None:
    v = (NOISIER - CLEANER) / HIGH.view(-1, 1, 1, 1, 1)
    assert float(x0_loss(v, NOISIER, CLEANER, HIGH)) < 1e-24
    torch.testing.assert_close(x0_loss(v + 1, NOISIER, CLEANER, HIGH), (HIGH**2).mean())


def test_at_undecided_heads_softplus_is_log_2_and_hinge_1_a_side() -> None:
    nothing = torch.zeros(2, 1, 2, 2)
    assert float(GAN_LOSSES["softplus"].student(nothing).mean()) == pytest.approx(math.log(2))
    assert float(GAN_LOSSES["softplus"].head(nothing, nothing)) == pytest.approx(2 * math.log(2))
    assert float(GAN_LOSSES["hinge"].head(nothing, nothing)) == 2 and float(GAN_LOSSES["hinge"].student(nothing).mean()) == 0


def test_the_student_still_learns_from_a_head_that_wins_by_far_unlike_in_the_saturating_form() -> None:
    logit = torch.tensor([-20.0], requires_grad=True)
    (ours,) = torch.autograd.grad(GAN_LOSSES["softplus"].student(logit).mean(), logit)
    (paper,) = torch.autograd.grad(torch.log(1 - torch.sigmoid(logit)).mean(), logit)
    assert float(ours) == pytest.approx(-1) and abs(float(paper)) < 1e-8


def test_a_hinge_head_has_no_gradient_from_what_it_tells_apart_by_a_margin() -> None:
    real, fake = torch.tensor([1.5, 0.0], requires_grad=True), torch.tensor([-1.5, 0.0], requires_grad=True)
    GAN_LOSSES["hinge"].head(real, fake).backward()
    assert real.grad is not None and real.grad.tolist() == [0, -0.5] and fake.grad is not None and fake.grad.tolist() == [0, 0.5]
