"""What each part of the tiny world learns."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import InvalidValueError
from ..training import Part, Task
from .flow import BaseTask, GuidedTask, TeacherTask
from .student import StudentTask
from .vae import DecoderTask, VAETask


def make_task(
    part: Part, seed: int, weights: Path, run: Path, device: torch.device, trajectories: int, weaker: Path | None = None
) -> Task:
    """The task of that name, reading what earlier parts wrote to `weights`.

    InvalidValueError if there are to be no trajectories.
    """
    if trajectories < 1:
        raise InvalidValueError(f"trajectories is {trajectories}; it must be at least 1")
    if part == "vae":
        return VAETask(seed, device)
    if part == "base":
        return BaseTask(seed, device, weights)
    if part == "decoder":
        return DecoderTask(seed, device, weights)
    if part == "guided":
        return GuidedTask(seed, device, weights, weaker)
    if part == "teacher":
        return TeacherTask(seed, device, weights, run, trajectories)
    return StudentTask(seed, device, weights, run, trajectories)
