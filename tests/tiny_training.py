"""Trainings of the tiny models small enough for a test, in this process or, run as a script, under torchrun."""

import contextlib
import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch

from accvideo_core.tiny import tasks, training
from accvideo_core.tiny.tasks import flow, student, trajectories


def train(part, folder, steps, stop_at=None, **kw):
    kw = {"batch": 2, "run": folder / "run", "weights": folder, "device": "cpu"} | kw
    args = training.TrainArgs(part, steps=steps, **kw)
    device = torch.device("cpu")
    task = tasks.make_task(args, args.weights, device)
    if part in ("vae", "decoder"):
        task.statistics = 32
    if part in ("base", "guided"):
        task.pool.size, task.pool.reuse = 4, 1  # a new pool every other step
    if part in ("teacher", "student"):
        task.capture = dataclasses.replace(task.capture, chunk=2)
    if stop_at is not None:
        real = task.loss

        def loss(step, *rest):
            if step == stop_at:
                raise KeyboardInterrupt
            return real(step, *rest)

        task.loss = loss
    return training.fit(task, args, args.weights, device)


@contextlib.contextmanager
def in_small(precision=None):
    """The teacher samples in 5 steps instead of 50, the shape filters are of 16 scenes instead of 256, and all is computed in
    float32, or `precision`, whatever the machine is fast at."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (flow, student, trajectories):
            patch.setattr(module, "TEACHER_STEPS", 5)
        for module in (training, trajectories):
            patch.setattr(module, "autocast_dtype", lambda device: precision)
        patch.setattr(flow, "shape_filters", functools.partial(flow.shape_filters, size=16))
        yield


def train_all(folder):
    """Each part in turn, two steps."""
    with in_small():
        for part in training.PARTS:
            train(part, folder, 2, trajectories=4)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_all(Path(sys.argv[1]))
