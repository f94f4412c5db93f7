"""The arms of the ablation, and what each learns from: the teacher's trajectories, or forward diffusion of clips.

A distillation by forward diffusion takes a clean latent x of some data set, noises it to (1 - sigma) x + sigma z, and has the
student learn where the teacher goes from there. The paper argues that such points are not the teacher's own, the less so the
more the data differ from what the teacher makes. Key k of m, n samples of a dataset, latents (C, T, H, W) in model space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..distill.adapters import Adapter
from ..distill.source import SynVidSource
from ..errors import CheckpointError
from ..files import atomic_path
from ..sampling import Velocity, euler_flow, make_noise
from ..synvid import Batch, Header, SynVidDataset, SynVidStore
from ..synvid.capture import capture, pad_texts
from ..synvid.plan import Plan
from ..tiny import load_text_encoder, load_vae
from ..tiny.clips import keyed_generator, render, sample_scenes
from ..tiny.pipeline import PRESET
from ..tiny.prompts import open_some, read_prompt, write_prompt
from ..tiny.tasks.common import KEYS, LATENT_SHAPE, to_network
from ..tiny.training import check_made_from
from ..tiny.vae import LATENT_SCALE

Data = Literal["trajectories", "matched", "mismatched"]
SHRUNK = 0.5  # what radius and speed of the mismatched clips' objects are of the teacher's data's


@dataclass(frozen=True)
class Arm:
    """One thing to compare.

    what    in the table
    config  fields of TrainConfig in which it differs from the full method; None for the teacher, which is not trained
    data    what it learns from
    steps   it is sampled in
    """

    what: str
    config: Mapping[str, Any] | None = field(default_factory=dict)
    data: Data = "trajectories"
    steps: int = PRESET.steps

    @property
    def updates(self) -> int:
        """Of the student, in an iteration of Algorithm 1: one a key for each loss."""
        weights = [(self.config or {}).get(name, 1.0) for name in ("trajectory_weight", "adversarial_weight")]
        return KEYS * sum(weight > 0 for weight in weights)

    def iterations(self, updates: int) -> int:
        """So that the student is updated as often in every arm."""
        return math.ceil(updates / self.updates)


ALONE = {"adversarial_weight": 0.0}
ARMS: MappingProxyType[str, Arm] = MappingProxyType(
    {
        "teacher-50": Arm("teacher, 50 steps", None, steps=PRESET.teacher_steps),
        "teacher-5": Arm("teacher, 5 steps", None),
        "trajectory": Arm("trajectory loss alone", ALONE),
        "adversarial": Arm("adversarial loss alone", {"trajectory_weight": 0.0}),
        "one-head": Arm("both losses, one head for all keys", {"heads": "one"}),
        "full": Arm("both losses, a head for every key (AccVideo)"),
        "x0": Arm("trajectory loss alone, on the clean latent", ALONE | {"target": "x0"}),
        "forward-matched": Arm("forward diffusion of the teacher's clips", ALONE, "matched"),
        "forward-mismatched": Arm("forward diffusion of other clips", ALONE, "mismatched"),
    }
)


def captured(
    folder: Path, adapter: Adapter, teacher: torch.nn.Module, count: int, seed: int, device: torch.device, quiet: bool
) -> SynVidDataset:
    """A SynVid dataset of the teacher's trajectories on `count` prompts of the tiny world; what is there stays."""
    plan, encoder = Plan(folder / "plan", create=True), load_text_encoder()
    for number in range(len(plan.items), count):
        generator = keyed_generator(seed, "ablation", number)
        prompt = write_prompt(open_some(sample_scenes(1, generator).names(0), generator), generator)
        with torch.no_grad():
            text, pooled, _ = encoder.encode([prompt])
        plan.add(prompt, text[0], pooled[0], int(torch.randint(2**53, (), generator=generator)), LATENT_SHAPE)
    fingerprint = adapter.fingerprint(teacher)
    header = Header.of("tiny", fingerprint, PRESET.teacher_steps, KEYS, PRESET.shift, PRESET.guidance, teacher="tiny")
    store = SynVidStore(folder / "synvid", header)
    items = [plan.items[name] for name in store.missing(list(plan.items)[:count])]
    with tqdm(total=len(items), desc="capturing", unit="trajectory", disable=quiet, leave=False) as bar:
        faults = capture(
            lambda x, sigma, told: adapter.velocity(teacher, x, sigma, told),
            plan,
            items,
            store,
            batch=32,
            device=device,
            progress=lambda n: bar.update(n) and None,
            condition=adapter.conditioning,
        )
    if faults:
        raise CheckpointError(f"the teacher's trajectories cannot be stored: {faults[0]}; its weights are damaged")
    return SynVidDataset(folder / "synvid", ids=list(plan.items)[:count])


