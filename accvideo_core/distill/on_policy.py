"""Where the student itself arrives, what would its teacher do from there? The teacher's own sampler, over one segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidValueError, SynVidError
from ..sampling import Velocity, euler_flow
from ..synvid import Header, SynVidReader
from ..synvid.capture import Encoding, pad_texts, with_cfg
from .adapters import Adapter


@dataclass(frozen=True)
class Continuation:
    """How a teacher goes on over a segment, as the trajectories were made but in fewer steps.

    adapter   the teacher's
    levels    of key 0 .. m-1: sigmas from key k+1 to key k, falling
    guidance  embedded, in plain scale; None for a network without it
    cfg       classifier-free guidance, 1 for none, with which goes
    negative  the negative prompt's encoding
    """

    adapter: Adapter
    levels: Sequence[tuple[float, ...]]
    guidance: float | None = None
    cfg: float = 1.0
    negative: Encoding | None = None

    @classmethod
    def of(cls, adapter: Adapter, reader: SynVidReader, steps: int) -> Continuation:
        """As a dataset's teacher did, in so many of its steps a segment.

        Raises InvalidValueError if a segment has fewer, SynVidError if the dataset lacks its negative prompt's encoding.
        """
        header = reader.header
        negative = None
        if header.cfg != 1:
            if header.negative_text is None:
                raise SynVidError(
                    f"{reader.folder} was captured with cfg {header.cfg:g} and has no encoding of its negative prompt, without "
                    "which the teacher cannot go on from the student's latents; capture again, or set on_policy_weight to 0"
                )
            negative = reader.text(header.negative_text)
        return cls(adapter, levels(header, steps), header.guidance, header.cfg, negative)

    def __call__(self, teacher: nn.Module, latent: Tensor, key: int, told: Any) -> Tensor:
        """Latents (B, C, T, H, W) at `key` that the teacher makes of `latent` at key + 1, told so; float32."""
        velocity = self._velocity(teacher, told)
        if self.negative is not None:
            texts = pad_texts([self.negative] * len(latent))
            unwanted = self.adapter.conditioning(texts, self.guidance).to(latent.device)
            velocity = with_cfg(velocity, self._velocity(teacher, unwanted), self.cfg)
        return euler_flow(velocity, latent, torch.tensor(self.levels[key]))

    def _velocity(self, teacher: nn.Module, told: Any) -> Velocity:
        return lambda latent, sigma: self.adapter.velocity(teacher, latent, sigma, told)


def levels(header: Header, steps: int) -> list[tuple[float, ...]]:
    """Of every segment, the cleanest first, steps + 1 of the teacher's sigmas, as evenly spread over its own steps as can be.
    InvalidValueError if a segment has fewer."""
    found = []
    for start, end in zip(header.keys, header.keys[1:], strict=False):
        if not 1 <= steps <= end - start:
            raise InvalidValueError(
                f"on_policy_steps is {steps}; the teacher took {end - start} steps over a segment, choose from 1 to as many"
            )
        found.append(tuple(header.sigmas[start + round(i * (end - start) / steps)] for i in range(steps + 1)))
    return found[::-1]
