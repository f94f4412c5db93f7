"""Training of the bundled models: one resumable loop for the VAE, the teacher (with the text encoder) and the student.

Every draw is keyed by (seed, part, step), so a run that was stopped and resumed sees what an unbroken one would.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InvalidValueError
from ..files import atomic_path, check_writable

Part = Literal["vae", "teacher", "student"]


@dataclass
class TrainArgs:
    """Train one of the bundled tiny models. Run it again with the same --run folder to go on where it stopped."""

    part: tyro.conf.Positional[Part]
    """What to train; the teacher needs a VAE, the student needs a teacher."""
    steps: int = 0
    """Optimizer steps in all; 0 takes the part's default (about 25 minutes on 2 laptop cores)."""
    batch: int = 0
    """Clips a step; 0 takes the part's default."""
    lr: float = 0.0
    """Peak learning rate; 0 takes the part's default."""
    seed: int = 0
    """Everything random follows from it."""
    run: Path = Path("runs/tiny")
    """Folder for the resumable state, trajectories and contact sheets; a sub-folder per part."""
    weights: Path | None = None
    """Folder the finished weights go to and earlier parts' weights are read from; default: the bundled one."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    trajectories: int = 1024
    """Student only: trajectories captured from the teacher to learn from."""
    save_every: float = 120.0
    """Seconds between saves of the resumable state."""


@dataclass(frozen=True)
class Defaults:
    steps: int
    batch: int
    lr: float
    warmup: int
    ema: float


class Task(Protocol):
    """What differs between the parts."""

    defaults: Defaults
    model: nn.Module  # everything that is trained

    def prepare(self) -> None: ...  # data that is made once and may take long

    def loss(self, step: int, batch: int) -> Tensor: ...

    def export(self, folder: Path, steps: int) -> list[Path]: ...  # write the weights `model` now holds

    def sheet(self, path: Path) -> None: ...  # a contact sheet of what `model` does now


def run(args: TrainArgs) -> int:
    """`accvideo tiny train`: exit code 0 when the weights are written."""
    from . import weights_folder
    from .tasks import make_task

    folder = args.weights or weights_folder()
    device = pick_device(args.device)
    task = make_task(args.part, args.seed, folder, args.run / args.part, device, args.trajectories)
    for path in fit(task, args, folder, device):
        print(path)
    return 0


def fit(task: Task, args: TrainArgs, weights: Path, device: torch.device) -> list[Path]:
    """Train until `steps`, save the state on the way, and write the averaged weights and a contact sheet at the end."""
    d = task.defaults
    steps, batch, lr = args.steps or d.steps, args.batch or d.batch, args.lr or d.lr
    if steps < 1 or batch < 1 or not lr > 0:
        raise InvalidValueError(f"steps {steps} and batch {batch} must be at least 1, lr {lr} above 0")
    state_path = args.run / args.part / "state.pt"
    check_writable(state_path)
    check_writable(weights / "probe")
    torch.manual_seed(args.seed)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    start = 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        task.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = [a.to(device) for a in state["average"]], state["step"]
    task.prepare()

    def save(step: int) -> None:
        state = {"model": task.model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
        with atomic_path(state_path) as temporary:
            torch.save(state, temporary)

    saved = time.monotonic()
    cast = autocast_dtype(device)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=args.part, mininterval=5, maxinterval=30)
    smooth: float | None = None
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_share(step, steps, d.warmup)
        with torch.autocast(device.type, cast, enabled=cast is not None):
            loss = task.loss(step, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(d.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        value = loss.item()
        if not math.isfinite(value):
            raise InvalidValueError(
                f"the {args.part} loss became {value} at step {step}; start again with a lower --lr than {lr}"
            )
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.monotonic() - saved > args.save_every:
            save(step + 1)
            saved = time.monotonic()
    save(max(start, steps))
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    paths = task.export(weights, max(start, steps))
    task.sheet(args.run / args.part / "sheet.png")
    return paths


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a half cosine down to 1 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); use cpu or auto") from error


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies it faster than float32 (CUDA, CPUs with AMX), else None."""
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else None
