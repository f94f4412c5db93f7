"""How close a model of the tiny world stays to its teacher: along its trajectories, in distribution, in motion and sharpness.

Both sample the same prompts from two noises each. The first noises are shared, so that errors can be told sample by sample; model
and teacher are compared as distributions, from the first noises and from the second, as the teacher is with itself, which is the
floor. N rows of a plan, key k of m, latents (C, T, H, W) in model space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError, InvalidValueError
from ..files import atomic_path
from ..sampling import euler_flow, make_noise
from ..schedule import key_indices
from ..synvid.capture import KeyLatents
from ..tiny.clips import CLASSES, FRAMES, SIZE, keyed_generator
from ..tiny.pipeline import PRESET, TinyPipeline, latent_shape
from ..tiny.training import check_made_from
from ..tiny.vae import LATENT_SCALE, to_pixels
from . import metrics
from .exam import Reads, Row, read_clips, rights, wilson
from .metrics import Estimate, Statistic, jackknife

KEYS = PRESET.keys or 5


@dataclass(frozen=True)
class Made:
    """What a model makes of a plan.

    first, second  (N, m + 1, C, T, H, W) float32 on the CPU: key latents, key k at place k, from each row's own seed and from
                   a second one
    frames         (N, F, H, W, 3) uint8: the clips of `first`
    reads          what the oracle sees in them
    """

    first: Tensor
    second: Tensor
    frames: NDArray[np.uint8]
    reads: Reads


def second_seed(seed: int) -> int:
    """Of a row's second noise."""
    return int(torch.randint(2**53, (), generator=keyed_generator("second noise", seed)))


def plan_hash(rows: Sequence[Row]) -> str:
    """Tells one plan from another."""
    return str(keyed_generator(json.dumps([asdict(row) for row in rows])).initial_seed())


def check_steps(steps: int) -> None:
    """InvalidValueError unless key points lie on a schedule of so many steps."""
    if steps < 1 or steps % KEYS:
        raise InvalidValueError(f"steps is {steps}; the comparison to the teacher needs a multiple of its {KEYS} key segments")


@torch.inference_mode()
def make(pipeline: TinyPipeline, rows: Sequence[Row], sigmas: Tensor, batch: int, quiet: bool = False) -> Made:
    """Sample every row from both its noises, `batch` at once."""
    steps, device = len(sigmas) - 1, pipeline.device
    shape = latent_shape(FRAMES, SIZE, SIZE)
    keys: tuple[list[Tensor], list[Tensor]] = ([], [])
    frames = []
    for start in tqdm(range(0, len(rows), batch), f"{pipeline.which}, {steps} steps", disable=quiet, leave=False):
        chunk = rows[start : start + batch]
        velocity = pipeline.velocity(pipeline.condition([row.prompt for row in chunk]))
        for kept, seeds in zip(keys, ([r.seed for r in chunk], [second_seed(r.seed) for r in chunk]), strict=True):
            noise, observer = make_noise((len(chunk), *shape), seeds), KeyLatents(steps, KEYS)
            euler_flow(velocity, noise.to(device), sigmas, [observer])
            kept.append(torch.stack([*observer.latents(), noise], 1))
        frames.append(to_pixels(pipeline.vae.decode(keys[0][-1][:, 0].to(device) / LATENT_SCALE)))
    clips = np.concatenate(frames)
    return Made(torch.cat(keys[0]), torch.cat(keys[1]), clips, read_clips(clips))


