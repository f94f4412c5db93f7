"""The base by flow matching, the guided base, which has its guidance distilled in, and the teacher, which completes prompts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, unfold
from tqdm import tqdm

from ...dit import DiTConfig, HunyuanVideoDiT
from ...schedule import shift_sigmas
from ..clips import CLASSES, Scenes, coverage, keyed_generator, paint, sample_scenes
from ..pipeline import TinyPipeline
from ..prompts import open_some, write_prompt
from ..share import Share
from ..text import TinyTextEncoder
from ..training import Defaults, Part
from ..vae import LATENT_SCALE, TinyVAE
from .common import (
    PRESET,
    TEACHER_STEPS,
    block_matrices,
    draw_guidance,
    sample_sheet,
    save_weights,
    to_network,
)
from .trajectories import Capture


class LatentPool:
    """Model-space latents of clips and their scenes, drawn anew every `reuse` passes, keyed by (seed, round)."""

    def __init__(self, vae: TinyVAE, seed: int, device: torch.device, size: int = 8192, reuse: int = 8) -> None:
        self.vae, self.seed, self.device, self.size, self.reuse = vae, seed, device, size, reuse
        self.round = -1
        self.scenes: Scenes
        self.latents: Tensor

    @torch.no_grad()
    def fill(self, number: int) -> None:
        self.scenes = sample_scenes(self.size, keyed_generator(self.seed, "pool", number))
        chunks = []
        with torch.autocast(self.device.type, enabled=False):
            for start in tqdm(range(0, self.size, 64), desc=f"clips, round {number}", leave=False, mininterval=5):
                scenes = self.scenes.rows(slice(start, start + 64))
                latents = self.vae.encode(to_network(paint(scenes, coverage(scenes)), self.device)) * LATENT_SCALE
                chunks.append(latents.half())
            self.latents, self.round = torch.cat(chunks), number

    def draw(self, step: int, count: int, generator: torch.Generator) -> tuple[Tensor, Scenes]:
        """(count, 16, 5, 8, 8) float32 latents and their scenes."""
        number = step * count // (self.size * self.reuse)
        if number != self.round:
            self.fill(number)
        index = torch.randint(self.size, (count,), generator=generator)
        return self.latents[index.to(self.device)].float(), self.scenes.rows(index)


class SceneProbe(nn.Module):
    """Reads the scene off a block's features, for training only: a representation-alignment loss (REPA, arXiv 2410.06940)
    whose target is not another network's features but what the clip is known to show."""

    geometry = (("radius", 8.25, 1.0), ("speed", 1.8, 0.23), ("centre", 32.0, 10.0))  # mean and deviation
    covered = 0.03  # variance of a cell's coverage

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.whole = nn.Linear(width, sum(map(len, CLASSES.values())) + 4)
        self.cells = nn.Linear(width, 4 * 2 * 2)  # frames, rows and columns of cells of a token

    def forward(self, features: Tensor, scenes: Scenes) -> Tensor:
        """Loss of features (B, N, D), tokens in order of (t, h, w), for B scenes."""
        x = self.norm(features)
        guess, start, loss = self.whole(x.mean(1)).float(), 0, x.new_zeros((), dtype=torch.float32)
        for kind, classes in CLASSES.items():
            logits, start = guess[:, start : start + len(classes)], start + len(classes)
            loss = loss + cross_entropy(logits, getattr(scenes, kind).to(x.device)) / len(CLASSES)
        known = [(getattr(scenes, k).view(len(scenes), -1) - mean) / std for k, mean, std in self.geometry]
        loss = loss + (guess[:, start:] - torch.cat(known, 1).to(x.device)).pow(2).mean()
        return loss + (self.cells(x).float() - cell_coverage(scenes).to(x.device)).pow(2).mean() / self.covered


def cell_coverage(scenes: Scenes) -> Tensor:
    """(B, N, 16): for every token, in order of (t, h, w), the share the object covers of its 2 x 2 cells in 4 frames."""
    cover = avg_pool2d(coverage(scenes), 8)
    cover = torch.cat([cover[:, :1].expand(-1, 3, -1, -1), cover], 1)
    return rearrange(cover, "b (n f) (h p) (w q) -> b (n h w) (f p q)", f=4, p=2, q=2)


