"""`accvideo evaluate`: generate a plan's clips, let the oracle say how many show what their prompts ask for, and measure how
close the model stays to its teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from ..checkpoint import load_student
from ..devices import pick_device
from ..dit.attention import AUTO, check
from ..dit.fp8 import Linears, set_linears
from ..errors import CheckpointError, InvalidValueError
from ..files import atomic_path, check_writable
from ..tiny import load_text_encoder, load_vae, part_hash
from ..tiny.clips import CLASSES
from ..tiny.pipeline import DTYPES, PRESET, TinyPipeline
from ..tiny.text import POOLED_DIM, TEXT_DIM
from ..tiny.vae import CHANNELS
from . import fidelity, plots, reports
from .exam import Row, read_plan, score_reads
from .exam import read_clips as read_clips
from .exam import score as score


@dataclass(frozen=True)
class EvaluateArgs:
    """Judge the bundled student (or teacher, or a file's network) on a plan of prompts and seeds."""

    plan: Path
    """JSON lines with "prompt", "seed" and, as {"colour": "red", ...}, the attributes "named" in the prompt."""
    teacher: bool = False
    """Judge the teacher (50 steps by default) instead of the student."""
    weights: Path | None = None
    """Judge the network in this file, a student that `accvideo distill` made of the bundled teacher, say."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also measure how close the model is to the teacher's own samples, and write report.json, report.md and report.png into
    this folder. That takes the teacher's 50 steps twice for every row."""
    teacher_clips: Path | None = None
    """With --out: the file to keep what the teacher makes of the plan in (0.45 MB a row), and to take it from where it is there,
    which saves most of the time when several models are compared on the same rows."""
    steps: int | None = None
    """Sampling steps; default 5 for the student, 50 for the teacher."""
    shift: float | None = None
    """Time shift of the schedule; default 7."""
    frames_out: Path | None = None
    """Also keep the clips: an .npz with `frames`, uint8 (N, 17, 64, 64, 3), row i answering row i of the plan."""
    limit: int | None = None
    """Only the first so many rows."""
    batch: int = 50
    """Clips generated at once."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network."""
    attention: str = AUTO
    """The attention kernel: auto, the fastest exact one here, or a name that `accvideo inspect` lists. The teacher that a model
    is compared to keeps the exact one."""
    linears: Linears = "exact"
    """Linear layers of the blocks: exact, or fp8, which is lossy, halves the weights' memory and, on GPUs with fp8, is faster."""
    json: bool = False
    """Print the result as JSON."""


def run(args: EvaluateArgs) -> int:
    """Print the score; exit code 0 whatever it is."""
    for name, value in (("batch", args.batch), ("limit", args.limit)):
        if value is not None and value < 1:
            raise InvalidValueError(f"{name} is {value}; it must be at least 1")
    if args.teacher_clips and args.out is None:
        raise InvalidValueError("teacher-clips are for the comparison to the teacher; give --out, too")
    rows = read_plan(args.plan)[: args.limit]
    check(args.attention, pick_device(args.device), DTYPES[args.dtype])
    pipeline = load(args)
    pipeline.network.attention_kernel = args.attention
    set_linears(pipeline.network, args.linears)
    steps = pipeline.default_steps if args.steps is None else args.steps
    named = args.weights.name if args.weights else f"tiny-{pipeline.which}"
    result: dict[str, Any] = {"model": named, "steps": steps, "dtype": args.dtype}
    if args.frames_out:
        check_writable(args.frames_out)
    if args.teacher_clips:
        check_writable(args.teacher_clips)
    if args.out is None:
        frames = generate(pipeline, rows, args)
        result |= score_reads(read_clips(frames), rows)
    else:
        _check_comparison(args, steps, rows)
        made, compared = compare(args, pipeline, rows, steps)
        frames = made.frames
        result |= score_reads(made.reads, rows) | {"to_teacher": fidelity.plain(compared)}
    result["attention"] = pipeline.network.attention_ran
    result["linears"] = args.linears
    if args.out is not None:
        reports.write(args.out, result, compared)
    print(json.dumps(result, indent=1) if args.json else as_table(result))
    if args.out is not None and not args.json:
        print(f"{reports.as_markdown(result, compared)}\n{args.out / reports.PICTURE}")
    if args.frames_out:  # last: a disk that they fill takes the result from nobody
        with atomic_path(args.frames_out) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, frames=frames)
    return 0


