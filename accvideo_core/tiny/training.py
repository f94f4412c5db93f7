"""Training of the bundled models: one resumable loop for the VAE, the text encoder, the teacher and the student.

Every draw is keyed by (seed, part, step), so a run that was stopped and resumed sees what an unbroken one would. Started
through torchrun, each process computes its share of every batch's rows and gradients are averaged: the same training, faster.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
import tyro
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..devices import autocast_dtype, pick_device
from ..errors import CheckpointError, InvalidValueError
from ..files import atomic_path, check_writable
from .muon import Muon
from .share import Share

Part = Literal["vae", "base", "guided", "teacher", "student", "decoder"]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order they are made


@dataclass
class TrainArgs:
    """Train one of the bundled tiny models. Run it again with the same --run folder to go on where it stopped.

    To split every batch among processes: torchrun --standalone --nproc-per-node 2 -m -- accvideo_core tiny train ..."""

    part: tyro.conf.Positional[Part]
    """What to train, each from those before it: the VAE; base, by flow matching; guided, the base with its guidance distilled in;
    the teacher, which is that with what a prompt leaves open completed; the student; decoder, the VAE's trained on through
    both."""
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
    weaker: Path | None = None
    """Guided only: a copy of the --weights folder from earlier in the base's training, to guide away from."""
    trajectories: int = 1024
    """Teacher and student only: trajectories captured to learn from, of the guided base or the teacher."""
    dataset: Path | None = None
    """Student only: a SynVid dataset of this teacher's to learn from, instead of trajectories captured here."""
    early: int = 0
    """Student only: so many more trajectories, captured here, as far as the segments that need the most of them."""
    start: Path | None = None
    """Student only: the file of a student to begin with, instead of the teacher."""
    push: tuple[float | None, ...] = ()
    """Student only, with --start: for each segment from the noise on, how far to push that student's step on from the teacher's;
    0 holds it as it is, -1 makes it the teacher's, None learns it from trajectories, as all do by default."""
    teacher_steps: int = 1
    """Student only, with --push: the steps of the teacher's in a segment."""
    turns: tuple[int, ...] = ()
    """Student only: the segments that fill a batch in turn, 0 the one that begins with noise; default: all alike."""
    amplitude: float = 1.0
    """Student only: what to multiply the clean latents by that its last step is to lead to; 1 over the amplitude in the report
    of accvideo evaluate -o takes a student that exaggerates, or fades, to its teacher's."""
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
    matrices: list[nn.Parameter]  # those of its weights that Muon steps; AdamW does the rest
    made_from: dict[str, str]  # what the result depends on besides seed, batch and lr: sha256 of earlier parts' files, and such

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
    task = make_task(args, folder, device)
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
    optimizers = make_optimizers(parameters, task.matrices, lr, share)
    average = [p.detach().clone() for p in parameters]
    start = 0
    made_from = {"part": args.part, "seed": args.seed, "batch": batch, "lr": lr, **task.made_from}
    if state_path.exists():
        state = load_state(state_path, made_from, device)
        task.model.load_state_dict(state["model"])
        for optimizer, its in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        average, start = [a.to(device) for a in state["average"]], state["step"]
    task.prepare(share)

    def save(step: int) -> None:
        if share.rank:
            return
        state: dict[str, Any] = {"model": task.model.state_dict(), "average": average, "step": step, "made_from": made_from}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        with atomic_path(state_path) as temporary:
            torch.save(state, temporary)

    saved = time.monotonic()
    cast = autocast_dtype(device)
    quiet = share.rank > 0
    bar = tqdm(range(start, steps), args.part, steps, initial=start, mininterval=5, maxinterval=30, disable=quiet)
    smooth: float | None = None
    for step in bar:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * learning_rate_share(step, steps, d.warmup)
        with torch.autocast(device.type, cast, enabled=cast is not None):
            loss = task.loss(step, batch, rows)
        task.model.zero_grad()
        loss.backward()
        value = share.average(parameters, loss).item()
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
        if not (math.isfinite(value) and math.isfinite(norm)):  # before the step, so that no broken state is ever saved
            where = f"the {args.part} loss became {value}, its gradient {norm}, at step {step}"
            raise InvalidValueError(f"{where}; start again in another --run with a lower --lr than {lr}")
        for optimizer in optimizers:
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


def make_optimizers(parameters: list[nn.Parameter], matrices: list[nn.Parameter], lr: float, share: Share) -> list[Optimizer]:
    """AdamW, and Muon for `matrices` if there are any; one learning rate suits both."""
    chosen = {id(m) for m in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    return [adamw, Muon(matrices, lr=lr, weight_decay=0.01, share=share)] if matrices else [adamw]


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, the peak, and over the last fifth a line down to nothing: until there, runs of any length agree, so
    that a copy of the state can be finished early."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, 0.2 * steps))
