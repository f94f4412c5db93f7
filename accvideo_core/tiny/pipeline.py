"""From prompts to frames with the bundled models, timed by component."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..devices import synchronize
from ..dit import Conditioning, HunyuanVideoDiT
from ..errors import InvalidValueError
from ..sampling import Observer, Velocity, euler_flow, make_noise
from ..schedule import PRESETS
from . import Which, load_tiny
from .clips import FRAMES, SIZE
from .text import TinyTextEncoder
from .vae import CHANNELS, LATENT_SCALE, TinyVAE, to_pixels

PRESET = PRESETS["tiny"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Generation:
    """frames (N, T, H, W, 3) uint8; latents (N, 16, T', H/8, W/8) float32 in model space; seconds by component."""

    frames: NDArray[np.uint8]
    latents: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(16, T', H/8, W/8) of a video; InvalidValueError unless frames are 4n+1 and the sides multiples of 16."""
    if frames < 1 or frames % 4 != 1:
        near = max(1, frames // 4 * 4 + 1)
        raise InvalidValueError(f"frames is {frames}; it must be 4n+1, for example {near} or {near + 4}")
    for name, size in (("height", height), ("width", width)):
        if size < 16 or size % 16:
            near = max(16, size // 16 * 16)
            raise InvalidValueError(f"{name} is {size}; it must be a multiple of 16, for example {near} or {near + 16}")
    return CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8


class TinyPipeline:
    """Text encoder, network and VAE of the tiny world on one device; the network in `dtype`, the others in float32."""

    def __init__(self, network: HunyuanVideoDiT, text: TinyTextEncoder, vae: TinyVAE, which: Which) -> None:
        self.network, self.text, self.vae, self.which = network, text, vae, which
        self.device = next(network.parameters()).device

    @classmethod
    def load(cls, which: Which = "student", device: Any = "cpu", dtype: torch.dtype | None = None) -> TinyPipeline:
        return cls(*load_tiny(which, device, dtype), which)

    @property
    def default_steps(self) -> int:
        """What the model was made for: 5 steps for the student, 50 for the teacher."""
        return PRESET.teacher_steps if self.which == "teacher" else PRESET.steps

    def condition(self, prompts: Sequence[str], guidance: float | None = None) -> Conditioning:
        """Conditioning of a batch of prompts; guidance in plain scale, 6 by default."""
        scale = (PRESET.guidance if guidance is None else guidance) or 0.0
        return self.text.condition(prompts, torch.full((len(prompts),), scale))

    def velocity(self, conditioning: Conditioning) -> Velocity:
        """The network under this conditioning, as samplers take it."""
        return lambda latent, sigma: self.network(latent, sigma, conditioning)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        shift: float | None = None,
        frames: int = FRAMES,
        height: int = SIZE,
        width: int = SIZE,
        observers: Iterable[Observer] = (),
    ) -> Generation:
        """One clip per prompt and seed, as one batch. Raises InvalidValueError or PromptError for what cannot be made."""
        shape = latent_shape(frames, height, width)
        sigmas = PRESET.sigmas(self.default_steps if steps is None else steps, shift)
        noise = make_noise((len(prompts), *shape), seeds).to(self.device)
        times = [self.now()]
        conditioning = self.condition(prompts)
        times.append(self.now())
        latents = euler_flow(self.velocity(conditioning), noise, sigmas, observers)
        times.append(self.now())
        video = to_pixels(self.vae.decode(latents / LATENT_SCALE))
        times.append(self.now())
        seconds = {name: b - a for name, a, b in zip(("text", "sampling", "vae"), times, times[1:], strict=False)}
        return Generation(video, latents, seconds)

    def now(self) -> float:
        """The clock, after all queued work on the device is done."""
        synchronize(self.device)
        return time.perf_counter()
