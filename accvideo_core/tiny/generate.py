"""`accvideo generate`: a prompt to an MP4 with the bundled models."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from .. import __version__
from ..devices import pick_device
from ..errors import InvalidValueError, PromptError
from ..files import check_writable
from ..media import upscale, write_mp4
from ..sampling import Step
from .clips import FPS, FRAMES, SIZE
from .pipeline import DTYPES, TinyPipeline


@dataclass(frozen=True)
class GenerateArgs:
    """Make a video of the tiny world from a prompt, e.g. "a red ball moving left on a black background"."""

    prompt: tyro.conf.Positional[str]
    """What to show. Attributes the prompt does not name (colour, shape, motion, background) are left open."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out.mp4")
    """The MP4 to write."""
    teacher: bool = False
    """Use the teacher (50 steps by default) instead of the 5-step student."""
    steps: int | None = None
    """Sampling steps; default 5 for the student, 50 for the teacher."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same video."""
    shift: float | None = None
    """Time shift of the schedule; default 7."""
    frames: int = FRAMES
    """Frames, 4n+1. The bundled models were trained on 17."""
    height: int = SIZE
    """Height in pixels, a multiple of 16. The bundled models were trained on 64."""
    width: int = SIZE
    """Width in pixels, a multiple of 16."""
    upscale: int = 1
    """Enlarge each pixel to a square of so many pixels a side."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network."""
    json: bool = False
    """Print what was made as JSON."""


def run(args: GenerateArgs) -> int:
    """Write the video and print where it is and how long each part took."""
    if not args.prompt.strip():
        raise PromptError("the prompt is empty; say what to show, e.g. 'a red ball', or 'a shape' to leave everything open")
    if args.upscale < 1:
        raise InvalidValueError(f"upscale is {args.upscale}; it must be a whole number of at least 1")
    check_writable(args.out)
    pipeline = TinyPipeline.load("teacher" if args.teacher else "student", pick_device(args.device), DTYPES[args.dtype])
    steps = pipeline.default_steps if args.steps is None else args.steps
    with tqdm(total=steps, desc="sampling", unit="step", disable=args.json, leave=False) as bar:

        def progress(step: Step) -> None:
            bar.update()

        made = pipeline.generate(
            [args.prompt], [args.seed], steps, args.shift, args.frames, args.height, args.width, observers=[progress]
        )
    start = time.perf_counter()
    recipe = {
        "prompt": args.prompt,
        "model": f"tiny-{pipeline.which}",
        "steps": steps,
        "seed": args.seed,
        "accvideo": __version__,
    }
    write_mp4(args.out, upscale(made.frames[0], args.upscale), FPS, metadata={"accvideo": json.dumps(recipe)})
    seconds = {**made.seconds, "encoding": time.perf_counter() - start}
    if args.json:
        print(json.dumps({**recipe, "file": str(args.out), "seconds": seconds}))
    else:
        print(f"{args.out}  ({pipeline.which}, {steps} steps: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()) + ")")
    return 0
