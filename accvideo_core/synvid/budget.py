"""`accvideo budget`: what a SynVid dataset of HunyuanVideo's trajectories costs before it is begun: GPU hours, bytes, files.

Work per step is counted from the network's shape (DiTConfig.hunyuan_video); how fast a GPU does it is published or measured,
and every figure says where it is from. A step timed on the machine itself (--step-seconds) is better than any of them.
"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from ..dit import DiTConfig
from ..errors import InvalidValueError
from ..schedule import PRESETS
from .header import DTYPES

MACHINE = 8  # GPUs in one
CLUSTERS = (1, 8, 32, 64, 128, 256)
LINE = 1500  # bytes of a manifest line and a file's header: the prompt, two hashes, a sum for each key
_CONFIG = DiTConfig.hunyuan_video()
_PRESET = PRESETS["hunyuan-t2v"]


class Split(NamedTuple):
    """Size of the videos in pixels and frames."""

    height: int
    width: int
    frames: int


SPLITS: Mapping[str, Split] = MappingProxyType({"high": Split(720, 1280, 129), "medium": Split(544, 960, 93)})


class Pace(NamedTuple):
    """How much of the network's work a GPU does in a second, in TFLOP/s, end to end, and where that is from."""

    tflops: float
    source: str


_SGLANG = "SGLang, compiled, exact attention: 666 TFLOP/s, the best public rate of this network"
PACES: Mapping[str, Pace] = MappingProxyType(
    {
        "a100": Pace(187, "the AccVideo paper: 3 234 s for 50 steps of 720x1280x129, text encoder and VAE included"),
        "h100": Pace(666, f"{_SGLANG}, on an H100"),
        "h100-official": Pace(317, "the official HunyuanVideo code on an H100: 317 TFLOP/s"),
        "h200": Pace(666, f"{_SGLANG}, on an H100, which computes as fast (dense bf16 matmuls: 790 TFLOP/s measured on an H200)"),
    }
)
PUBLISHED: Mapping[tuple[str, str], tuple[float, str]] = MappingProxyType(
    {
        ("a100", split): (seconds, f"the AccVideo paper: {seconds:,} s for 50 steps, text encoder and VAE included")
        for split, seconds in (("high", 3234), ("medium", 704))
    }
)
"""Seconds of a whole trajectory, where somebody has told them."""


@dataclass(frozen=True)
class BudgetArgs:
    """What capturing trajectories of HunyuanVideo costs: GPU hours, days, bytes and files."""

    split: Literal["high", "medium"] = "medium"
    """Size of the videos as in the paper: high is 720x1280x129, medium 544x960x93."""
    count: int = 38_400
    """Trajectories; the paper trained on 38 400 and captured 114 299."""
    gpu: Literal["a100", "h100", "h100-official", "h200"] = "h200"
    """What captures; its speed is a published one."""
    gpus: int | None = None
    """How many of them; default a table of 1 to 256."""
    days: float | None = None
    """Also say how many GPUs it takes to be done in so many days."""
    step_seconds: float | None = None
    """Seconds a step of one sample takes on your GPU, instead of the published speed; also for other networks."""
    height: int | None = None
    """Another height in pixels, a multiple of 16."""
    width: int | None = None
    """Another width in pixels, a multiple of 16."""
    frames: int | None = None
    """Another number of frames, 4n+1."""
    batch: int = 1
    """Trajectories in a file."""
    seeds: int = 1
    """Trajectories of each prompt."""
    tokens: int = 256
    """Tokens of a prompt's text; 256 is the most."""
    steps: int = _PRESET.teacher_steps
    """Steps of the teacher's schedule."""
    keys: int = 5
    """Key latents that are kept of a trajectory."""
    cfg: bool = False
    """The teacher needs classifier-free guidance, so every step is two."""
    latents: Literal["float16", "float32"] = "float16"
    """What latents are stored as."""
    json: bool = False
    """Print it all as JSON."""


@dataclass(frozen=True)
class Storage:
    """A way to store a dataset: bytes of latents, of texts and of manifests, files, and bytes of it all."""

    what: str
    latents: int
    texts: int
    manifests: int
    files: int

    @property
    def bytes(self) -> int:
        return self.latents + self.texts + self.manifests


@dataclass(frozen=True)
class Fleet:
    """So many GPUs: machines of 8, days until all is captured, MB/s they write together, GPU hours a power cut costs at most."""

    gpus: int
    machines: int
    days: float
    megabytes_per_second: float
    hours_at_risk: float


@dataclass(frozen=True)
class Budget:
    """shape is that of a latent; seconds are those of one trajectory on one GPU, `source` says where they are from."""

    shape: tuple[int, int, int, int]
    pflop_per_step: float
    seconds: float
    source: str
    gpu_hours: float
    storage: tuple[Storage, ...]
    fleets: tuple[Fleet, ...]


def work_per_step(shape: tuple[int, int, int, int], tokens: int) -> float:
    """FLOP of one call of HunyuanVideo's network on one latent (C, T, H, W) with so many text tokens.

    Every token meets 12 H^2 weights in each block (qkv 3, projection 1, MLP 8; single blocks fuse the same), a multiplication
    and an addition each; attention multiplies all pairs twice. The rest is below 1 %.
    """
    width, blocks = _CONFIG.hidden_size, _CONFIG.depth_double + _CONFIG.depth_single
    sequence = shape[1] * shape[2] * shape[3] // 4 + tokens
    return 2.0 * 12 * width**2 * blocks * sequence + 4.0 * width * blocks * sequence**2