class ForwardSource(SynVidSource):
    """The draws and prompts of a SynVid source, with other segments: noisy and clean (m, n, C, T, H, W) by key and sample."""

    def __init__(self, dataset: SynVidDataset, batch: int, seed: int, name: str, noisy: Tensor, clean: Tensor) -> None:
        super().__init__(dataset, batch, seed)
        self._name, self._noisy, self._clean = name, noisy, clean
        self._place = {sample.id: i for i, sample in enumerate(dataset.samples)}

    def batch(self, step: int, key: int) -> Batch:
        batch = super().batch(step, key)
        rows = [self._place[name] for name in batch.ids]
        return replace(batch, noisy=self._noisy[key, rows].float(), clean=self._clean[key, rows].float())

    def state(self) -> dict[str, Any]:
        return super().state() | {"data": self._name}


@torch.no_grad()
def clean_latents(dataset: SynVidDataset, data: Data, seed: int) -> Iterator[Tensor]:
    """(C, T, H, W) for every sample: the teacher's own clip, or one that its prompt describes as well, but drawn half as large
    and half as fast as any the teacher was trained on."""
    vae = load_vae()
    for sample in dataset.samples:
        if data == "matched":
            yield dataset.reader.read(sample, 0).float()
            continue
        scene = sample_scenes(1, keyed_generator(seed, "other clips", sample.id), read_prompt(sample.prompt))
        scene = replace(scene, radius=SHRUNK * scene.radius, speed=SHRUNK * scene.speed)
        yield vae.encode(to_network(render(scene), torch.device("cpu")))[0] * LATENT_SCALE


@torch.no_grad()
def forward_segments(
    path: Path,
    dataset: SynVidDataset,
    data: Data,
    adapter: Adapter,
    teacher: torch.nn.Module,
    seed: int,
    device: torch.device,
    quiet: bool,
    rows: int = 32,
) -> tuple[Tensor, Tensor]:
    """(noisy, clean), each (m, n, C, T, H, W) float16: forward diffusion's points at key k + 1, and where the teacher's own steps
    lead from there at key k. Made once and kept at `path`. CheckpointError for a file that cannot be read, InvalidValueError for
    one that was made from something else."""
    header = dataset.header
    recipe = {"data": data, "dataset": dataset.digest, "teacher": header.fingerprint, "seed": str(seed)}
    if path.exists():
        cure = "delete it, or choose another --out"
        try:
            with safe_open(path, framework="pt") as file:
                check_made_from(path, file.metadata(), recipe, cure)
                return file.get_tensor("noisy"), file.get_tensor("clean")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {str(path)!r} ({error}); {cure}") from error
    sigmas, positions = torch.tensor(header.sigmas), header.keys[::-1]
    clean = torch.stack(list(clean_latents(dataset, data, seed)))
    made: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in tqdm(range(0, len(clean), rows), f"{data} data", disable=quiet, leave=False):
        samples = dataset.samples[start : start + rows]
        texts = pad_texts([dataset.reader.text(sample.text) for sample in samples])
        velocity = _velocity(adapter, teacher, adapter.conditioning(texts, header.guidance).to(device))
        starts, ends = [], []
        for key in range(header.segments):
            way = sigmas[positions[key + 1] : positions[key] + 1]
            seeds = [int(torch.randint(2**53, (), generator=keyed_generator(seed, data, sample.id, key))) for sample in samples]
            noise = make_noise((len(samples), *clean.shape[1:]), seeds)
            starts.append(torch.lerp(clean[start : start + rows], noise, float(way[0])))
            ends.append(euler_flow(velocity, starts[-1].to(device), way).cpu())
        made[0].append(torch.stack(starts).half())
        made[1].append(torch.stack(ends).half())
    noisy, reached = (torch.cat(parts, 1) for parts in made)
    with atomic_path(path) as temporary:
        save_file({"noisy": noisy, "clean": reached}, temporary, metadata=recipe)
    return noisy, reached


def _velocity(adapter: Adapter, network: torch.nn.Module, told: Any) -> Velocity:
    return lambda latent, sigma: adapter.velocity(network, latent, sigma, told)
