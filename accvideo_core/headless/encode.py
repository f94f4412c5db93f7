"""`accvideo encode`: a prompt file to a plan, every prompt encoded once, so that the teacher's machine needs no text encoder."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor
from tqdm import tqdm

from ..devices import pick_device
from ..errors import PromptError
from ..synvid.plan import Plan
from ..synvid.prompts import read_prompts
from ..synvid.wanted import lacking, put_into, wanted_samples
from ..tiny.pipeline import latent_shape
from .models import BUNDLED, SIZES, Precision, load_text, text_family


@dataclass(frozen=True)
class EncodeArgs:
    """Encode prompts into a plan for `accvideo capture`. Run it again to add prompts: what is in the plan already is kept."""

    prompts: tyro.conf.Positional[Path]
    """The prompts: a .txt with one a line, a .csv with a column `prompt`, or a .jsonl of objects with a `prompt`; the last two
    may also have an `id` and a `seed`."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The plan's folder."""
    text_encoder: str = BUNDLED
    """tiny for the bundled one, or the folder of HunyuanVideo's two (text_encoder, text_encoder_2) or of Wan's."""
    frames: int | None = None
    """Frames of the videos, 4n+1; default 93, for Wan 81, of the tiny world 17."""
    height: int | None = None
    """Their height in pixels, a multiple of 16; default 544, for Wan 480, of the tiny world 64."""
    width: int | None = None
    """Their width in pixels, a multiple of 16; default 960, for Wan 832, of the tiny world 64."""
    seeds: int = 1
    """Trajectories of each prompt, each from its own noise; a prompt that names its seed has that one alone."""
    seed: int = 0
    """Another number gives every prompt other noise."""
    negative: str | None = None
    """A negative prompt to keep in the plan, for a teacher with classifier-free guidance; '' is the empty one."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    dtype: Precision = "auto"
    """Precision of the released text encoders; auto is float16, for Wan bfloat16, on a CPU float32."""
    json: bool = False
    """Print what was done as JSON."""


def run(args: EncodeArgs) -> int:
    """Write the plan and print how many samples it has; 1 if a prompt could not be encoded, and the others are in it."""
    size = SIZES[text_family(args.text_encoder)]
    given = (args.frames, args.height, args.width)
    shape = latent_shape(*(own if own is not None else usual for own, usual in zip(given, size, strict=False)))
    prompts, plan = read_prompts(args.prompts), Plan(args.out, create=True)
    wanted, before = lacking(plan, wanted_samples(prompts, shape, args.seeds, args.seed), shape), len(plan.items)
    new_negative = args.negative is not None and args.negative not in plan.negatives
    encoder = load_text(args.text_encoder, pick_device(args.device), args.dtype) if wanted or new_negative else None
    if encoder is not None and args.negative is not None and new_negative:
        plan.add_negative(args.negative, *encoder.encode(args.negative))
    faults = []
    encoded: dict[str, tuple[Tensor, Tensor | None]] = {}
    for it in tqdm(wanted, desc="encoding", unit="sample", disable=args.json, leave=False):
        assert encoder is not None
        try:
            if it.prompt not in encoded:  # copies of a prompt follow one another
                encoded = {it.prompt: encoder.encode(it.prompt)}
        except PromptError as error:
            faults.append(str(error))
            continue
        put_into(plan, it, shape, *encoded[it.prompt])
    added = len(plan.items) - before
    restored = len(wanted) - len(faults) - added
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    if args.json:
        told = {"plan": str(args.out), "samples": len(plan.items), "added": added, "restored": restored, "left_out": faults}
        print(json_module.dumps(told))
    else:
        sizes = "x".join(map(str, shape))
        again = f", {restored} encoded again, whose encoding was lost" if restored else ""
        print(f"{args.out}: {len(plan.items)} samples, {added} of them new{again}, latents {sizes}, {len(faults)} left out")
    return 1 if faults else 0