@torch.no_grad()
def shape_filters(vae: TinyVAE, device: torch.device, count: int = 12, size: int = 256) -> Tensor:
    """(count, 16, 3, 3): unit filters over a latent frame whose answers change most when a scene's shape does and nothing else,
    beside what they vary between scenes: generalised eigenvectors of the two covariances. In float64, so on the CPU: MPS has
    none."""
    scenes = sample_scenes(size, keyed_generator(0, "shape filters", 0))

    def patches(shape: Tensor) -> Tensor:
        named = replace(scenes, shape=shape)
        latents = (vae.encode(to_network(paint(named, coverage(named)), device)) * LATENT_SCALE).cpu()
        cells = unfold(rearrange(latents, "b c t h w -> (b t) c h w"), 3, padding=1)
        return rearrange(cells, "b d n -> (b n) d").double()

    def covariance(x: Tensor) -> Tensor:
        c = x.mT @ x
        return c / c.diagonal().mean()

    first, *others = (patches(torch.full_like(scenes.shape, i)) for i in range(len(CLASSES["shape"])))
    pairs = [first - others[0], first - others[1], others[0] - others[1]]
    differ = torch.stack([covariance(p) for p in pairs]).mean(0)
    vary = covariance(patches(scenes.shape)) + 0.05 * torch.eye(len(differ), dtype=differ.dtype)
    whiten = torch.linalg.inv(torch.linalg.cholesky(vary))
    filters = torch.linalg.eigh(whiten @ differ @ whiten.mT)[1].mT.flip(0)[:count] @ whiten
    return (filters / filters.norm(dim=1, keepdim=True)).float().unflatten(1, (-1, 3, 3)).to(device)


# Flow error of a trained network by sigma, over its mean in training.
LEVELS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.85, 0.93, 0.97, 1.0)
LEVEL_ERRORS = (2.0, 1.15, 0.55, 0.39, 0.41, 0.74, 1.8, 3.5, 6.3)


def level_weight(sigma: Tensor) -> Tensor:
    """One over the error to expect at that sigma, so that all noise levels count alike (EDM2, arXiv 2312.02696, learns it):
    without it those where only place and motion are decided drown the others."""
    return torch.from_numpy(np.exp(-np.interp(sigma.cpu(), LEVELS, np.log(LEVEL_ERRORS)))).to(sigma)


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers uniform in [0, 1), one in every count-th part of it, in random order."""
    return (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count


class ShapeError:
    """(B,) mean squares of a velocity's difference (B, 16, T, h, w) to its target, half of each as the shape filters see it. The
    square of any linear view has the same minimum, the mean velocity."""

    def __init__(self, vae: TinyVAE, device: torch.device) -> None:
        self.filters = shape_filters(vae, device)

    def __call__(self, difference: Tensor) -> Tensor:
        seen = conv2d(rearrange(difference, "b c t h w -> (b t) c h w"), self.filters, padding=1)
        seen = rearrange(seen, "(b t) c h w -> b (c t h w)", b=len(difference))
        return (difference.flatten(1).square().mean(1) + seen.square().mean(1)) / 2


class FlowError:
    """The mean `ShapeError`, every noise level counting alike."""

    def __init__(self, vae: TinyVAE, device: torch.device) -> None:
        self.each = ShapeError(vae, device)

    def __call__(self, difference: Tensor, sigma: Tensor) -> Tensor:
        return (self.each(difference) * level_weight(sigma)).mean()


class FlowTask:
    """Flow matching's draws: at latent (1 - sigma) * x0 + sigma * noise the velocity is noise - x0; prompts leave a random part
    of the attributes open."""

    shift = 5.0  # of the training sigmas; sampling uses 7

    def __init__(self, part: Part, seed: int, device: torch.device, weights: Path) -> None:
        from .. import load_vae, part_hash

        self.part, self.seed, self.device = part, seed, device
        self.vae = load_vae(weights).to(device)
        self.made_from = {"encoder": part_hash("encoder", weights)}
        self.pool = LatentPool(self.vae, seed, device)
        self.error = FlowError(self.vae, device)

    def prepare(self, share: Share) -> None:
        pass

    def draw(self, step: int, batch: int, rows: slice) -> Flow:
        """These rows of the step's batch."""
        generator = keyed_generator(self.seed, self.part, step)
        clean, scenes = self.pool.draw(step, batch, generator)
        said = [open_some(scenes.names(i), generator) for i in range(batch)]
        prompts = [write_prompt(s, generator) if s else "" for s in said]
        sigma = shift_sigmas(stratified(batch, generator), self.shift).to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        guidance = draw_guidance(batch, generator)
        return Flow(clean[rows], noise[rows], sigma[rows], prompts[rows], guidance[rows], scenes.rows(rows))


