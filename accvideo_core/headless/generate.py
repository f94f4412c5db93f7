"""`accvideo generate`: a prompt to an MP4, with the bundled models or with released ones from files.

Text encoder, network and VAE are on the device one after the other, so that only the largest must fit it; a VAE that cannot be
loaded is found before the long work, not after.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..devices import pick_device, synchronize
from ..distill.adapters import adapter_for
from ..dit.attention import AUTO, check
from ..dit.fp8 import Linears, set_linears
from ..errors import InvalidValueError, PromptError
from ..files import check_writable
from ..media import upscale, write_mp4
from ..sampling import Step, euler_flow, make_noise
from ..schedule import get_preset
from ..synvid.capture import Encoding, pad_texts
from ..tiny import Which
from ..tiny.pipeline import latent_shape
from .models import BUNDLED, SIZES, Precision, find_network, load_network, load_text, load_vae

T = TypeVar("T")


@dataclass(frozen=True)
class GenerateArgs:
    """Make a video from a prompt, e.g. "a red ball moving left on a black background": of the tiny world with the bundled
    models, or with a student, text encoders and a VAE in files."""

    prompt: tyro.conf.Positional[str]
    """What to show. Attributes a prompt of the tiny world does not name (colour, shape, motion, background) are left open."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out.mp4")
    """The MP4 to write."""
    student: str = BUNDLED
    """The student's weights in any layout `accvideo inspect` reads, or tiny for the bundled student."""
    text_encoder: str = BUNDLED
    """The folder of HunyuanVideo's text encoders (text_encoder, text_encoder_2), or tiny for the bundled one."""
    vae: str = BUNDLED
    """The folder of HunyuanVideo's VAE in diffusers' layout, or tiny for the bundled one."""
    teacher: bool = False
    """Use the bundled teacher instead of the student, or take the file for a teacher: 50 steps by default."""
    steps: int | None = None
    """Sampling steps; default 5, for a teacher 50."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same video."""
    shift: float | None = None
    """Time shift of the schedule; default 7."""
    guidance: float | None = None
    """Embedded guidance; default 6."""
    frames: int | None = None
    """Frames, 4n+1; default 93, of the tiny world 17, which its models were trained on."""
    height: int | None = None
    """Height in pixels, a multiple of 16; default 544, of the tiny world 64, which its models were trained on."""
    width: int | None = None
    """Width in pixels, a multiple of 16; default 960, of the tiny world 64."""
    upscale: int = 1
    """Enlarge each pixel to a square of so many pixels a side."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    dtype: Precision = "auto"
    """Precision of the network; auto is bfloat16, of the tiny world and on a CPU float32."""
    attention: str = AUTO
    """The attention kernel: auto, the fastest exact one here, or a name that `accvideo inspect` lists."""
    linears: Linears = "exact"
    """Linear layers of the blocks: exact, or fp8, which is lossy, halves the weights' memory and, on GPUs with fp8, is faster."""
    json: bool = False
    """Print what was made as JSON."""


class Stopwatch:
    """`timed(name, work)` does the work, waits for the device and keeps the seconds it took in `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start
        return result


def run(args: GenerateArgs) -> int:
    """Write the video and print where it is and how long each part took."""
    if not args.prompt.strip():
        raise PromptError("the prompt is empty; say what to show, e.g. 'a red ball', or 'a shape' to leave everything open")
    if args.upscale < 1:
        raise InvalidValueError(f"upscale is {args.upscale}; it must be a whole number of at least 1")
    which: Which = "teacher" if args.teacher else "student"
    file, family = find_network(args.student, which)
    _check_same_world(args, family)
    usual, preset, device = SIZES[family], get_preset(family), pick_device(args.device)
    check(args.attention, device)
    given = (args.frames, args.height, args.width)
    shape = latent_shape(*(own if own is not None else size for own, size in zip(given, usual, strict=False)))
    steps = (preset.teacher_steps if args.teacher else preset.steps) if args.steps is None else args.steps
    sigmas, noise = preset.sigmas(steps, args.shift), make_noise((1, *shape), [args.seed])
    check_writable(args.out)
    if args.out.suffix.lower() != ".mp4":
        raise InvalidValueError(f"the output {str(args.out)!r} is no .mp4, which is what is written; name it so")
    timed = Stopwatch(device)
    vae = timed("loading VAE", lambda: load_vae(args.vae, device))
    text = _encode(args, timed)
    latent, kernel = _sample(args, file, family, text, noise, sigmas, timed)
    if not latent.isfinite().all():
        raise InvalidValueError("the network's latent holds values that are not finite; choose another --dtype")
    frames = timed("vae", lambda: vae.decode(latent[0]))
    model = f"tiny-{which}" if args.student == BUNDLED else file.name
    recipe = {"prompt": args.prompt, "model": model, "steps": steps, "seed": args.seed, "accvideo": __version__}
    recipe |= {} if args.linears == "exact" else {"linears": args.linears}
    metadata = {"accvideo": json.dumps(recipe)}
    timed("encoding", lambda: write_mp4(args.out, upscale(frames, args.upscale), usual.fps, metadata=metadata))
    if args.json:
        print(json.dumps({**recipe, "file": str(args.out), "attention": kernel, "seconds": timed.seconds}))
    else:
        seconds = ", ".join(f"{name} {taken:.2f} s" for name, taken in timed.seconds.items())
        print(f"{args.out}  ({model}, {steps} steps, attention by {kernel}: {seconds})")
    return 0


def _check_same_world(args: GenerateArgs, family: str) -> None:
    if (solver := get_preset(family).solver) != "euler":
        raise InvalidValueError(f"{args.student} is of the family {family}, sampled with {solver}; generate with it in ComfyUI")
    parts = {"--student": family == "tiny", "--text-encoder": args.text_encoder == BUNDLED, "--vae": args.vae == BUNDLED}
    bundled = [part for part, tiny in parts.items() if tiny]
    if 0 < len(bundled) < len(parts):
        raise InvalidValueError(
            f"{' and '.join(bundled)} of the tiny world cannot work with {' and '.join(parts.keys() - bundled)} of HunyuanVideo; "
            "models must be made for each other, so name all three or none"
        )


def _encode(args: GenerateArgs, timed: Stopwatch) -> Encoding:
    encoder = timed("loading text encoder", lambda: load_text(args.text_encoder, timed.device))
    return timed("text", lambda: encoder.encode(args.prompt))


def _sample(
    args: GenerateArgs, file: Path, family: str, text: Encoding, noise: Tensor, sigmas: Tensor, timed: Stopwatch
) -> tuple[Tensor, str | None]:
    """The latent, and the attention kernel that ran."""
    precision: Precision = "float32" if args.dtype == "auto" and family == "tiny" else args.dtype
    adapter = adapter_for(family)
    network = timed("loading network", lambda: load_network(adapter, file, timed.device, precision, args.attention))
    set_linears(network, args.linears)
    adapter.check_text(network, *text)
    conditioning = adapter.conditioning(pad_texts([text]), adapter.guidance(network, args.guidance)).to(timed.device)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return adapter.velocity(network, x, sigma, conditioning)

    with tqdm(total=len(sigmas) - 1, desc="sampling", unit="step", disable=args.json, leave=False) as bar, torch.inference_mode():

        def progress(step: Step) -> None:
            bar.update()

        latent = timed("sampling", lambda: euler_flow(velocity, noise.to(timed.device), sigmas, [progress]))
    return latent, getattr(network, "attention_ran", None)
