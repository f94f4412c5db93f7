"""Training of the bundled models: one resumable loop for the VAE, the teacher (with the text encoder) and the student.

Every draw is keyed by (seed, part, step), so a run that was stopped and resumed sees what an unbroken one would. Started
through torchrun, each process computes its share of every batch's rows and gradients are averaged: the same training, faster.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from ..devices import autocast_dtype, pick_device
from ..errors import CheckpointError, InvalidValueError
from ..files import atomic_path, check_writable

Part = Literal["vae", "teacher", "student"]


@dataclass
class TrainArgs:
    """Train one of the bundled tiny models. Run it again with the same --run folder to go on where it stopped.

    To split every batch among processes: torchrun --standalone --nproc-per-node 2 -m -- accvideo_core tiny train ..."""

    part: tyro.conf.Positional[Part]
    """What to train; the teacher needs a VAE, the student needs a teacher."""
    steps: int | None = None
    """Optimizer steps in all; default: the part's own. The model card names what made the bundled weights."""
    batch: int | None = None
    """Clips a step; default: the part's own."""
    lr: float | None = None
    """Peak learning rate; default: the part's own."""
    seed: int = 0
    """Everything random follows from it."""
    run: Path = Path("runs/tiny")
    """Folder for the resumable state, trajectories and contact sheets; a sub-folder per part."""
    weights: Path | None = None
    """Folder the finished weights go to and earlier parts' weights are read from; default: `weights` in the --run folder.
    To use them, set ACCVIDEO_TINY_WEIGHTS to it."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    trajectories: int = 512
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


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does, of those that torchrun started; alone it does all of it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, device: torch.device) -> Share:
        """Joins the other processes of torchrun, if there are any."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch."""
        if batch % self.size:
            raise InvalidValueError(f"a batch of {batch} does not divide among {self.size} processes; choose a multiple of it")
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    @torch.no_grad()
    def average(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its mean over the processes; gives back the mean loss."""
        loss = loss.detach().float().clone()
        if self.size == 1:
            return loss
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.view(1)])
        dist.all_reduce(flat)
        flat /= self.size
        for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters] + [1]), strict=False):
            parameter.grad = mean.view_as(parameter)
        return flat[-1]


class Task(Protocol):
    """What differs between the parts."""

    defaults: Defaults
    model: nn.Module  # everything that is trained
    made_from: dict[str, str]  # what the result depends on besides the arguments: sha256 of earlier parts' files

    def prepare(self, share: Share) -> None: ...  # data that is made once and may take long

    def loss(self, step: int, batch: int, rows: slice) -> Tensor: ...  # the mean over these rows of the step's batch

    def export(self, folder: Path, steps: int) -> list[Path]: ...  # write the weights `model` now holds

    def sheet(self, path: Path) -> None: ...  # a contact sheet of what `model` does now


def run(args: TrainArgs) -> int:
    """`accvideo tiny train`: exit code 0 when the weights are written."""
    from .tasks import make_task

    folder = args.weights or args.run / "weights"
    device = pick_device(args.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    task = make_task(args.part, args.seed, folder, args.run / args.part, device, args.trajectories)
    for path in fit(task, args, folder, device):
        print(path)
    return 0


def fit(task: Task, args: TrainArgs, weights: Path, device: torch.device) -> list[Path]:
    """Train until `steps`, save the state on the way, and write the averaged weights and a contact sheet at the end."""
    d = task.defaults
    steps = d.steps if args.steps is None else args.steps
    batch = d.batch if args.batch is None else args.batch
    lr = d.lr if args.lr is None else args.lr
    if steps < 1 or batch < 1 or not 0 < lr < math.inf:
        raise InvalidValueError(f"steps is {steps}, batch {batch} and lr {lr}; steps and batch must be at least 1, lr above 0")
    share = Share.from_environment(device)
    rows = share.rows(batch)
    state_path = args.run / args.part / "state.pt"
    check_writable(state_path)
    check_writable(weights / "probe")
    torch.manual_seed(args.seed)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    start = 0
    made_from = {"part": args.part, "seed": args.seed, "batch": batch, "lr": lr, **task.made_from}
    if state_path.exists():
        state = load_state(state_path, made_from, device)
        task.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = [a.to(device) for a in state["average"]], state["step"]
    task.prepare(share)

    def save(step: int) -> None:
        if share.rank:
            return
        state: dict[str, Any] = {"model": task.model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        state |= {"step": step, "made_from": made_from}
        with atomic_path(state_path) as temporary:
            torch.save(state, temporary)

    saved = time.monotonic()
    cast = autocast_dtype(device)
    quiet = share.rank > 0
    bar = tqdm(range(start, steps), args.part, steps, initial=start, mininterval=5, maxinterval=30, disable=quiet)
    smooth: float | None = None
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_share(step, steps, d.warmup)
        with torch.autocast(device.type, cast, enabled=cast is not None):
            loss = task.loss(step, batch, rows)
        optimizer.zero_grad()
        loss.backward()
        value = share.average(parameters, loss).item()
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
        if not (math.isfinite(value) and math.isfinite(norm)):  # before the step, so that no broken state is ever saved
            where = f"the {args.part} loss became {value}, its gradient {norm}, at step {step}"
            raise InvalidValueError(f"{where}; start again in another --run with a lower --lr than {lr}")
        optimizer.step()
        with torch.no_grad():
            decay = min(d.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.monotonic() - saved > args.save_every:
            save(step + 1)
            saved = time.monotonic()
    save(max(start, steps))
    paths: list[Path] = []
    if share.rank == 0:
        with torch.no_grad():
            for parameter, mean in zip(parameters, average, strict=True):
                parameter.copy_(mean)
        paths = task.export(weights, max(start, steps))
        task.sheet(args.run / args.part / "sheet.png")
    share.wait()  # nobody goes on, to train the next part say, before the weights are there
    return paths


def load_state(path: Path, made_from: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The state of an earlier run; InvalidValueError if it was made from something else, CheckpointError if damaged."""
    cure = "choose another --run, or delete the file to start afresh"
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        earlier = state["made_from"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or of another version ({type(error).__name__}); {cure}") from error
    check_made_from(path, earlier, made_from, cure)
    return state


def check_made_from(path: Path, earlier: dict[str, Any], now: dict[str, Any], cure: str) -> None:
    """InvalidValueError naming every field that differs: going on would mix two runs without a word."""
    if changed := [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]:
        fields = ", ".join(f"{name} {earlier.get(name)}, now {now.get(name)}" for name in changed)
        raise InvalidValueError(f"{str(path)!r} was made from something else ({fields}); {cure}")


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a half cosine down to 1 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
