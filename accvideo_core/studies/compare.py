"""`accvideo compare`: the teacher in 50 steps, the teacher in 5 and the student in 5, side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from ..devices import pick_device
from ..errors import InvalidValueError, PromptError
from ..files import check_writable
from ..media import contact_sheet, side_by_side, stack, write_mp4, write_png
from ..schedule import PRESETS
from ..tiny import Which
from ..tiny.clips import FPS
from ..tiny.pipeline import TinyPipeline

PRESET = PRESETS["tiny"]
COLUMNS: tuple[tuple[Which, int], ...] = (
    ("teacher", PRESET.teacher_steps),
    ("teacher", PRESET.steps),
    ("student", PRESET.steps),
)


@dataclass(frozen=True)
class CompareArgs:
    """Show teacher (50 steps), teacher (5 steps) and student (5 steps) on the same prompts and the same noise."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """One or more prompts."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out/compare")
    """Folder for comparison.mp4 and comparison.png."""
    seed: int = 0
    """Seed of the first prompt's noise; each further prompt takes the next."""
    upscale: int = 3
    """Whole enlargement of the clips."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    json: bool = False
    """Print the measurements as JSON."""


def run(args: CompareArgs) -> int:
    """Write the video and the contact sheet, print where they are and the measured speed-up of sampling."""
    if not args.prompts or not all(p.strip() for p in args.prompts):
        raise PromptError("a prompt is empty; give one or more, e.g. accvideo compare 'a red ball' 'a shape rising'")
    if args.upscale < 1:
        raise InvalidValueError(f"upscale is {args.upscale}; it must be a whole number of at least 1")
    video, sheet = args.out / "comparison.mp4", args.out / "comparison.png"
    for path in (video, sheet):
        check_writable(path)
    device = pick_device(args.device)
    pipelines = {which: TinyPipeline.load(which, device) for which in ("teacher", "student")}
    pipelines["student"].condition(args.prompts)  # a prompt that says nothing to the tiny world is told before the work
    for pipeline in pipelines.values():  # the first call pays for start-up; it is not what is compared
        pipeline.generate(args.prompts[:1], [args.seed], steps=1)

    clips: list[list[NDArray[np.uint8]]] = []
    seconds = np.zeros((len(args.prompts), len(COLUMNS)))
    jobs = [(row, column) for row in range(len(args.prompts)) for column in range(len(COLUMNS))]
    for row, column in tqdm(jobs, desc="videos", disable=args.json, leave=False):
        which, steps = COLUMNS[column]
        made = pipelines[which].generate([args.prompts[row]], [args.seed + row], steps)
        seconds[row, column] = made.seconds["sampling"]
        if column == 0:
            clips.append([])
        clips[row].append(made.frames[0])

    blocks, sheets = [], []
    for prompt, row_clips, row_seconds in zip(args.prompts, clips, seconds, strict=True):
        labels = [f"{which}, {steps} steps, {s:.2f} s" for (which, steps), s in zip(COLUMNS, row_seconds, strict=True)]
        blocks.append(side_by_side(row_clips, labels, args.upscale, title=f"“{prompt}”"))
        sheets.append(contact_sheet(list(zip(labels, row_clips, strict=True)), factor=args.upscale, title=f"“{prompt}”"))
    write_mp4(video, stack(blocks), FPS)
    write_png(sheet, stack(sheets))

    totals = dict(zip((f"{which}_{steps}" for which, steps in COLUMNS), seconds.sum(0).tolist(), strict=True))
    speedup = seconds[:, 0].sum() / seconds[:, -1].sum()
    if args.json:
        print(json.dumps({"video": str(video), "sheet": str(sheet), "sampling_seconds": totals, "speedup": speedup}))
    else:
        print(f"{video}\n{sheet}")
        print(
            f"sampling {len(args.prompts)} prompts: teacher {PRESET.teacher_steps} steps {seconds[:, 0].sum():.2f} s, "
            f"student {PRESET.steps} steps {seconds[:, -1].sum():.2f} s: {speedup:.1f} times faster"
        )
    return 0
