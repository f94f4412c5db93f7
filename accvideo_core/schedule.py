"""Noise levels of the flow ODE and the key points of a trajectory (AccVideo, arXiv 2503.19462, section 3).

sigma is the noise level, 1 = pure noise, 0 = clean; a schedule lists sigmas in sampling order, from 1 down to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .errors import InvalidValueError


def shift_sigmas(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Time shift s*t / (1 + (s-1)*t) of any tensor of levels in [0, 1]; s > 1 spends more steps at high noise."""
    if not (math.isfinite(shift) and shift > 0):
        raise InvalidValueError(f"shift is {shift}; it must be a finite number above 0 (HunyuanVideo uses 7)")
    return shift * t / (1 + (shift - 1) * t)


def flow_sigmas(steps: int, shift: float) -> torch.Tensor:
    """(steps + 1,) float32 sigmas: `linspace(1, 0)` shifted, computed in float64.

    The first is exactly 1, the last exactly 0. Raises InvalidValueError for steps < 1 or a shift that is not a
    positive finite number.
    """
    if int(steps) != steps or steps < 1:
        raise InvalidValueError(f"steps is {steps}; it must be a whole number of at least 1")
    return shift_sigmas(torch.linspace(1, 0, int(steps) + 1, dtype=torch.float64), shift).float()


def key_indices(n: int, m: int) -> tuple[int, ...]:
    """Positions of the m + 1 key points in an n-step schedule, in sampling order: 0 = pure noise, n = clean.

    Key k of the paper (k = m the noise, k = 0 the clean end) sits at position n - k*n/m. Raises InvalidValueError
    unless m divides n.
    """
    if m < 1 or n < 1 or n % m:
        raise InvalidValueError(f"{m} key segments do not divide {n} steps; choose a multiple of {m} as steps")
    return tuple(range(0, n + 1, n // m))


def key_sigmas(n: int, m: int, shift: float) -> torch.Tensor:
    """(m + 1,) float32 sigmas of the key points in sampling order. Equals `flow_sigmas(m, shift)`: sub-sampling the
    shifted grid is shifting the short grid."""
    return flow_sigmas(n, shift)[list(key_indices(n, m))]


@dataclass(frozen=True)
class Preset:
    """How the models of one family are sampled.

    steps, shift   the student's schedule
    guidance       embedded guidance in plain scale, or None for a network without it
    teacher_steps  n of the teacher's schedule, teacher_cfg its classifier-free guidance (1 = none)
    keys           m, segments of a trajectory; None where the authors do not sample key points
    solver         what the authors run: "euler", or "uni_pc" for Wan
    """

    family: str
    steps: int
    shift: float
    guidance: float | None
    teacher_steps: int
    teacher_cfg: float
    keys: int | None
    solver: str

    def sigmas(self, steps: int | None = None, shift: float | None = None) -> torch.Tensor:
        """(steps + 1,) float32: the student's schedule, with steps and shift replaced where given."""
        return flow_sigmas(self.steps if steps is None else steps, self.shift if shift is None else shift)


PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "hunyuan-t2v": Preset("hunyuan-t2v", 5, 7.0, 6.0, 50, 1.0, 5, "euler"),
        "tiny": Preset("tiny", 5, 7.0, 6.0, 50, 1.0, 5, "euler"),
        # The authors' Wan command samples 10 steps with UniPC, whose sigmas are this formula's to 3e-4. Their Euler
        # branch shifts twice (last key sigma 0.3205 and 0.2062 where the formula gives 0.3571 and 0.25); not used here.
        "wan-t2v-14b": Preset("wan-t2v-14b", 10, 5.0, None, 50, 5.0, None, "uni_pc"),
        "wan-i2v-14b-480p": Preset("wan-i2v-14b-480p", 10, 3.0, None, 40, 5.0, None, "uni_pc"),
    }
)


def get_preset(family: str) -> Preset:
    """The preset of a family; InvalidValueError lists the known ones."""
    if family not in PRESETS:
        raise InvalidValueError(f"unknown model family {family!r}; known families: {', '.join(PRESETS)}")
    return PRESETS[family]
