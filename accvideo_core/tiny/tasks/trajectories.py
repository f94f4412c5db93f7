"""Trajectories captured to train on: of the guided base for the teacher, of the teacher for the student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from ...sampling import Step, euler_flow, make_noise
from ..clips import keyed_generator, sample_scenes
from ..prompts import open_some, write_prompt
from ..share import Share
from ..text import TinyTextEncoder
from ..training import check_made_from
from .common import GUIDANCES, KEYS, LATENT_SHAPE, PRESET, TEACHER_STEPS


@dataclass(frozen=True)
class Capture:
    """Trajectories of TEACHER_STEPS steps from prompts and seeds that hang on `seed` and their number alone.

    network, text  what is captured
    points         grid points that are kept, 0 for the noise, in sampling order
    named          prompts name all four attributes, or leave a random part of them open
    folder         where they are kept, in files of `chunk`, so that an interrupted capture goes on
    made_from      what they depend on
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

    def all(self, numbers: range, share: Share) -> tuple[Tensor, list[str], list[dict[str, str]]]:
        """Of the trajectories of these numbers the latents (N, points, 16, 5, 8, 8) float16, their prompts, what those name."""
        parts = [(start, min(self.chunk, numbers.stop - start)) for start in numbers[:: self.chunk]]
        for part in tqdm(parts[share.rank :: share.size], "trajectories", mininterval=5, disable=share.rank > 0):
            self.part(*part)
        share.wait()
        latents, prompts, names = zip(*(self.part(*part) for part in parts), strict=True)
        return torch.cat(latents), list(chain(*prompts)), list(chain(*names))

    def path(self, start: int) -> Path:
        return self.folder / f"trajectories-{start:06d}.safetensors"

    def part(self, start: int, count: int) -> tuple[Tensor, list[str], list[dict[str, str]]]:
        """`count` trajectories from number `start` on, captured now or read from an earlier run."""
        path = self.path(start)
        recipe = {"seed": str(self.seed), "start": str(start), "count": str(count), "steps": str(TEACHER_STEPS), **self.made_from}
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
        generator = keyed_generator(self.seed, "trajectories", start)
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
        kept, wanted = [noise], set(self.points)

        def keep(step: Step) -> None:
            if step.index + 1 in wanted:
                kept.append(step.latent)

        with self.precision():
            euler_flow(lambda x, s: self.network(x, s, cond), noise, PRESET.sigmas(TEACHER_STEPS), [keep])
        return torch.stack(kept, 1)

    def precision(self) -> torch.autocast:
        cast = autocast_dtype(self.device)
        return torch.autocast(self.device.type, cast, enabled=cast is not None)


@dataclass(frozen=True)
class Rolls(Capture):
    """From every key that `student` reaches by its own steps from noise, where `network`, the teacher, goes in its steps of that
    segment: 2 m points a trajectory, each key followed by the end of its segment."""

    student: HunyuanVideoDiT = field(kw_only=True)

    @torch.no_grad()
    def trajectories(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        cond = self.text.condition(prompts, torch.full((len(prompts),), GUIDANCES[0]))
        latent = make_noise((len(prompts), *LATENT_SHAPE), seeds).to(self.device)
        sigmas, segment, points = PRESET.sigmas(TEACHER_STEPS), TEACHER_STEPS // KEYS, []
        with self.precision():
            for start in range(0, TEACHER_STEPS, segment):
                end = start + segment
                points += [latent, euler_flow(lambda x, s: self.network(x, s, cond), latent, sigmas[start : end + 1])]
                latent = euler_flow(lambda x, s: self.student(x, s, cond), latent, sigmas[[start, end]])
        return torch.stack(points, 1)

    def forget(self, before: int) -> None:
        """Delete the files of trajectories of lower numbers."""
        for path in self.folder.glob(self.path(0).name.replace("000000", "*")):
            if path < self.path(before):
                path.unlink()