@dataclass(frozen=True)
class Flow:
    """A batch of flow matching: latents (B, 16, 5, 8, 8), sigmas and guidances (B,), and what the clips show."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    prompts: list[str]
    guidance: Tensor
    scenes: Scenes

    @property
    def noisy(self) -> Tensor:
        return torch.lerp(self.clean, self.noise, self.sigma.view(-1, 1, 1, 1, 1))


class BaseTask(FlowTask):
    """Flow matching: text encoder and network learn together."""

    defaults = Defaults(steps=8000, batch=32, lr=1.5e-3, warmup=100, ema=0.999)
    probed, probe_weight = "single_blocks.1", 0.1

    def __init__(self, seed: int, device: torch.device, weights: Path) -> None:
        super().__init__("base", seed, device, weights)
        torch.manual_seed(seed)
        self.network = HunyuanVideoDiT(DiTConfig.tiny()).init_weights(seed).to(device)
        self.text = TinyTextEncoder().to(device)
        self.probe = SceneProbe(self.network.config.hidden_size).to(device)
        self.model: nn.Module = nn.ModuleDict({"network": self.network, "text": self.text, "probe": self.probe})
        self.matrices = block_matrices(self.network)

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        flow = self.draw(step, batch, rows)
        cond = self.text.condition(flow.prompts, flow.guidance)
        velocity, features = self.network(flow.noisy, flow.sigma, cond, (self.probed,))
        error = self.error(velocity.float() - (flow.noise - flow.clean), flow.sigma)
        return error + self.probe_weight * self.probe(features[self.probed], flow.scenes)

    def export(self, folder: Path, steps: int) -> list[Path]:
        from .. import part_hash

        note = {"steps": str(steps), "seed": str(self.seed), "family": "tiny", **self.made_from}
        text = save_weights(folder / "text_encoder.safetensors", self.text, torch.float16, note)
        note["text_encoder"] = part_hash("text_encoder", folder)
        return [save_weights(folder / "base.safetensors", self.network, torch.bfloat16, note), text]

    def sheet(self, path: Path) -> None:
        sample_sheet(path, TinyPipeline(self.network, self.text, self.vae, "teacher"), TEACHER_STEPS)


class GuidedTask(FlowTask):
    """Guidance distillation: in one pass what guidance makes of two or three passes of the base. Its velocity is pushed on from
    the one without a prompt (classifier-free guidance), as HunyuanVideo was made; and, where a base from earlier in its training
    is given, from that one's (autoguidance, arXiv 2406.02507), which takes away what more training would. HunyuanVideo's
    embedded guidance of 6 stands for both. The teacher is made of it."""

    defaults = Defaults(steps=1500, batch=32, lr=1e-3, warmup=50, ema=0.998)
    scale, push = 2.5, 2.0

    def __init__(self, seed: int, device: torch.device, weights: Path, weaker: Path | None = None) -> None:
        from .. import load_tiny, part_hash

        super().__init__("guided", seed, device, weights)
        self.made_from |= {part: part_hash(part, weights) for part in ("text_encoder", "base")}
        self.base, self.text, _ = load_tiny("base", device=device, folder=weights)
        self.weaker, self.weaker_text = self.base, self.text
        if weaker is not None:
            self.made_from["weaker"] = part_hash("base", weaker)
            self.weaker, self.weaker_text, _ = load_tiny("base", device=device, folder=weaker)
        self.network = copy.deepcopy(self.base).requires_grad_(True).train()
        self.model: nn.Module = self.network
        self.matrices = block_matrices(self.network)

    @torch.no_grad()
    def target(self, flow: Flow) -> Tensor:
        def velocity(network: HunyuanVideoDiT, text: TinyTextEncoder, prompts: list[str]) -> Tensor:
            return network(flow.noisy, flow.sigma, text.condition(prompts, flow.guidance)).float()

        said = velocity(self.base, self.text, flow.prompts)
        guided = torch.lerp(velocity(self.base, self.text, [""] * len(flow.prompts)), said, self.scale)
        if self.weaker is self.base:
            return guided
        return guided + self.push * (said - velocity(self.weaker, self.weaker_text, flow.prompts))

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        flow = self.draw(step, batch, rows)
        cond = self.text.condition(flow.prompts, flow.guidance)
        return self.error(self.network(flow.noisy, flow.sigma, cond).float() - self.target(flow), flow.sigma)

    def export(self, folder: Path, steps: int) -> list[Path]:
        note = {"steps": str(steps), "seed": str(self.seed), "family": "tiny", "scale": str(self.scale), "push": str(self.push)}
        return [save_weights(folder / "guided.safetensors", self.network, torch.bfloat16, note | self.made_from)]

    def sheet(self, path: Path) -> None:
        sample_sheet(path, TinyPipeline(self.network, self.text, self.vae, "teacher"), TEACHER_STEPS)


class TeacherTask:
    """The guided base, taught to complete prompts. Guidance works on what a prompt says and leaves the rest where it was: the
    guided base draws nine in ten fully named prompts right, and one in three that name a single attribute. So the teacher goes,
    from a prompt that leaves attributes open, where the guided base goes with all of them named. Along trajectories of evenly
    drawn scenes its velocity comes out as the mean over the completions that a noisy latent may still become; so it samples their
    even mixture, each drawn as clearly as if it had been asked for."""

    defaults = Defaults(steps=800, batch=32, lr=5e-4, warmup=50, ema=0.998)
    every = 2  # of the grid's points one in so many is kept

    def __init__(self, seed: int, device: torch.device, weights: Path, run: Path, count: int) -> None:
        from .. import load_tiny, part_hash

        self.seed, self.device, self.count = seed, device, count
        captured = {part: part_hash(part, weights) for part in ("encoder", "text_encoder", "guided")}
        self.made_from = captured | {"trajectories": str(count)}
        self.guided, self.text, self.vae = load_tiny("guided", device=device, folder=weights)
        self.error = FlowError(self.vae, device)
        self.network = copy.deepcopy(self.guided).requires_grad_(True).train()
        self.model: nn.Module = self.network
        self.matrices = block_matrices(self.network)
        points = range(0, TEACHER_STEPS, self.every)
        self.capture = Capture(self.guided, self.text, points, True, run, seed, captured, device)
        self.sigmas = PRESET.sigmas(TEACHER_STEPS)[list(points)].to(device)
        self.latents: Tensor  # (N, points, 16, 5, 8, 8)
        self.prompts: list[str]
        self.names: list[dict[str, str]]

    def prepare(self, share: Share) -> None:
        self.latents, self.prompts, self.names = self.capture.all(self.count, share)

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        generator = keyed_generator(self.seed, "teacher", step)
        index = torch.randint(len(self.latents), (batch,), generator=generator)
        position = (stratified(batch, generator) * len(self.sigmas)).long()
        said = [open_some(self.names[int(i)], generator) for i in index]
        prompts = [write_prompt(s, generator) if s else "" for s in said][rows]
        guidance, index, position = draw_guidance(batch, generator)[rows], index[rows], position[rows]
        noisy, sigma = self.latents[index, position].float().to(self.device), self.sigmas[position.to(self.device)]
        with torch.no_grad():
            target = self.guided(noisy, sigma, self.text.condition([self.prompts[int(i)] for i in index], guidance)).float()
            cond = self.text.condition(prompts, guidance)
        return self.error(self.network(noisy, sigma, cond).float() - target, sigma)

    def export(self, folder: Path, steps: int) -> list[Path]:
        note = {"steps": str(steps), "seed": str(self.seed), "family": "tiny", **self.made_from}
        return [save_weights(folder / "teacher.safetensors", self.network, torch.bfloat16, note)]

    def sheet(self, path: Path) -> None:
        sample_sheet(path, TinyPipeline(self.network, self.text, self.vae, "teacher"), TEACHER_STEPS)
