"""`accvideo capture`: the trajectories of a plan, into a dataset; alone, or as one of many processes that torchrun starts.

Started again with any number of processes it captures what is missing, and nothing twice.
"""

from __future__ import annotations

import json as json_module
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from ..devices import pick_device
from ..distill.adapters import adapter_for
from ..dit.attention import AUTO, KERNELS, check
from ..errors import InvalidValueError
from ..lora.streaming import sha256_of
from ..schedule import get_preset
from ..synvid import Header, SynVidStore
from ..synvid.capture import capture, leave_together, my_share, restore_texts
from ..synvid.plan import Plan
from ..synvid.reader import HEADER
from .models import BUNDLED, Precision, find_network, load_network


@dataclass(frozen=True)
class CaptureArgs:
    """Capture a teacher's denoising trajectories. On several GPUs: torchrun --nproc-per-node 8 -m -- accvideo_core capture ..."""

    plan: Path
    """The plan's folder (accvideo encode)."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The dataset's folder. If it is one already, what it lacks of the plan is captured into it."""
    teacher: str = BUNDLED
    """The teacher's weights in any layout `accvideo inspect` reads, or tiny for the bundled teacher."""
    batch: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 1
    """Trajectories at a time, a file for each batch."""
    steps: int | None = None
    """Steps of the schedule; default 50."""
    keys: int | None = None
    """Segments that the key latents divide it into; default 5. It must divide the steps."""
    full: bool = False
    """Keep the latent after every step, not the key latents alone."""
    shift: float | None = None
    """Time shift of the schedule; default 7, for Wan 5."""
    guidance: float | None = None
    """Embedded guidance; default 6, for Wan, which embeds none, none."""
    cfg: float | None = None
    """Classifier-free guidance, which doubles the time; 1 is off. Default 1, for Wan 5."""
    negative: str | None = None
    """The negative prompt for cfg, encoded in the plan (accvideo encode --negative); by default the one the plan has."""
    store_noise: bool = False
    """Keep the noise in the files, instead of making it again from its seed."""
    latents: Literal["float16", "float32"] = "float16"
    """What latents are stored as."""
    dtype: Precision = "auto"
    """Precision of the network; auto is bfloat16, on a CPU float32."""
    attention: str = AUTO
    """The attention kernel: auto, the fastest exact one here, or an exact one that `accvideo inspect` lists."""
    device: str = "auto"
    """cpu, cuda, mps, or auto; under torchrun each process takes its own GPU."""
    json: bool = False
    """Print what was done as JSON."""


def run(args: CaptureArgs) -> int:
    """Capture this process's share and print how many trajectories that were; 1 if some had to be left out."""
    if args.full and args.keys is not None:
        raise InvalidValueError("--full keeps the latent after every step; leave out --keys")
    plan, device = Plan(args.plan), _device(args.device)
    check(args.attention, device)
    if args.attention != AUTO and (kernel := KERNELS[args.attention]).lossy:
        raise InvalidValueError(
            f"attention kernel {kernel.name} is {kernel.quality}, and a student would learn that too; choose auto, which is exact"
        )
    file, family = find_network(args.teacher, "teacher")
    adapter, preset = adapter_for(family), get_preset(family)
    cfg = preset.teacher_cfg if args.cfg is None else args.cfg
    negative = _negative(plan, cfg, args.negative)
    network = load_network(adapter, file, device, args.dtype, args.attention)
    steps = preset.teacher_steps if args.steps is None else args.steps
    new = not (args.out / HEADER).exists()
    header = Header.of(
        family,
        adapter.fingerprint(network),
        steps,
        steps if args.full else (preset.keys or 5) if args.keys is None else args.keys,
        preset.shift if args.shift is None else args.shift,
        adapter.guidance(network, args.guidance),
        cfg=cfg,
        negative=negative,
        negative_text=None if negative is None else plan.negatives[negative],
        dtype=args.latents,
        store_noise=args.store_noise,
        teacher=file.name,
        file_sha256=sha256_of([file]) if new and file.is_file() else None,
    )
    encoded = None if negative is None else plan.text(plan.negatives[negative])
    store = SynVidStore(args.out, header)
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 and (restored := restore_texts(plan, store)):
        print(f"{restored} encodings that {args.out} had lost are there again", file=sys.stderr)
    items, captured = my_share(plan, store), 0
    for text in [plan.text(items[0].text), encoded] if items else []:
        if text is not None:
            adapter.check_text(network, *text)
    run_network = partial(adapter.velocity, network)
    quiet = args.json or rank > 0
    with tqdm(total=len(items), desc="capturing", unit="trajectory", smoothing=0, disable=quiet, leave=False) as bar:

        def progress(count: int) -> None:
            nonlocal captured
            captured += count
            bar.update(count)

        faults = capture(run_network, plan, items, store, args.batch, device, progress, adapter.conditioning, encoded)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    elsewhere = len(items) - len(faults) - captured
    if args.json:
        told = {"dataset": str(args.out), "rank": rank, "captured": captured, "elsewhere": elsewhere, "left_out": faults}
        print(json_module.dumps(told))
    else:
        others = f", {elsewhere} by others meanwhile" if elsewhere else ""
        print(f"{args.out}: {captured} trajectories captured by process {rank}{others}, {len(faults)} left out")
    leave_together()
    return 1 if faults else 0


def _negative(plan: Plan, cfg: float, asked: str | None) -> str | None:
    """The negative prompt for this cfg, one of the plan's; None without cfg."""
    if cfg == 1:
        if asked is not None:
            raise InvalidValueError("--negative is given, but cfg is 1, which uses none; leave it out, or set --cfg")
        return None
    found = list(plan.negatives) if asked is None else [prompt for prompt in plan.negatives if prompt == asked]
    if len(found) != 1:
        which = "" if asked is None else f", {len(found)} of them {asked[:40]!r}"
        raise InvalidValueError(
            f"cfg is {cfg:g} and needs a negative prompt, but the plan has {len(plan.negatives)}{which}; "
            "encode one (accvideo encode PROMPTS -o PLAN --negative TEXT), or choose one by --negative, or set --cfg 1"
        )
    return found[0]


def _device(name: str) -> torch.device:
    """Under torchrun every process of a machine has a GPU of its own."""
    device, local = pick_device(name), os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or local is None or name[-1].isdigit():
        return device
    device = pick_device(f"cuda:{local}")
    torch.cuda.set_device(device)
    return device
