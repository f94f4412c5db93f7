"""What each part of the tiny world learns: reconstruction, flow matching, and the teacher's trajectories (Eq. 6)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, max_pool2d
from tqdm import tqdm

from ..distill import trajectory_loss
from ..dit import DiTConfig, HunyuanVideoDiT
from ..errors import CheckpointError, InvalidValueError
from ..files import atomic_path
from ..sampling import Step, euler_flow, make_noise
from ..schedule import PRESETS, key_indices, key_sigmas, shift_sigmas
from .clips import CLASSES, Scenes, coverage, keyed_generator, paint, sample_scenes
from .pipeline import TinyPipeline
from .prompts import open_some, write_prompt
from .share import Share
from .text import TinyTextEncoder
from .training import Defaults, Part, Task, check_made_from
from .vae import CHANNELS, LATENT_SCALE, TinyVAE, to_pixels

PRESET = PRESETS["tiny"]
TEACHER_STEPS, KEYS = PRESET.teacher_steps, PRESET.keys or 5
LATENT_SHAPE = (CHANNELS, 5, 8, 8)
# The two values one guidance of 6 takes in the network: 6000 in float32, 6016 in bfloat16.
GUIDANCES = (6.0, 6.016)


def make_task(part: Part, seed: int, weights: Path, run: Path, device: torch.device, trajectories: int) -> Task:
    """The task of that name, reading what earlier parts wrote to `weights`."""
    if part == "vae":
        return VAETask(seed, device)
    if part == "decoder":
        return DecoderTask(seed, device, weights)
    if part == "teacher":
        return TeacherTask(seed, device, weights)
    return StudentTask(seed, device, weights, run, trajectories)


def to_network(frames: Tensor, device: torch.device) -> Tensor:
    """(B, T, H, W, 3) in [0, 1] -> (B, 3, T, H, W) in [-1, 1] on the device."""
    return (frames * 2 - 1).permute(0, 4, 1, 2, 3).contiguous().to(device)


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
    """Write a module's tensors; the metadata names what it was made from, and `load_tiny` holds the parts to it."""
    state = {name: t.detach().to("cpu", dtype).contiguous() for name, t in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **metadata})
    return path