def kept(path: Path, recipe: dict[str, str], work: Callable[[], Made]) -> Made:
    """What `work` makes, or what it made before and was kept at `path`. InvalidValueError if that was made by another recipe,
    CheckpointError if it cannot be read."""
    cure = "delete it, or choose another place"
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                check_made_from(path, file.metadata() or {}, recipe, cure)
                first, second, frames = (file.get_tensor(name) for name in ("first", "second", "frames"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {str(path)!r} ({error}); {cure}") from error
        return Made(first, second, frames.numpy(), read_clips(frames.numpy()))
    made = work()
    with atomic_path(path) as temporary:
        tensors = {"first": made.first, "second": made.second, "frames": torch.from_numpy(made.frames).contiguous()}
        save_file(tensors, temporary, metadata=recipe)
    return made


@torch.inference_mode()
def forced(pipeline: TinyPipeline, rows: Sequence[Row], teacher: Tensor, sigmas: Tensor, batch: int) -> Tensor:
    """(N, m, C, T, H, W): key k as the model makes it from the teacher's own key k + 1 of (N, m + 1, C, T, H, W)."""
    positions = key_indices(len(sigmas) - 1, KEYS)[::-1]
    parts = []
    for start in range(0, len(rows), batch):
        velocity = pipeline.velocity(pipeline.condition([row.prompt for row in rows[start : start + batch]]))
        chunk = teacher[start : start + batch].to(pipeline.device)
        reached = [
            euler_flow(velocity, chunk[:, key + 1], sigmas[positions[key + 1] : positions[key] + 1]).cpu() for key in range(KEYS)
        ]
        parts.append(torch.stack(reached, 1))
    return torch.cat(parts)


def fidelity(model: Made, teacher: Made, forced: Tensor, rows: Sequence[Row]) -> dict[str, Any]:
    """Every measure with its 95 % interval over the rows, as nested dictionaries with `Estimate`s:

    right, right_ratio         share of clips that show all that was asked for and are clean (Wilson's interval); over the
                               teacher's on the same rows
    open_tv                    total variation between the model's and the teacher's open attributes
    trajectory_error           per key, RMS distance to the teacher's key over the distance the teacher went: teacher_forced since
                               its key before, self_rolled since the noise
    sliced_wasserstein, mmd    per key: model and floor; sliced_wasserstein also the ratio of the two
    amplitude                  root mean square of the clean latents, the model's over the teacher's
    temporal_energy, high_frequency_energy  mean of the model over mean of the teacher, in latents and in pixels
    diversity                  squared distance of two clips of a prompt, the model's over the teacher's
    """
    count = len(rows)

    def measured(statistic: Statistic) -> Estimate:
        return jackknife(statistic, count)

    found: dict[str, Any] = {}
    right, wanted = (torch.tensor(rights(made.reads, rows), dtype=torch.float64) for made in (model, teacher))
    shares = {"model": float(right.sum()), "teacher": float(wanted.sum())}
    found["right"] = {name: Estimate(hits / count, *wilson(hits, count)) for name, hits in shares.items()}
    found["right_ratio"] = measured(metrics.ratio(right, wanted)) if float(wanted.sum()) else None
    found["open_tv"] = {
        kind: measured(statistic) if (statistic := _open_tv(kind, model.reads, teacher.reads, rows)) else None for kind in CLASSES
    }
    own, theirs = model.first, teacher.first
    distance = metrics.squared_distance
    found["trajectory_error"] = {
        "teacher_forced": [
            measured(metrics.root_ratio(distance(forced[:, k], theirs[:, k]), distance(theirs[:, k + 1], theirs[:, k])))
            for k in range(KEYS)
        ],
        "self_rolled": [
            measured(metrics.root_ratio(distance(own[:, k], theirs[:, k]), distance(theirs[:, KEYS], theirs[:, k])))
            for k in range(KEYS)
        ],
    }
    far: dict[str, list[Estimate]] = {"model": [], "floor": [], "ratio": []}
    discrepancy: dict[str, list[Estimate]] = {"model": [], "floor": []}
    for key in range(KEYS):
        other, scale = teacher.second[:, key], metrics.median_distance(teacher.second[:, key])
        ours, floor = (metrics.sliced_wasserstein(made[:, key], other) for made in (own, theirs))
        far["model"].append(measured(ours))
        far["floor"].append(measured(floor))
        far["ratio"].append(measured(_quotient(ours, floor)))
        for name, made in (("model", own), ("floor", theirs)):
            discrepancy[name].append(measured(metrics.mmd(made[:, key], other, scale)))
    found["sliced_wasserstein"], found["mmd"] = far, discrepancy
    squares = [made[:, 0].flatten(1).square().mean(1) for made in (own, theirs)]
    found["amplitude"] = measured(metrics.root_ratio(*squares))
    for name, energy in (("temporal_energy", metrics.temporal_energy), ("high_frequency_energy", metrics.high_frequency_energy)):
        found[name] = {
            "latent": measured(metrics.ratio(energy(own[:, 0]), energy(theirs[:, 0]))),
            "pixels": measured(metrics.ratio(_in_pixels(energy, model.frames), _in_pixels(energy, teacher.frames))),
        }
    spread = [distance(made.first[:, 0], made.second[:, 0]) for made in (model, teacher)]
    found["diversity"] = measured(metrics.ratio(*spread))
    return found


def _quotient(upper: Statistic, lower: Statistic) -> Statistic:
    return lambda index: upper(index) / lower(index)


def _open_tv(kind: str, model: Reads, teacher: Reads, rows: Sequence[Row]) -> Statistic | None:
    """Total variation of an attribute's classes over the rows that leave it open; None if none does."""
    classes = CLASSES[kind]
    free = torch.tensor([kind not in row.named for row in rows])
    if not bool(free.any()):
        return None
    ours, theirs = (torch.tensor([classes.index(read[kind].name) for read in reads]) for reads in (model, teacher))

    def variation(index: Tensor) -> float:
        chosen = index[free[index]]
        counts = [torch.bincount(names[chosen], minlength=len(classes)) for names in (ours, theirs)]
        return float((counts[0] - counts[1]).abs().sum()) / 2 / max(1, len(chosen))

    return variation


def _in_pixels(energy: Callable[[Tensor], Tensor], frames: NDArray[np.uint8]) -> Tensor:
    """(N,) of clips as (N, 3, F, H, W) float in [0, 1], 100 at a time: as many as there are would take gigabytes."""
    parts = np.array_split(frames, math.ceil(len(frames) / 100))
    return torch.cat([energy(torch.from_numpy(part).permute(0, 4, 1, 2, 3).float() / 255) for part in parts])


def plain(value: Any) -> Any:
    """The same as JSON takes it; a bound that is not known is null."""
    if isinstance(value, Estimate):
        return {k: v if math.isfinite(v) else None for k, v in vars(value).items()}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value