def load(args: EvaluateArgs) -> TinyPipeline:
    """The model to judge. CheckpointError for a file whose network does not fit the bundled text encoder and VAE."""
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    if args.weights is None:
        return TinyPipeline.load("teacher" if args.teacher else "student", device, dtype)
    if args.teacher:
        raise InvalidValueError("--teacher and --weights name two models; give one of them")
    network = load_student(args.weights, device, dtype).eval().requires_grad_(False)
    sizes = network.config.in_channels, network.config.text_dim, network.config.pooled_dim
    if sizes != (CHANNELS, TEXT_DIM, POOLED_DIM):
        raise CheckpointError(
            f"the network in {str(args.weights)!r} takes {sizes[0]} latent channels, text {sizes[1]} wide and pooled {sizes[2]}, "
            f"but the tiny world has {CHANNELS}, {TEXT_DIM} and {POOLED_DIM}; give a student of the bundled teacher"
        )
    return TinyPipeline(network, load_text_encoder().to(device), load_vae().to(device), "student")


def generate(pipeline: TinyPipeline, rows: Sequence[Row], args: EvaluateArgs) -> NDArray[np.uint8]:
    """(N, 17, 64, 64, 3): the plan's clips."""
    parts = []
    for start in tqdm(range(0, len(rows), args.batch), desc="clips", unit="batch", disable=args.json, leave=False):
        chunk = rows[start : start + args.batch]
        made = pipeline.generate([r.prompt for r in chunk], [r.seed for r in chunk], args.steps, args.shift)
        parts.append(made.frames)
    return np.concatenate(parts)


def compare(args: EvaluateArgs, pipeline: TinyPipeline, rows: Sequence[Row], steps: int) -> tuple[fidelity.Made, dict[str, Any]]:
    """(what the model makes of the plan, how close that is to what the teacher makes of it)."""

    def work() -> fidelity.Made:
        master = TinyPipeline.load("teacher", pipeline.device, torch.float32)
        return fidelity.make(master, rows, PRESET.sigmas(PRESET.teacher_steps), args.batch, args.json)

    recipe = {part: part_hash(part) for part in ("teacher", "text_encoder", "vae")}
    recipe |= {"plan": fidelity.plan_hash(rows), "steps": str(PRESET.teacher_steps)}
    wanted = work() if args.teacher_clips is None else fidelity.kept(args.teacher_clips, recipe, work)
    sigmas = PRESET.sigmas(steps)
    made = fidelity.make(pipeline, rows, sigmas, args.batch, args.json)
    reached = fidelity.forced(pipeline, rows, wanted.first, sigmas, args.batch)
    return made, fidelity.fidelity(made, wanted, reached, rows)


def _check_comparison(args: EvaluateArgs, steps: int, rows: Sequence[Row]) -> None:
    """All that can be known before the work."""
    assert args.out is not None
    fidelity.check_steps(steps)
    if args.shift is not None:
        raise InvalidValueError(f"shift is {args.shift}; the comparison to the teacher needs its own, so leave out --shift")
    if len(rows) < 2:
        raise InvalidValueError("the comparison to the teacher needs at least 2 rows, better 200")
    plots.new_figure(1, 1)
    for name in reports.FILES:
        check_writable(args.out / name)


def as_table(result: dict[str, Any]) -> str:
    """The score for people."""

    def share(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:5.1f}%"

    low, high = result["right_95"]
    lines = [
        f"{result['model']}, {result['steps']} steps, {result['dtype']}, {result['clips']} clips",
        f"right {share(result['right'])} (95 %: {share(low)} to {share(high)}), valid {share(result['valid'])}",
        f"{'attribute':<12}{'named right':>12}{'clean':>8}{'open: TV to uniform':>22}",
    ]
    for kind in CLASSES:
        row = result[kind]
        free = "-" if row["open_tv_to_uniform"] is None else f"{row['open_tv_to_uniform']:.3f}"
        lines.append(f"{kind:<12}{share(row['named_right']):>12}{share(row['clean']):>8}{free:>22}")
    return "\n".join(lines)
