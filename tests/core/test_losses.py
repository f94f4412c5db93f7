"""The trajectory loss (Eq. 6) against the definition, and its gradient against finite differences."""

import torch

from accvideo_core.distill import segment_velocity, trajectory_loss
from accvideo_core.schedule import key_sigmas


def points():
    generator = torch.Generator().manual_seed(0)
    noisier, cleaner = torch.randn(2, 3, 4, 2, 2, 2, generator=generator, dtype=torch.float64)
    sigmas = key_sigmas(50, 5, 7.0).double()
    return noisier, cleaner, sigmas[[0, 2, 4]], sigmas[[1, 3, 5]]


def test_one_euler_step_along_the_segment_velocity_lands_on_the_cleaner_key():
    noisier, cleaner, high, low = points()
    v = segment_velocity(noisier, cleaner, high, low)
    torch.testing.assert_close(noisier + (low - high).view(-1, 1, 1, 1, 1) * v, cleaner)


def test_loss_is_zero_at_the_segment_velocity_and_its_mean_square_elsewhere():
    noisier, cleaner, high, low = points()
    v = segment_velocity(noisier, cleaner, high, low)
    assert float(trajectory_loss(v, noisier, cleaner, high, low)) == 0
    torch.testing.assert_close(trajectory_loss(v + 0.5, noisier, cleaner, high, low), torch.tensor(0.25, dtype=torch.float64))


def test_gradient_agrees_with_finite_differences():
    noisier, cleaner, high, low = points()
    v = torch.randn(noisier.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: trajectory_loss(x, noisier, cleaner, high, low), (v,))
