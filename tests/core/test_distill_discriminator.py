"""The heads see what the frozen teacher sees, at the true grid; the student's gradient goes through it."""

from __future__ import annotations

import copy

import pytest
import torch
from einops import rearrange
from torch import Tensor

from accvideo_core.distill.adapters import HunyuanAdapter
from accvideo_core.distill.discriminator import Discriminator
from accvideo_core.distill.losses import GAN_LOSSES, euler_step
from accvideo_core.dit import HunyuanVideoDiT
from accvideo_core.errors import InvalidValueError
from tests.distill_data import MINUTE, MadeUp, network, trainer

ADAPTER = HunyuanAdapter("tiny")


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_2d_head_sees_every_frame_alone_at_the_true_grid_of_a_latent_that_is_not_square() -> None:
    head = Discriminator(16, 2, channels=8, depth=2)
    features, grid = made(2, 3 * 2 * 5, 16), (3, 2, 5)
    logits = head(features, 1, grid)
    frames = torch.nn.functional.layer_norm(features, (16,)).view(2, 3, 2, 5, 16)
    by_frame = [head.heads[1].layers(frames[:, f].permute(0, 3, 1, 2))[:, 0] for f in range(3)]
    torch.testing.assert_close(logits, torch.stack(by_frame, 1))
    with pytest.raises(InvalidValueError, match="30 tokens do not make a grid of 3 x 5 x 3"):
        head(features, 1, (3, 5, 3))


def test_a_3d_head_sees_neighbouring_frames_which_a_2d_head_does_not() -> None:
    features = made(1, 4 * 2 * 3, 16)
    other = features.clone().view(1, 4, 6, 16)
    other[:, 3] += made(6, 16, seed=1)
    for kind, moved in (("2d", [False, False, False, True]), ("3d", [True, True, True, True])):
        head = Discriminator(16, 1, kind=kind, channels=8, depth=1)
        difference = (head(features, 0, (4, 2, 3)) - head(other.view(1, 24, 16), 0, (4, 2, 3))).abs().amax((0, 2, 3))
        assert (difference > 1e-6).tolist() == moved


def test_a_token_stands_at_its_patch_of_the_latent() -> None:
    """In a network whose blocks are the identity, features are the patches."""
    teacher = HunyuanVideoDiT(MINUTE).init_weights(0)
    latent, batch = made(4, 4, 3, 4, 10), MadeUp().batch(0, 0)
    told = ADAPTER.conditioning(batch, 6.0)
    features = ADAPTER.features(teacher, latent, torch.full((4,), 0.5), told, "single_blocks.1")
    t, h, w = ADAPTER.grid(teacher, latent.shape)
    assert (t, h, w) == (3, 2, 5)
    found = rearrange(features, "b (t h w) d -> b d t h w", t=t, h=h, w=w)
    torch.testing.assert_close(found, teacher.img_in.proj(latent))


@pytest.mark.parametrize("heads, count", [("per-key", 5), ("one", 1)])
def test_heads_are_one_for_each_key_or_one_for_all_and_follow_from_the_seed(heads: str, count: int) -> None:
    first, again, other = (Discriminator(16, 5, heads, channels=8, seed=seed) for seed in (1, 1, 2))
    assert len(first.heads) == count
    features = made(1, 4, 16)
    logits = first(features, 0, (1, 2, 2))
    assert [torch.equal(logits, made(features, 0, (1, 2, 2))) for made in (again, other)] == [True, False]
    assert torch.equal(logits, first(features, 4, (1, 2, 2))) == (count == 1)


def test_the_size_of_a_head_is_a_matter_of_configuration() -> None:
    def size(width: int, channels: int, depth: int) -> int:
        return sum(p.numel() for p in Discriminator(width, 1, channels=channels, depth=depth).parameters())

    assert 2_000 < size(128, 16, 0) < 5_000 and 1_900_000 < size(3072, 256, 2) < 2_100_000
    with pytest.raises(InvalidValueError, match="heads of 17 channels"):
        Discriminator(16, 1, channels=17)


def test_the_students_gradient_through_the_frozen_teacher_agrees_with_finite_differences() -> None:
    """Along random directions of all of the student's weights, in float64: velocity, Euler step, teacher, head, loss."""
    student, teacher = network(seed=0).double(), network(seed=1).double().requires_grad_(False)
    heads = Discriminator(16, 2, channels=8, depth=1).double().requires_grad_(False)
    batch = MadeUp(batch=2).batch(0, 0)
    told, noisy = ADAPTER.conditioning(batch, 6.0), batch.noisy.double()
    high, low = torch.full((2,), 1.0, dtype=torch.float64), torch.full((2,), 0.6, dtype=torch.float64)

    def loss() -> Tensor:
        fake = euler_step(noisy, ADAPTER.velocity(student, noisy, high, told), high, low)
        features = ADAPTER.features(teacher, fake, low, told, "single_blocks.1")
        return GAN_LOSSES["softplus"].student(heads(features, 1, ADAPTER.grid(teacher, fake.shape))).mean()

    parameters = list(student.parameters())
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        way = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, way, strict=True) if g is not None)
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # forward, back, home
                torch._foreach_add_([p.data for p in parameters], way, alpha=sign * 1e-4)
                values.append(float(loss()))
        # rotary embeddings are computed in float32 whatever the network's dtype: the difference is known to 2e-5
        assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=2e-4)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_run_changes_students_and_heads_weights_but_never_the_teachers() -> None:
    teacher = network(seed=1)
    before = copy.deepcopy(teacher.state_dict())
    run = trainer(teacher=teacher)
    heads = copy.deepcopy(run.heads.state_dict())
    run.iteration(0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    changed = {name.split(".")[1] for name, value in run.heads.state_dict().items() if not torch.equal(value, heads[name])}
    assert changed == {"0", "1"}


def test_the_clean_keys_head_looks_at_two_thirds_of_the_depth_the_noisy_ones_at_the_last_block() -> None:
    assert trainer().feature_blocks == ["single_blocks.0", "single_blocks.1"]
    assert trainer(clean_block="double_blocks.0", noisy_block="single_blocks.0").feature_blocks == [
        "double_blocks.0",
        "single_blocks.0",
    ]