def plan_budget(args: BudgetArgs) -> Budget:
    """All of it. Raises InvalidValueError for what cannot be."""
    for name in ("count", "batch", "seeds", "tokens", "steps", "keys"):
        _at_least_1(name, getattr(args, name))
    split = SPLITS[args.split]
    height, width, frames = args.height or split.height, args.width or split.width, args.frames or split.frames
    for name, size, step, rest in (("height", height, 16, 0), ("width", width, 16, 0), ("frames", frames, 4, 1)):
        if size < 1 or size % step != rest:
            raise InvalidValueError(f"{name} is {size}; it must be {'4n+1' if rest else 'a multiple of 16'}")
    shape = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
    work = work_per_step(shape, args.tokens)
    seconds, source = _pace(args, work, (height, width, frames) == split)
    storage = _storage(args, shape)
    hours = args.count * seconds / 3600
    sizes = CLUSTERS if args.gpus is None else (_at_least_1("gpus", args.gpus),)
    if args.days is not None:
        if not (math.isfinite(args.days) and args.days > 0):
            raise InvalidValueError(f"days is {args.days}; it must be above 0")
        sizes = tuple(sorted({*sizes, math.ceil(hours / 24 / args.days)}))
    return Budget(shape, work / 1e15, seconds, source, hours, storage, tuple(_fleet(args, n, seconds, storage[0]) for n in sizes))


def run(args: BudgetArgs) -> int:
    """Print the budget."""
    plan = plan_budget(args)
    if args.json:
        found = asdict(plan)
        for entry, stored in zip(found["storage"], plan.storage, strict=True):
            entry["bytes"] = stored.bytes
        print(json_module.dumps(found))
        return 0
    print(f"{args.count:,} trajectories of {args.steps} steps, latents {'x'.join(map(str, plan.shape))}")
    print(f"  {plan.seconds:,.0f} s of one GPU each ({plan.pflop_per_step:.2f} PFLOP a step): {plan.source}")
    print(f"  {plan.gpu_hours:,.0f} GPU hours in all\n")
    print(f"{'GPUs':>6} {'machines':>9} {'days':>9} {'MB/s written':>13} {'GPU hours lost when all stop':>29}")
    for it in plan.fleets:
        shown = f"{it.gpus:>6,} {it.machines:>9,} {it.days:>9,.1f} {it.megabytes_per_second:>13,.1f} {it.hours_at_risk:>29,.1f}"
        print(shown)
    print(f"\n{'stored':<36} {'bytes':>17} {'TB':>8} {'MB each':>9} {'files':>9}")
    for kept in plan.storage:
        each = kept.bytes / args.count / 1e6
        print(f"{kept.what:<36} {kept.bytes:>17,} {kept.bytes / 1e12:>8.3f} {each:>9.2f} {kept.files:>9,}")
    return 0


def _pace(args: BudgetArgs, work: float, is_split: bool) -> tuple[float, str]:
    """(seconds of one trajectory, where they are from)."""
    calls = args.steps * (2 if args.cfg else 1)
    if args.step_seconds is not None:
        if not (math.isfinite(args.step_seconds) and args.step_seconds > 0):
            raise InvalidValueError(f"step-seconds is {args.step_seconds}; it must be above 0")
        return calls * args.step_seconds, f"{args.step_seconds:g} s a step, as you gave it"
    if is_split and (args.gpu, args.split) in PUBLISHED:
        seconds, source = PUBLISHED[args.gpu, args.split]
        return seconds * calls / _PRESET.teacher_steps, source
    pace = PACES[args.gpu]
    return calls * work / (pace.tflops * 1e12), pace.source


def _storage(args: BudgetArgs, shape: tuple[int, int, int, int]) -> tuple[Storage, ...]:
    """What `accvideo capture` writes by default first."""
    values = math.prod(shape) * args.count
    latent, noise = values * DTYPES[args.latents].itemsize, values * 4  # noise is kept as float32
    prompts = math.ceil(args.count / args.seeds)
    texts = prompts * 2 * (args.tokens * _CONFIG.text_dim + _CONFIG.pooled_dim)
    files = math.ceil(args.count / args.batch) + prompts
    ways = (
        (f"{args.keys} keys, noise from its seed", args.keys * latent),
        (f"{args.keys} keys and noise (--store-noise)", args.keys * latent + noise),
        (f"all {args.steps} latents (--full)", args.steps * latent),
        (f"all {args.steps} latents and noise", args.steps * latent + noise),
    )
    return tuple(Storage(what, size, texts, args.count * LINE, files) for what, size in ways)


def _fleet(args: BudgetArgs, gpus: int, seconds: float, stored: Storage) -> Fleet:
    rounds = math.ceil(math.ceil(args.count / args.batch) / gpus)
    wall = rounds * args.batch * seconds
    return Fleet(gpus, math.ceil(gpus / MACHINE), wall / 86400, stored.bytes / wall / 1e6, gpus * args.batch * seconds / 3600)


def _at_least_1(name: str, value: int) -> int:
    if value < 1:
        raise InvalidValueError(f"{name} is {value}; it must be at least 1")
    return value
