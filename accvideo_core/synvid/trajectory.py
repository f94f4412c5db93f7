"""What a sampler hands to a writer: the key latents of a batch and all that tells how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import SynVidError
from .header import Header
from .manifest import SampleInfo
from .store import SynVidStore, sample_id


@dataclass(frozen=True)
class Trajectory:
    """A captured batch of B samples, on the CPU.

    keys     key 0 (clean) .. key m-1, each (B, C, T, H, W) float32 in model space
    noise    (B, C, T, H, W) float32: key m
    header   family, teacher's fingerprint, sigmas, key positions, shift, guidance, cfg, negative prompt
    text     (B or 1, L, D) at its valid length; one row stands for all samples
    pooled   (B or 1, P), or None for a model without it
    seeds    B seeds, one for each sample's noise
    seconds  the whole batch took
    """

    keys: tuple[Tensor, ...]
    noise: Tensor
    header: Header
    text: Tensor
    pooled: Tensor | None
    seeds: tuple[int, ...]
    seconds: float

    def ids(self, prompts: Sequence[str]) -> list[str]:
        """Each sample's id (`sample_id`) for its prompt; one prompt stands for all samples."""
        rows = len(self.seeds)
        if len(prompts) not in (1, rows):
            raise SynVidError(f"{len(prompts)} prompts for {rows} samples; give one, or one each")
        shape = tuple(self.noise.shape[1:])
        return [sample_id(prompts[row % len(prompts)], seed, shape) for row, seed in enumerate(self.seeds)]

    def save(self, store: SynVidStore, prompts: Sequence[str], videos: bool = False) -> list[str]:
        """Put texts and commit the batch; `videos` says that each sample's frames lie at `store.video_path(id)`. Returns the
        ids. Raises SynVidError as `Header.check` and `SynVidStore.commit` do."""
        store.header.check(self.header)
        names = self.ids(prompts)
        rows = len(self.text)
        texts = [store.put_text(self.text[i], None if self.pooled is None else self.pooled[i]) for i in range(rows)]
        share = self.seconds / max(len(names), 1)
        samples = []
        for row, name in enumerate(names):
            video = f"videos/{name}.mp4" if videos else None
            prompt, text = prompts[row % len(prompts)], texts[row % rows]
            samples.append(SampleInfo(name, prompt, text, self.seeds[row], share, video))
        store.commit(self.keys, samples, self.noise)
        return names