def hidden_matrices(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """What Muon is for: matrices and convolutions inside a network; not those that read its input or make its output."""
    return [p for layer in layers for p in layer.parameters() if p.ndim >= 2]


class VAETask:
    """The decoder: L1 + L2 on frames, pixels at and around the object weighted 10 times, through noise of random strength."""

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
        near = max_pool2d((cover > 0.01).float(), 7, stride=1, padding=3)
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
    """The decoder once more, on what it will be given: a clip's latent with noise that the teacher took out again, so that it
    learns to mend what the teacher leaves. Half the noisy latents are as in `VAETask`."""

    defaults = Defaults(steps=2000, batch=8, lr=1e-3, warmup=50, ema=0.998)
    sigma_max, denoise_steps = 0.75, 4  # up to there the noise leaves little doubt about the clip

    def __init__(self, seed: int, device: torch.device, weights: Path) -> None:
        from . import load_tiny, part_hash

        super().__init__(seed, device)
        self.made_from = {part: part_hash(part, weights) for part in ("encoder", "text_encoder", "teacher")}
        self.teacher, self.text, trained = load_tiny("teacher", device=device, folder=weights)
        self.vae.load_state_dict(trained.state_dict())

    def prepare(self, share: Share) -> None:
        pass

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        scenes, generator = self.scenes("decoder", step, batch)
        prompts = [write_prompt(scenes.names(i), generator) for i in range(batch)]
        strength = torch.rand(batch, 1, 1, 1, 1, generator=generator)
        noise = torch.randn(batch, *LATENT_SHAPE, generator=generator)
        plain = (torch.arange(batch) % 2 == 0).view(-1, 1, 1, 1, 1)
        strength, noise, plain = (x[rows].to(self.device) for x in (strength, noise, plain))
        frames, weight = self.paint(scenes.rows(rows))
        latent = self.encode(frames)
        mended = self.denoise(latent, noise, self.sigma_max * strength.flatten(), prompts[rows])
        return self.error(torch.where(plain, latent + self.noise * strength * noise, mended), frames, weight)

    @torch.no_grad()
    def denoise(self, clean: Tensor, noise: Tensor, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
        """The teacher's way from sigma to 0 in a few steps."""
        cond = self.text.condition(prompts, torch.full((len(prompts),), GUIDANCES[0]))
        latent = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        for i in range(self.denoise_steps):
            now = sigma * (1 - i / self.denoise_steps)
            latent = latent - (sigma / self.denoise_steps).view(-1, 1, 1, 1, 1) * self.teacher(latent, now, cond).float()
        return latent


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
        for start in tqdm(range(0, self.size, 64), desc=f"clips, round {number}", leave=False, mininterval=5):
            scenes = self.scenes.rows(slice(start, start + 64))
            with torch.autocast(self.device.type, enabled=False):
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


def draw_guidance(count: int, generator: torch.Generator) -> Tensor:
    return torch.tensor(GUIDANCES)[torch.randint(2, (count,), generator=generator)]


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


class TeacherTask:
    """Flow matching: at latent (1 - sigma) * x0 + sigma * noise the velocity is noise - x0. Text encoder and network
    learn together; prompts leave a random part of the attributes open."""

    defaults = Defaults(steps=6000, batch=32, lr=1.5e-3, warmup=100, ema=0.999)
    shift = 5.0  # of the training sigmas; sampling uses 7
    probed, probe_weight = "single_blocks.1", 0.1

    def __init__(self, seed: int, device: torch.device, weights: Path) -> None:
        from . import load_vae, part_hash

        self.seed, self.device = seed, device
        self.vae = load_vae(weights).to(device)
        self.made_from = {"encoder": part_hash("encoder", weights)}
        torch.manual_seed(seed)
        self.network = HunyuanVideoDiT(DiTConfig.tiny()).init_weights(seed).to(device)
        self.text = TinyTextEncoder().to(device)
        self.probe = SceneProbe(self.network.config.hidden_size).to(device)
        self.model: nn.Module = nn.ModuleDict({"network": self.network, "text": self.text, "probe": self.probe})
        self.matrices = hidden_matrices([*self.network.double_blocks, *self.network.single_blocks])
        self.pool = LatentPool(self.vae, seed, device)

    def prepare(self, share: Share) -> None:
        pass

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        generator = keyed_generator(self.seed, "teacher", step)
        clean, scenes = self.pool.draw(step, batch, generator)
        said = [open_some(scenes.names(i), generator) for i in range(batch)]
        prompts = [write_prompt(s, generator) if s else "" for s in said]
        u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        sigma = shift_sigmas(u, self.shift).to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        guidance = draw_guidance(batch, generator)
        clean, noise, sigma, scenes = clean[rows], noise[rows], sigma[rows], scenes.rows(rows)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        cond = self.text.condition(prompts[rows], guidance[rows])
        velocity, features = self.network(noisy, sigma, cond, (self.probed,))
        flow = (velocity.float() - (noise - clean)).pow(2).mean()
        return flow + self.probe_weight * self.probe(features[self.probed], scenes)

    def export(self, folder: Path, steps: int) -> list[Path]:
        from . import part_hash

        note = {"steps": str(steps), "seed": str(self.seed), "family": "tiny", **self.made_from}
        text = save_weights(folder / "text_encoder.safetensors", self.text, torch.float16, note)
        note["text_encoder"] = part_hash("text_encoder", folder)
        return [save_weights(folder / "teacher.safetensors", self.network, torch.bfloat16, note), text]

    def sheet(self, path: Path) -> None:
        sample_sheet(path, TinyPipeline(self.network, self.text, self.vae, "teacher"), TEACHER_STEPS)


class StudentTask:
    """The trajectory loss alone: from key point k+1 of a teacher's trajectory, the velocity of the segment to key k."""

    defaults = Defaults(steps=400, batch=32, lr=5e-4, warmup=50, ema=0.998)
    chunk = 128  # trajectories captured and stored together

    def __init__(self, seed: int, device: torch.device, weights: Path, run: Path, count: int) -> None:
        from . import load_tiny, part_hash

        if count < 1:
            raise InvalidValueError(f"trajectories is {count}; it must be at least 1")
        self.seed, self.device, self.run, self.count = seed, device, run, count
        self.made_from = {part: part_hash(part, weights) for part in ("encoder", "text_encoder", "teacher")}
        self.teacher, self.text, self.vae = load_tiny("teacher", device=device, folder=weights)
        self.network = copy.deepcopy(self.teacher)
        self.network.requires_grad_(True).train()
        self.model: nn.Module = self.network
        self.matrices = hidden_matrices([*self.network.double_blocks, *self.network.single_blocks])
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


SHEET_PROMPTS = (
    "a red ball moving left on a black background",
    "an azure box rising on a grey background",
    "a golden triangle",
    "a snowy disc going to the right on a teal background",
    "a violet thing falling",
    "a shape on a brown background",
)


def sample_sheet(path: Path, pipeline: TinyPipeline, steps: int) -> None:
    made = pipeline.generate(SHEET_PROMPTS, range(len(SHEET_PROMPTS)), steps)
    write_sheet(path, list(zip(SHEET_PROMPTS, made.frames, strict=True)))


def write_sheet(path: Path, rows: list[tuple[str, NDArray[np.uint8]]]) -> None:
    """A PNG with a row of stills for each label and clip (T, H, W, 3)."""
    from ..media import contact_sheet, write_png

    write_png(path, contact_sheet(rows))
