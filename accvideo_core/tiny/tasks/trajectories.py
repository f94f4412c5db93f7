"""Trajectories captured to train on: of the guided base for the teacher, of the teacher for the student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ...devices import autocast_dtype
from ...dit import HunyuanVideoDiT
from ...errors import CheckpointError
from ...files import atomic_path
from ...sampling import euler_flow, make_noise, multistep_flow
from ..clips import keyed_generator, sample_scenes
from ..prompts import open_some, write_prompt
from ..share import Share
from ..text import TinyTextEncoder
from ..training import check_made_from
from .common import GUIDANCES, LATENT_SHAPE, PRESET, TEACHER_STEPS


@dataclass(frozen=True)
class Capture:
    """Trajectories from prompts and seeds that hang on `seed`, `name` and their number alone.

    network, text  what is captured
    points         grid points that are kept, 0 for the noise, in sampling order; a trajectory ends at the last
    named          prompts name all four attributes, or leave a random part of them open
    folder         where they are kept, in files of `chunk`, so that an interrupted capture goes on
    made_from      what they depend on
    multistep      the grid's steps, taken by `multistep_flow`; None for TEACHER_STEPS by Euler, as a teacher samples
    """

    network: HunyuanVideoDiT
    text: TinyTextEncoder
    points: Sequence[int]
    named: bool
    folder: Path
    seed: int
    made_from: Mapping[str, str]
    device: torch.device
    chunk: int = 128
    name: str = "trajectories"
    multistep: int | None = None

    def all(self, count: int, share: Share) -> tuple[Tensor, list[str], list[dict[str, str]]]:
        """Of `count` trajectories the latents (count, points, 16, 5, 8, 8) float16, their prompts, and what those name."""
        parts = [(start, min(self.chunk, count - start)) for start in range(0, count, self.chunk)]
        for part in tqdm(parts[share.rank :: share.size], self.name, mininterval=5, disable=share.rank > 0):
            self.part(*part)
        share.wait()
        latents, prompts, names = zip(*(self.part(*part) for part in parts), strict=True)
        return torch.cat(latents), list(chain(*prompts)), list(chain(*names))

    def part(self, start: int, count: int) -> tuple[Tensor, list[str], list[dict[str, str]]]:
        """`count` trajectories from number `start` on, captured now or read from an earlier run."""
        path = self.folder / f"{self.name}-{start:06d}.safetensors"
        steps = str(self.multistep or TEACHER_STEPS)
        recipe = {"seed": str(self.seed), "start": str(start), "count": str(count), "steps": steps, **self.made_from}
        if path.exists():
            cure = "delete the trajectories, or choose another --run"
            try:
                with safe_open(path, framework="pt") as file:
                    known = file.metadata()
                    latents, said = file.get_tensor("latents"), json.loads(known.pop("said"))
                    prompts, names = [row["prompt"] for row in said], [row["named"] for row in said]
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {str(path)!r} ({error}); {cure}") from error
            check_made_from(path, known, recipe, cure)
            return latents, prompts, names
        generator = keyed_generator(self.seed, self.name, start)
        scenes = sample_scenes(count, generator)
        names = [scenes.names(i) if self.named else open_some(scenes.names(i), generator) for i in range(count)]
        prompts = [write_prompt(named, generator) for named in names]
        seeds = torch.randint(2**31, (count,), generator=generator).tolist()
        latents = self.trajectories(prompts, seeds).half().cpu()
        said = json.dumps([{"prompt": p, "named": n} for p, n in zip(prompts, names, strict=True)])
        with atomic_path(path) as temporary:
            save_file({"latents": latents}, temporary, metadata={**recipe, "said": said})
        return latents, prompts, names

    @torch.no_grad()
    def trajectories(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(B, points, 16, 5, 8, 8) from noise to clean."""
        cond = self.text.condition(prompts, torch.full((len(prompts),), GUIDANCES[0]))
        noise = make_noise((len(prompts), *LATENT_SHAPE), seeds).to(self.device)
        sigmas = PRESET.sigmas(self.multistep or TEACHER_STEPS)[: max(self.points) + 1]
        latents = [noise]
        cast = autocast_dtype(self.device)
        with torch.autocast(self.device.type, cast, enabled=cast is not None):
            if self.multistep:
                latents = multistep_flow(lambda x, s: self.network(x, s, cond), noise, sigmas)
            else:
                euler_flow(lambda x, s: self.network(x, s, cond), noise, sigmas, [lambda step: latents.append(step.latent)])
        return torch.stack([latents[point] for point in self.points], 1)
