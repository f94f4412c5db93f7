"""The student: the teacher's trajectories, and the loss of Eq. 6 on their key points."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ...distill import trajectory_loss
from ...errors import CheckpointError, InvalidValueError
from ...files import atomic_path
from ...sampling import Step, euler_flow, make_noise
from ...schedule import key_indices, key_sigmas
from ..clips import keyed_generator, sample_scenes
from ..pipeline import TinyPipeline
from ..prompts import open_some, write_prompt
from ..share import Share
from ..training import Defaults, check_made_from
from .common import (
    GUIDANCES,
    KEYS,
    LATENT_SHAPE,
    PRESET,
    TEACHER_STEPS,
    block_matrices,
    draw_guidance,
    sample_sheet,
    save_weights,
)


class StudentTask:
    """The trajectory loss alone: from key point k+1 of a teacher's trajectory, the velocity of the segment to key k."""

    defaults = Defaults(steps=400, batch=32, lr=5e-4, warmup=50, ema=0.998)
    chunk = 128  # trajectories captured and stored together

    def __init__(self, seed: int, device: torch.device, weights: Path, run: Path, count: int) -> None:
        from .. import load_tiny, part_hash

        if count < 1:
            raise InvalidValueError(f"trajectories is {count}; it must be at least 1")
        self.seed, self.device, self.run, self.count = seed, device, run, count
        self.made_from = {part: part_hash(part, weights) for part in ("encoder", "text_encoder", "teacher")}
        self.teacher, self.text, self.vae = load_tiny("teacher", device=device, folder=weights)
        self.network = copy.deepcopy(self.teacher)
        self.network.requires_grad_(True).train()
        self.model: nn.Module = self.network
        self.matrices = block_matrices(self.network)
        self.sigmas = key_sigmas(TEACHER_STEPS, KEYS, PRESET.shift).to(device)
        self.keys: Tensor
        self.prompts: list[str]

    def prepare(self, share: Share) -> None:
        """Capture the trajectories, in chunks that are kept, so that an interrupted capture goes on."""
        starts = range(0, self.count, self.chunk)
        for start in tqdm(starts[share.rank :: share.size], desc="trajectories", mininterval=5, disable=share.rank > 0):
            self.chunk_of_trajectories(start, min(self.chunk, self.count - start))
        share.wait()
        keys, self.prompts = [], []
        for start in starts:
            captured, prompts = self.chunk_of_trajectories(start, min(self.chunk, self.count - start))
            keys.append(captured)
            self.prompts += prompts
        self.keys = torch.cat(keys)

    def chunk_of_trajectories(self, start: int, count: int) -> tuple[Tensor, list[str]]:
        """Key latents (count, m + 1, 16, 5, 8, 8) float16 and prompts, captured now or read from an earlier run."""
        path = self.run / f"trajectories-{start:06d}.safetensors"
        recipe = {"seed": str(self.seed), "start": str(start), "count": str(count), "steps": str(TEACHER_STEPS), **self.made_from}
        if path.exists():
            cure = "delete the trajectories, or choose another --run"
            try:
                with safe_open(path, framework="pt") as file:
                    known = file.metadata()
                    captured, prompts = file.get_tensor("keys"), json.loads(known.pop("prompts"))
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {str(path)!r} ({error}); {cure}") from error
            check_made_from(path, known, recipe, cure)
            return captured, prompts
        generator = keyed_generator(self.seed, "trajectories", start)
        scenes = sample_scenes(count, generator)
        prompts = [write_prompt(open_some(scenes.names(i), generator), generator) for i in range(count)]
        seeds = torch.randint(2**31, (count,), generator=generator).tolist()
        captured = self.capture(prompts, seeds).half().cpu()
        with atomic_path(path) as temporary:
            save_file({"keys": captured}, temporary, metadata={**recipe, "prompts": json.dumps(prompts)})
        return captured, prompts

    @torch.no_grad()
    def capture(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(B, m + 1, 16, 5, 8, 8): the teacher's key latents in sampling order, noise first."""
        n, m = TEACHER_STEPS, KEYS
        cond = self.text.condition(prompts, torch.full((len(prompts),), GUIDANCES[0]))
        noise = make_noise((len(prompts), *LATENT_SHAPE), seeds).to(self.device)
        kept, wanted = [noise], set(key_indices(n, m))

        def keep(step: Step) -> None:
            if step.index + 1 in wanted:
                kept.append(step.latent)

        euler_flow(lambda x, s: self.teacher(x, s, cond), noise, PRESET.sigmas(n), [keep])
        return torch.stack(kept, 1)

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        generator = keyed_generator(self.seed, "student", step)
        index = torch.randint(len(self.keys), (batch,), generator=generator)
        position = torch.randperm(batch, generator=generator) % (len(self.sigmas) - 1)  # every segment equally often
        guidance = draw_guidance(batch, generator)[rows]
        index, position = index[rows], position[rows]
        noisier = self.keys[index, position].float().to(self.device)
        cleaner = self.keys[index, position + 1].float().to(self.device)
        sigma, sigma_next = self.sigmas[position], self.sigmas[position + 1]
        with torch.no_grad():
            cond = self.text.condition([self.prompts[int(i)] for i in index], guidance)
        return trajectory_loss(self.network(noisier, sigma, cond).float(), noisier, cleaner, sigma, sigma_next)

    def export(self, folder: Path, steps: int) -> list[Path]:
        note = {"steps": str(steps), "seed": str(self.seed), "family": "tiny", "trajectories": str(self.count), **self.made_from}
        return [save_weights(folder / "student.safetensors", self.network, torch.bfloat16, note)]

    def sheet(self, path: Path) -> None:
        sample_sheet(path, TinyPipeline(self.network, self.text, self.vae, "student"), PRESET.steps)
