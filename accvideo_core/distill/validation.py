"""How far the student is on trajectories it was not trained on, and contact sheets of what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..media import Pixels, contact_sheet, stack, write_png
from ..synvid import Batch
from ..synvid.sheet import Decode, project
from .losses import euler_step, trajectory_loss

Predict = Callable[[Tensor, Tensor, Any], Tensor]
"""(latent (B, C, T, H, W), sigma (B,), conditioning) -> velocity."""


@torch.no_grad()
def validate(
    predict: Predict, condition: Callable[[Batch], Any], held_out: Callable[[int], Batch], sigmas: Tensor, rows: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(figures, student's clean latents, teacher's), both latents (B, C, T, H, W), of the held-out samples; `rows` at a time.

    held_out   the same samples for each key k, from the teacher's key k+1 to its key k
    sigmas     of the keys, the clean one first; all on one device
    validation/trajectory/key_k  Eq. 6 from the teacher's key k+1 to its key k
    validation/rolled/key_k      distance of the student's key k to the teacher's, where the student begins with the teacher's
                                 noise and takes all steps itself, relative to the teacher's norm; mean over samples
    validation/amplitude         root mean square of the student's clean latents, so made, over the teacher's
    """
    segments = len(sigmas) - 1
    figures: dict[str, Tensor] = {}
    latent = clean = torch.empty(0)
    for key in reversed(range(segments)):
        batch = held_out(key)
        told = condition(batch)
        latent = batch.noisy if key == segments - 1 else latent
        forced, rolled, steps = [], [], []
        for at in parts(len(batch.ids), rows):
            noisy, clean, own, text = batch.noisy[at], batch.clean[at], latent[at], told.rows(at)
            high, low = sigmas[key + 1].expand(len(noisy)), sigmas[key].expand(len(noisy))
            forced += [trajectory_loss(predict(noisy, high, text), noisy, clean, high, low)] * len(noisy)
            own = euler_step(own, predict(own, high, text), high, low)
            rolled.append((own - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1))
            steps.append(own)
        latent, clean = torch.cat(steps), batch.clean
        figures[f"validation/trajectory/key_{key}"] = torch.stack(forced).mean()
        figures[f"validation/rolled/key_{key}"] = torch.cat(rolled).mean()
    figures["validation/amplitude"] = (latent.float().square().mean() / clean.float().square().mean()).sqrt()
    return figures, latent, clean


def parts(count: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover `count`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def write_sheet(
    path: Path, student: Tensor, teacher: Tensor, labels: list[str], decode: Decode | None, most: int = 6, still: int = 96
) -> Pixels:
    """A PNG with the first `most` samples, the student's clip below the teacher's from the same noise; latents (B, C, T, H, W).
    Without a decoder the latents' main directions are shown as colours. Returns the image (H, W, 3)."""
    sheets = []
    for own, model, label in list(zip(student.cpu(), teacher.cpu(), labels, strict=True))[:most]:
        show = decode or project(model)
        clips = [("teacher", show(model)), ("student", show(own))]
        sheets.append(contact_sheet(clips, factor=max(1, still // clips[0][1].shape[2]), title=label))
    image = stack(sheets)
    write_png(path, image)
    return image


def labels_of(ids: tuple[str, ...], prompts: Mapping[str, str]) -> list[str]:
    """What a sample is called on a sheet: its prompt where it is known."""
    return [prompts.get(name, name) for name in ids]
