"""The VAE's decoder: reconstruction through noise, and then through what the teacher leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from ...dit import HunyuanVideoDiT
from ..clips import Scenes, contrast, coverage, keyed_generator, paint, sample_scenes
from ..prompts import open_some, write_prompt
from ..share import Share
from ..training import Defaults
from ..vae import LATENT_SCALE, TinyVAE, to_pixels
from .common import (
    GUIDANCES,
    LATENT_SHAPE,
    PRESET,
    hidden_matrices,
    save_weights,
    to_network,
    write_sheet,
)


class VAETask:
    """The decoder: L1 + L2 on frames, pixels at and around the object weighted 10 times and more where it differs little from
    its background, through noise of random strength."""

    defaults = Defaults(steps=4000, batch=8, lr=2e-3, warmup=100, ema=0.998)
    noise = 0.25  # the most that is added to latents of unit deviation
    statistics = 1024  # clips that the channels' mean and deviation are taken over

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.made_from: dict[str, str] = {}
        torch.manual_seed(seed)
        self.vae = TinyVAE().to(device)
        self.model: nn.Module = self.vae
        self.matrices = hidden_matrices([c for name, c in self.vae.named_children() if name not in ("dec_in", "dec_out")])

    @torch.no_grad()
    def prepare(self, share: Share) -> None:
        """The channels' statistics, rounded to what the file will hold."""
        clips = (self.paint(self.scenes("statistics", i, 32)[0])[0] for i in range(-(-self.statistics // 32)))
        std, mean = torch.std_mean(torch.cat([self.vae.encode_raw(c) for c in clips]), dim=(0, 2, 3, 4))
        self.vae.mean.copy_(mean.half())
        self.vae.std.copy_(std.half())

    def scenes(self, key: str, step: int, count: int) -> tuple[Scenes, torch.Generator]:
        generator = keyed_generator(self.seed, key, step)
        return sample_scenes(count, generator), generator

    def paint(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Frames for the network, and the weight of each of their pixels."""
        cover = coverage(scenes)
        # Errors count by how much of the object's contrast they are: that is what hides a shape.
        near = max_pool2d((cover > 0.01).float(), 7, stride=1, padding=3) / contrast(scenes)[:, None, None, None]
        return to_network(paint(scenes, cover), self.device), (1 + 9 * near)[:, None].to(self.device)

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        scenes, generator = self.scenes("vae", step, batch)
        strength = self.noise * torch.rand(batch, 1, 1, 1, 1, generator=generator)
        noise = strength * torch.randn(batch, *LATENT_SHAPE, generator=generator)
        frames, weight = self.paint(scenes.rows(rows))
        return self.error(self.encode(frames) + noise[rows].to(self.device), frames, weight)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        return self.vae.encode(frames) * LATENT_SCALE

    def error(self, latent: Tensor, frames: Tensor, weight: Tensor) -> Tensor:
        error = (self.vae.decode_unit(latent).float() - frames).abs()
        return (weight * (error + 2 * error**2)).mean()

    def export(self, folder: Path, steps: int) -> list[Path]:
        return [save_weights(folder / "vae.safetensors", self.vae, torch.float16, {"steps": str(steps), "seed": str(self.seed)})]

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        frames, _ = self.paint(self.scenes("sheet", 0, 6)[0])
        output = self.vae.decode(self.vae.encode(frames))
        write_sheet(path, [(label, clip) for label, x in (("true", frames), ("reconstructed", output)) for clip in to_pixels(x)])


class DecoderTask(VAETask):
    """The decoder once more, on what it will be given: a clip's latent with noise that a network took out again, so that it
    learns to mend what the network leaves. Of six latents one is the clip's own, one as in `VAETask`, two are the teacher's and
    two the student's."""

    defaults = Defaults(steps=5000, batch=12, lr=1e-3, warmup=50, ema=0.998)
    sigma_max, denoise_steps = 0.75, 4  # the teacher's; up to there the noise leaves little doubt about the clip
    student_keys = 2  # the student begins at one of its last keys

    def __init__(self, seed: int, device: torch.device, weights: Path) -> None:
        from .. import load_tiny, part_hash

        super().__init__(seed, device)
        self.made_from = {part: part_hash(part, weights) for part in ("encoder", "text_encoder", "teacher", "student")}
        self.teacher, self.text, trained = load_tiny("teacher", device=device, folder=weights)
        self.student = load_tiny("student", device=device, folder=weights)[0]
        self.vae.load_state_dict(trained.state_dict())

    def prepare(self, share: Share) -> None:
        pass

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        scenes, generator = self.scenes("decoder", step, batch)
        named = [open_some(scenes.names(i), generator) for i in range(batch)]
        said = [write_prompt(some, generator) if some else "" for some in named]
        strength, start = torch.rand(batch, generator=generator), torch.randint(self.student_keys, (batch,), generator=generator)
        noise = torch.randn(batch, *LATENT_SHAPE, generator=generator)
        strength[::6] = 0
        kind = (torch.arange(batch) % 3)[rows]
        frames, weight = self.paint(scenes.rows(rows))
        strength, start, noise, prompts = strength[rows].to(self.device), start[rows], noise[rows].to(self.device), said[rows]
        latent = self.encode(frames)
        way = self.ways(strength, start)
        for number, network in ((1, self.teacher), (2, self.student)):
            mine = kind == number
            told = [prompt for prompt, own in zip(prompts, mine.tolist(), strict=True) if own]
            if told:
                latent[mine] = self.denoise(network, latent[mine], noise[mine], way[number - 1][mine], told)
        latent[kind == 0] += (self.noise * strength.view(-1, 1, 1, 1, 1) * noise)[kind == 0]
        return self.error(latent, frames, weight)

    def ways(self, strength: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Sigmas (B, steps + 1) of the teacher, from `sigma_max * strength` down evenly, and of the student, from its `start`-th
        key before the clean one; a student that begins later waits there."""
        evenly = torch.linspace(1, 0, self.denoise_steps + 1, device=self.device)
        keys = PRESET.sigmas()[-self.student_keys - 1 :].to(self.device)
        places = torch.maximum(torch.arange(len(keys))[None], start[:, None])
        return self.sigma_max * strength[:, None] * evenly, keys[places.to(self.device)]

    @torch.no_grad()
    def denoise(self, network: HunyuanVideoDiT, clean: Tensor, noise: Tensor, sigmas: Tensor, prompts: Sequence[str]) -> Tensor:
        """A network's way from the first to the last sigma (B, steps + 1)."""
        cond = self.text.condition(prompts, torch.full((len(prompts),), GUIDANCES[0]))
        latent = torch.lerp(clean, noise, sigmas[:, 0].view(-1, 1, 1, 1, 1))
        for now, after in zip(sigmas.T, sigmas.T[1:], strict=False):
            latent = latent + (after - now).view(-1, 1, 1, 1, 1) * network(latent, now, cond).float()
        return latent
