"""One full iteration of Algorithm 1 by component: seconds and peak memory, compiled and not, checkpointed and not.

    python benchmarks/train_step.py [--size tiny] [--batch 8] [--json docs/benchmarks/train_step.json]
    python benchmarks/train_step.py --size 1b            # on a GPU: with the share of its peak that the model makes use of

Each variant runs in a process of its own and is the real trainer over made-up trajectories. On CUDA it is sharded over the one
GPU there is, as in training: bf16 blocks, fp32 masters. Peak memory is torch's own count on CUDA, resident memory elsewhere.
A component's time is taken with the device drained before and after it; the iteration's without.

Model FLOPs: 24 tokens D^2 of linear layers and 4 tokens^2 D of attention a block and forward pass; a backward pass twice
that, or, through the frozen teacher, once the linear layers and twice the attention. What checkpointing computes again does not
count, so that it lowers the utilisation.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.devices import synchronize  # noqa: E402
from accvideo_core.distill.adapters import HunyuanAdapter  # noqa: E402
from accvideo_core.distill.config import TrainConfig  # noqa: E402
from accvideo_core.distill.parallel import World  # noqa: E402
from accvideo_core.distill.trainer import Trainer  # noqa: E402
from accvideo_core.dit import DiTConfig, HunyuanVideoDiT  # noqa: E402
from accvideo_core.sampling import make_noise  # noqa: E402
from accvideo_core.schedule import key_sigmas  # noqa: E402
from accvideo_core.synvid import Batch  # noqa: E402

# name -> (network, latent (T, H, W), text tokens). "1b" has 1.14 G parameters and the medium split's latent: 544 x 960 x 93.
SIZES = {
    "proof": (DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=1, text_dim=16), (2, 4, 4), 8),
    "tiny": (DiTConfig.tiny(), (5, 8, 8), 20),
    "small": (DiTConfig(hidden_size=384, num_heads=3, depth_double=2, depth_single=4, text_dim=512), (5, 16, 16), 32),
    "1b": (DiTConfig(hidden_size=2048, num_heads=16, depth_double=4, depth_single=8, text_dim=4096), (24, 68, 120), 256),
}
VARIANTS = {"plain": (), "checkpointed": ("checkpointing",), "compiled": ("compile",), "both": ("compile", "checkpointing")}


@dataclass
class Args:
    """Time an iteration of the trainer and print a table."""

    size: str = "tiny"
    """proof, tiny, small, or 1b, which wants a GPU."""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Of plain, checkpointed, compiled, both; 1b fits a GPU only checkpointed."""
    batch: int = 8
    """Trajectories an update."""
    segments: int = 5
    """Keys an iteration goes through."""
    repeats: int = 5
    """Iterations timed, after one to warm up."""
    device: str | None = None
    """cpu or cuda; default: what there is."""
    peak_tflops: float = 989.0
    """The device's peak in bf16, for the utilisation on CUDA: 989 for H100 and H200, 312 for A100."""
    json: Path | None = None
    """Also write the results here."""
    worker: str | None = None
    """Measure this variant in this process; used by the benchmark itself."""


class MadeUp:
    """Noise for trajectories."""

    guidance = 6.0

    def __init__(self, args: Args) -> None:
        self.config, self.shape, self.length = SIZES[args.size]
        self.batch_size, self.sigmas = args.batch, key_sigmas(10 * args.segments, args.segments, 7.0)

    def batch(self, step: int, key: int) -> Batch:
        def drawn(what: int, *shape: int) -> Tensor:
            return make_noise((self.batch_size, *shape), [1000 * what + row for row in range(self.batch_size)])

        c, names = self.config, tuple(map(str, range(self.batch_size)))
        clean, noisy = (drawn(k, c.in_channels, *self.shape) for k in (key, key + 1))
        low, high = (torch.full((self.batch_size,), self.sigmas[k]) for k in (key, key + 1))
        text, pooled = drawn(97, self.length, c.text_dim), drawn(98, c.pooled_dim)
        return Batch(names, (key,) * len(names), clean, noisy, low, high, text, None, pooled)

    def state(self) -> dict[str, Any]:
        return {}


