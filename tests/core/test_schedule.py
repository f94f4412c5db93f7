"""Noise levels and key points, against the paper's numbers and against closed forms."""

import math

import pytest
import torch

from accvideo_core.errors import InvalidValueError
from accvideo_core.schedule import PRESETS, flow_sigmas, get_preset, key_indices, key_sigmas


def test_sub_sampling_the_shifted_grid_equals_shifting_the_short_grid():
    for n, m, shift in [(50, 5, 7.0), (50, 10, 5.0), (40, 10, 3.0), (12, 3, 1.0)]:
        assert torch.equal(key_sigmas(n, m, shift), flow_sigmas(m, shift))


def test_key_sigmas_are_the_papers():
    assert key_indices(50, 5) == (0, 10, 20, 30, 40, 50)
    expected = torch.tensor([1, 28 / 29, 21 / 23, 14 / 17, 7 / 11, 0])
    torch.testing.assert_close(key_sigmas(50, 5, 7.0), expected, rtol=0, atol=6e-8)


@pytest.mark.parametrize("steps", [1, 5, 50, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0, 17.0])
def test_sigmas_fall_from_exactly_one_to_exactly_zero(steps, shift):
    sigmas = flow_sigmas(steps, shift)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and bool((sigmas[1:] < sigmas[:-1]).all())
    t = (steps - 1) / steps
    assert float(sigmas[1]) == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-6, abs=1e-9)


def test_float64_inside():
    """The float32 result is the correctly rounded one; float32 arithmetic is off by a unit in the last place somewhere."""
    t = torch.linspace(1, 0, 1001, dtype=torch.float64)
    exact = (7 * t / (1 + 6 * t)).float()
    assert torch.equal(flow_sigmas(1000, 7.0), exact)
    assert not torch.equal(7 * t.float() / (1 + 6 * t.float()), exact)


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_bad_steps_are_named(steps):
    with pytest.raises(InvalidValueError, match=f"steps is {steps}"):
        flow_sigmas(steps, 7.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_bad_shift_is_named(shift):
    with pytest.raises(InvalidValueError, match=f"shift is {shift}"):
        flow_sigmas(5, shift)


def test_keys_must_divide_steps():
    with pytest.raises(InvalidValueError, match="7 key segments do not divide 50"):
        key_indices(50, 7)


def test_presets_are_the_families_and_frozen():
    assert set(PRESETS) == {"hunyuan-t2v", "tiny", "wan-t2v-14b", "wan-i2v-14b-480p"}
    hunyuan, tiny = PRESETS["hunyuan-t2v"], PRESETS["tiny"]
    for preset in (hunyuan, tiny):
        assert (preset.teacher_steps, preset.keys, preset.steps, preset.shift, preset.guidance) == (50, 5, 5, 7.0, 6.0)
    # one shift of a 10-step grid, not two as in the authors' Euler branch
    assert float(PRESETS["wan-t2v-14b"].sigmas()[-2]) == pytest.approx(0.3571, abs=5e-5)
    assert float(PRESETS["wan-i2v-14b-480p"].sigmas()[-2]) == pytest.approx(0.25, abs=5e-5)
    with pytest.raises(AttributeError):
        hunyuan.steps = 6  # type: ignore[misc]
    with pytest.raises(TypeError):
        PRESETS["mine"] = hunyuan  # type: ignore[index]
    with pytest.raises(InvalidValueError, match="unknown model family 'sora'.*hunyuan-t2v"):
        get_preset("sora")
