"""What each part of the tiny world learns."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ...errors import InvalidValueError
from ..training import Task, TrainArgs
from .common import KEYS
from .flow import BaseTask, GuidedTask, TeacherTask
from .student import StudentTask
from .vae import DecoderTask, VAETask


def make_task(args: TrainArgs, weights: Path, device: torch.device) -> Task:
    """The task of args.part, reading what earlier parts wrote to `weights`.

    InvalidValueError if there are to be no trajectories, or fewer than none.
    """
    if args.trajectories < 1:
        raise InvalidValueError(f"trajectories is {args.trajectories}; it must be at least 1")
    if args.early < 0:
        raise InvalidValueError(f"early is {args.early}; it must be at least 0")
    if args.push and (args.start is None or len(args.push) != KEYS or not all(p is None or math.isfinite(p) for p in args.push)):
        raise InvalidValueError(
            f"push is {args.push}; it has a number or None for each of the {KEYS} segments, and takes a student to push on: give "
            "--start, too"
        )
    if args.teacher_steps < 1:
        raise InvalidValueError(f"teacher steps is {args.teacher_steps}; it must be at least 1")
    if args.teacher_steps > 1 and not args.push:
        raise InvalidValueError(f"teacher steps is {args.teacher_steps}, but no segment is pushed; give --push, or leave it out")
    if not all(0 <= turn < KEYS for turn in args.turns):
        raise InvalidValueError(f"turns is {args.turns}; the segments are 0 to {KEYS - 1}, 0 the one that begins with noise")
    if not 0 < args.amplitude < math.inf:
        raise InvalidValueError(f"amplitude is {args.amplitude}; it must be above 0, and 1 leaves the clean latents as they are")
    if args.amplitude != 1 and KEYS - 1 not in (args.turns or range(KEYS)):
        raise InvalidValueError(
            f"amplitude is {args.amplitude}, but turns is {args.turns}, without the last segment, {KEYS - 1}, its own; add it"
        )
    if args.push and (args.dataset or args.early) and all(args.push[k] is not None for k in args.turns or range(KEYS)):
        raise InvalidValueError(
            f"push is {args.push}, so that every segment trained on is the student's own; leave out --dataset and --early, or "
            "say None for a segment that trajectories are to teach"
        )
    part, seed, run = args.part, args.seed, args.run / args.part
    if part == "vae":
        return VAETask(seed, device)
    if part == "base":
        return BaseTask(seed, device, weights)
    if part == "decoder":
        return DecoderTask(seed, device, weights)
    if part == "guided":
        return GuidedTask(seed, device, weights, args.weaker)
    if part == "teacher":
        return TeacherTask(seed, device, weights, run, args.trajectories)
    given = (args.trajectories, args.dataset, args.early, args.start, args.push, args.teacher_steps, args.turns, args.amplitude)
    return StudentTask(seed, device, weights, run, *given)