class Timed(Trainer):
    """The trainer with a clock at its parts. Components do not overlap: what a part calls is not counted in it."""

    seconds: defaultdict[str, float] | None = None
    within: list[float]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.seconds is None:
            yield
            return
        synchronize(self.world.device)
        start = time.perf_counter()
        self.within.append(0.0)
        yield
        synchronize(self.world.device)
        spent = time.perf_counter() - start
        self.seconds[name] += spent - self.within.pop()
        if self.within:
            self.within[-1] += spent

    def iteration(self, iteration: int) -> None:
        self.within = []
        with self.part("data, average of the weights"):
            super().iteration(iteration)

    def update_by_trajectory(self, *args: Any) -> Any:
        with self.part("trajectory: student backward"):
            return super().update_by_trajectory(*args)

    def update_by_heads(self, *args: Any) -> Any:
        with self.part("adversarial: backward through head, teacher, student"):
            return super().update_by_heads(*args)

    def velocity(self, *args: Any) -> Tensor:
        with self.part("student forward"):
            return super().velocity(*args)

    def features(self, *args: Any) -> Tensor:
        with self.part("teacher forward"):
            return super().features(*args)

    def _backward_head(self, *args: Any) -> None:
        with self.part("heads' own update"):
            super()._backward_head(*args)

    def _step(self, *args: Any) -> None:
        with self.part("clipping and optimizers"):
            super()._step(*args)


def model_flops(args: Args) -> float:
    """Of an iteration."""
    config, (t, h, w), length = SIZES[args.size]
    blocks, tokens, width = config.depth_double + config.depth_single, t * h * w // 4 + length, config.hidden_size
    linear, attention = 24 * tokens * width**2 * blocks, 4 * tokens**2 * width * blocks
    student = 3 * (linear + attention)
    teacher = (linear + attention) + (linear + 2 * attention) + (linear + attention)  # fake, back through it, real
    depth = [-(-2 * blocks // 3) / blocks] + [1.0] * (args.segments - 1)  # the clean key's features end at two thirds
    return args.batch * sum(2 * student + share * teacher for share in depth)


def measure(args: Args) -> dict[str, Any]:
    """One variant, in this process."""
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    world = World.start(device=kind)
    assert args.worker is not None
    switches = dict.fromkeys(VARIANTS[args.worker], True)
    config = TrainConfig(batch=args.batch, micro_batch=1 if args.size == "1b" else None, **switches)
    network = SIZES[args.size][0]
    student, teacher = (HunyuanVideoDiT(network, dtype=torch.bfloat16 if kind == "cuda" else None) for _ in range(2))
    for made in (student, teacher):
        made.init_weights(0)
    trainer = Timed(config, HunyuanAdapter("tiny"), student, teacher, MadeUp(args), world)  # type: ignore[arg-type]
    start = time.perf_counter()
    trainer.iteration(0)
    synchronize(world.device)
    first = time.perf_counter() - start
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for iteration in range(1, args.repeats + 1):
        start = time.perf_counter()
        trainer.iteration(iteration)
        synchronize(world.device)
        seconds.append(time.perf_counter() - start)
    trainer.seconds = defaultdict(float)
    trainer.iteration(args.repeats + 1)
    found = {
        "variant": args.worker,
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "first_seconds": first,
        "peak_gb": peak_bytes(kind) / 1e9,
        "components": dict(trainer.seconds),
        "tflop": model_flops(args) / 1e12,
        "cuda": kind == "cuda",
        "device": torch.cuda.get_device_name() if kind == "cuda" else platform.machine(),
        "parameters": sum(p.numel() for p in student.parameters()),
        "precision": str(trainer.compute or torch.float32).removeprefix("torch."),
    }
    world.close()
    return found


def peak_bytes(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(args: Args) -> int:
    if args.worker is not None:
        print(json.dumps(measure(args)))
        return 0
    rows = []
    for variant in args.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", variant]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{variant} failed:\n{run.stderr[-3000:]}")
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        show(rows[-1], args)
    if args.json is not None:
        told = {name: value for name, value in asdict(args).items() if name not in ("json", "worker")}
        made = {"torch": torch.__version__, "threads": torch.get_num_threads(), "arguments": told, "rows": rows}
        args.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


def show(row: dict[str, Any], args: Args) -> None:
    rate = row["tflop"] / row["seconds"]
    used = f", {100 * rate / args.peak_tflops:.1f} % of {args.peak_tflops:g}" if row["cuda"] else ""
    print(
        f"{args.size}, {row['parameters'] / 1e6:.0f} M parameters, batch {args.batch}, {row['variant']}, {row['precision']}, "
        f"{row['device']}: {row['seconds']:.3f} s an iteration ({row['spread'][0]:.3f} to {row['spread'][1]:.3f}; the first "
        f"{row['first_seconds']:.1f}), peak {row['peak_gb']:.2f} GB, {rate:.3f} model TFLOP/s{used}"
    )
    for name, seconds in sorted(row["components"].items(), key=lambda item: -item[1]):
        print(f"    {name:56}{1000 * seconds:10.1f} ms{100 * seconds / sum(row['components'].values()):7.1f} %")


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
