"""Samplers against closed-form flows and against tensor code written out here."""

import pytest
import torch

from accvideo_core.errors import InvalidValueError
from accvideo_core.sampling import euler_flow, few_step, make_noise, multistep_flow
from accvideo_core.schedule import PRESETS, flow_sigmas

SHAPE = (3, 16, 2, 4, 6)


def test_noise_of_a_sample_depends_on_its_seed_alone():
    batch = make_noise(SHAPE, [5, 9, 5])
    assert batch.dtype == torch.float32 and batch.shape == SHAPE
    assert torch.equal(batch[0], batch[2]) and not torch.equal(batch[0], batch[1])
    assert torch.equal(make_noise((1, *SHAPE[1:]), [9])[0], batch[1])


def test_noise_of_one_sample_is_comfyuis():
    """ComfyUI seeds one CPU generator and draws the whole latent from it."""
    theirs = torch.randn((1, *SHAPE[1:]), generator=torch.manual_seed(123), device="cpu")
    assert torch.equal(make_noise((1, *SHAPE[1:]), [123]), theirs)


def test_noise_checks_its_seeds():
    with pytest.raises(InvalidValueError, match="2 seeds for a batch of 3"):
        make_noise(SHAPE, [1, 2])
    with pytest.raises(InvalidValueError, match="seed is -1"):
        make_noise((1, 2), [-1])


def test_a_constant_velocity_is_integrated_exactly_by_any_schedule():
    noise, clean = make_noise(SHAPE, [0, 1, 2]), make_noise(SHAPE, [3, 4, 5])
    for sigmas in (flow_sigmas(1, 1.0), flow_sigmas(7, 7.0)):
        out = euler_flow(lambda x, s: noise - clean, noise, sigmas)
        torch.testing.assert_close(out, clean, rtol=0, atol=2e-6)
        torch.testing.assert_close(multistep_flow(lambda x, s: noise - clean, noise, sigmas)[-1], clean, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("shift", "order"), [(1.0, 1), (7.0, 1), (1.0, 2), (7.0, 2)])
def test_the_solvers_converge_to_the_flow_of_a_gaussian(shift, order):
    """For data N(0, s^2) the flow carries noise z to s*z; Euler's error falls as 1/steps, the multistep method's as their
    square, on uneven grids too."""
    s = 0.3

    def velocity(x, sigma):
        level = sigma.view(-1, 1, 1, 1, 1)
        variance = (1 - level) ** 2 * s**2 + level**2
        return x * (level - (1 - level) * s**2) / variance

    def end(sigmas):
        return euler_flow(velocity, noise, sigmas) if order == 1 else multistep_flow(velocity, noise, sigmas)[-1]

    noise = make_noise(SHAPE, [0, 1, 2])
    errors = [float((end(flow_sigmas(n, shift)) - s * noise).abs().max()) for n in (50, 100, 200)]
    falls = 0.9 * 2**order
    assert errors[0] > falls * errors[1] > falls**2 * errors[2] > 0


def test_the_multistep_solver_gives_every_latent_and_starts_with_an_euler_step():
    noise, sigmas, asked = make_noise(SHAPE, [0, 1, 2]), torch.tensor([1.0, 0.8, 0.3, 0.0]), []

    def velocity(x, sigma):
        asked.append((x, sigma))
        return x * sigma.view(-1, 1, 1, 1, 1)

    latents = multistep_flow(velocity, noise.double(), sigmas)
    assert len(latents) == 4 and torch.equal(latents[0], noise) and all(x.dtype == torch.float32 for x in latents)
    for (x, sigma), latent, level in zip(asked, latents, (1.0, 0.8, 0.3), strict=False):
        assert torch.equal(x, latent) and torch.equal(sigma, torch.full((3,), level))
    torch.testing.assert_close(latents[1], 0.8 * noise)
    second = latents[1] - 0.5 * (0.64 * noise + (0.64 - 1.0) * noise * (0.5 / 0.2 / 2))
    torch.testing.assert_close(latents[2], second)
    with pytest.raises(InvalidValueError, match="fall strictly"):
        multistep_flow(velocity, noise, torch.tensor([0.5, 1.0]))


def test_every_step_is_equation_5():
    sigmas = PRESETS["tiny"].sigmas()
    noise = make_noise(SHAPE, [0, 1, 2])
    asked = []

    def velocity(x, sigma):
        asked.append(sigma)
        return torch.tanh(x) * (1 + sigma.view(-1, 1, 1, 1, 1))

    steps = []
    out = few_step(velocity, noise, PRESETS["tiny"], [steps.append])
    latent = noise.clone()
    for j, step in enumerate(steps):
        assert asked[j].dtype == torch.float32 and torch.equal(asked[j], sigmas[j].expand(3))
        v = torch.tanh(latent) * (1 + sigmas[j])
        torch.testing.assert_close(step.velocity, v, rtol=0, atol=1e-6)
        torch.testing.assert_close(step.denoised, latent - sigmas[j] * v, rtol=0, atol=1e-6)
        latent = latent + (sigmas[j + 1] - sigmas[j]) * v
        torch.testing.assert_close(step.latent, latent, rtol=0, atol=1e-6)
        assert (step.index, step.total) == (j, 5)
        assert (step.sigma, step.sigma_next) == (float(sigmas[j]), float(sigmas[j + 1]))
    assert len(steps) == 5 and torch.equal(out, steps[-1].latent)


def test_observers_never_change_the_sample_and_can_end_it():
    noise = make_noise(SHAPE, [0, 1, 2])

    class Stop(Exception):
        pass

    def stop(step):
        if step.index == 2:
            raise Stop

    calls = []

    def velocity(x, sigma):
        calls.append(1)
        return -x

    quiet = few_step(velocity, noise, PRESETS["tiny"])
    assert torch.equal(few_step(velocity, noise, PRESETS["tiny"], [lambda step: None]), quiet)
    calls.clear()
    with pytest.raises(Stop):
        few_step(velocity, noise, PRESETS["tiny"], [stop])
    assert len(calls) == 3


def test_few_step_refuses_a_family_of_another_solver():
    with pytest.raises(InvalidValueError, match="wan-t2v-14b students are sampled with uni_pc"):
        few_step(lambda x, s: x, make_noise((1, 2), [0]), PRESETS["wan-t2v-14b"])


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 1.0, 0.0], [0.5, 0.7], [1.2, 0.0], [1.0, float("nan")]])
def test_bad_schedules_are_refused(sigmas):
    with pytest.raises(InvalidValueError):
        euler_flow(lambda x, s: x, make_noise((1, 2), [0]), torch.tensor(sigmas))
