"""Where the student itself arrives, what would its teacher do from there? The teacher's own sampler, over one segment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    levels    {key k: sigmas from key k+1 to key k, falling}
    guidance  embedded, in plain scale; None for a network without it
    cfg       classifier-free guidance, 1 for none, with which goes
    negative  the negative prompt's encoding
    """

    adapter: Adapter
    levels: Mapping[int, tuple[float, ...]]
    guidance: float | None = None
    cfg: float = 1.0
    negative: Encoding | None = None

    def __post_init__(self) -> None:
        if (self.cfg != 1) != (self.negative is not None):
            raise InvalidValueError(f"cfg is {self.cfg:g}; a cfg other than 1 needs the negative prompt's encoding, and 1 none")

    @classmethod
    def of(cls, adapter: Adapter, reader: SynVidReader, steps: int, keys: Iterable[int] | None = None) -> Continuation:
        """As a dataset's teacher did, in so many of its steps a segment, to these keys or to all.

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
        return cls(adapter, levels(header, steps, keys), header.guidance, header.cfg, negative)

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


def levels(header: Header, steps: int, keys: Iterable[int] | None = None) -> dict[int, tuple[float, ...]]:
    """{key: steps + 1 of the teacher's sigmas from the key before to it, as evenly spread over its own steps as can be}.
    InvalidValueError if the teacher took fewer, or for a key that is none."""
    found = {}
    for key in range(header.segments) if keys is None else keys:
        if not 0 <= key < header.segments:
            raise InvalidValueError(f"on_policy_keys has {key}; the dataset's segments end at keys 0 to {header.segments - 1}")
        start, end = header.keys[-key - 2], header.keys[-key - 1]
        own = end - start
        if not 1 <= steps <= own:
            few = f"1 to {own}" if own > 1 else "1"
            raise InvalidValueError(f"on_policy_steps is {steps}; the teacher took {own} in the segment to key {key}; set {few}")
        found[key] = tuple(header.sigmas[start + round(i * own / steps)] for i in range(steps + 1))
    return found
