"""Teacher in 50 steps against student in 5, in one run, and where the time of a video goes.

    python benchmarks/speedup.py [--repeats 20] [--batch 16] [--json docs/benchmarks/speedup.json]

Teacher and student take turns on the same prompts and noise, in another order each repeat; the speed-up is the median of
the paired ratios with its 95 % bootstrap interval. "Outside the network" is the part of sampling that is not spent in
the network's own forward pass; batch is chosen so that a step takes 50 ms or more, as any real model's does. Prompt to
MP4 is one prompt at batch 1.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from paired import bootstrap
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.devices import pick_device
from accvideo_core.media import write_mp4
from accvideo_core.sampling import euler_flow, make_noise
from accvideo_core.tiny.clips import FPS
from accvideo_core.tiny.pipeline import PRESET, TinyPipeline, latent_shape

PROMPT = "a red ball moving left on a black background"
SPEEDUP_TARGET, OUTSIDE_TARGET, STEP_FLOOR = 9.5, 0.02, 0.05


@dataclass
class Args:
    """Measure the speed-up of the 5-step student over its 50-step teacher."""

    repeats: int = 20
    """Paired repeats."""
    batch: int = 16
    """Clips a batch, for a network step of 50 ms or more."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    json: Path | None = None
    """Also write the results here."""


@dataclass(frozen=True)
class Sampled:
    """Seconds of one sampling, and of the network calls within it."""

    total: float
    network: float
    steps: int


def sample(pipeline: TinyPipeline, batch: int, seed: int) -> Sampled:
    """Sample a batch of the prompt at the model's own number of steps."""
    calls = []
    conditioning = pipeline.condition([PROMPT] * batch)
    network = pipeline.velocity(conditioning)

    def timed(latent: Tensor, sigma: Tensor) -> Tensor:
        start = pipeline.now()
        out = network(latent, sigma)
        calls.append(pipeline.now() - start)
        return out

    start = pipeline.now()
    noise = make_noise((batch, *latent_shape(17, 64, 64)), range(seed, seed + batch)).to(pipeline.device)
    euler_flow(timed, noise, PRESET.sigmas(pipeline.default_steps))
    return Sampled(pipeline.now() - start, sum(calls), len(calls))


def components(pipeline: TinyPipeline, repeats: int) -> dict[str, float]:
    """Median seconds of text, sampling, VAE and MP4 for one prompt at batch 1."""
    seconds: dict[str, list[float]] = {"text": [], "sampling": [], "vae": [], "encoding": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(repeats):
            made = pipeline.generate([PROMPT], [seed])
            start = time.perf_counter()
            write_mp4(Path(folder) / "clip.mp4", made.frames[0], FPS)
            for name, value in {**made.seconds, "encoding": time.perf_counter() - start}.items():
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def measure(args: Args) -> dict[str, Any]:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    models = {which: TinyPipeline.load(which, device) for which in ("teacher", "student")}
    for pipeline in models.values():
        sample(pipeline, args.batch, 0)
    runs: dict[str, list[Sampled]] = {"teacher": [], "student": []}
    for repeat in range(args.repeats):
        order = list(models)
        random.Random(repeat).shuffle(order)
        for which in order:
            runs[which].append(sample(models[which], args.batch, repeat * args.batch))
    ratios = [t.total / s.total for t, s in zip(runs["teacher"], runs["student"], strict=True)]
    outside = {which: statistics.median(1 - r.network / r.total for r in found) for which, found in runs.items()}
    step = {which: statistics.median(r.network / r.steps for r in found) for which, found in runs.items()}
    return {
        "machine": platform.processor() or platform.machine(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": args.batch,
        "repeats": args.repeats,
        "seconds": {which: statistics.median(r.total for r in found) for which, found in runs.items()},
        "network_step_seconds": step,
        "speedup": statistics.median(ratios),
        "speedup_95": bootstrap(ratios),
        "outside_network": outside,
        "prompt_to_mp4": {which: components(models[which], min(args.repeats, 5)) for which in models},
    }


def report(r: dict[str, Any]) -> bool:
    """Print the table; True when both targets are reached."""
    low, high = r["speedup_95"]
    print(f"{r['device']}, {r['threads']} threads, torch {r['torch']}, batch {r['batch']}, {r['repeats']} paired repeats")
    print(f"{'':<10}{'steps':>6}{'sampling s':>12}{'ms a step':>11}{'outside network':>17}")
    for which, steps in (("teacher", PRESET.teacher_steps), ("student", PRESET.steps)):
        step, outside = 1000 * r["network_step_seconds"][which], 100 * r["outside_network"][which]
        print(f"{which:<10}{steps:>6}{r['seconds'][which]:>12.3f}{step:>11.1f}{outside:>16.2f}%")
    verdict = "reached" if r["speedup"] >= SPEEDUP_TARGET else "MISSED"
    print(f"speed-up of sampling {r['speedup']:.2f} (95 %: {low:.2f} to {high:.2f}), target {SPEEDUP_TARGET}: {verdict}")
    worst, shortest = max(r["outside_network"].values()), min(r["network_step_seconds"].values())
    verdict = "reached" if worst <= OUTSIDE_TARGET else "MISSED"
    if shortest < STEP_FLOOR:
        verdict = f"not judged, a step takes {1000 * shortest:.0f} ms; raise --batch until it takes {1000 * STEP_FLOOR:.0f}"
    print(f"outside the network {100 * worst:.2f} %, target {100 * OUTSIDE_TARGET:.0f} %: {verdict}")
    print("prompt to MP4, seconds at batch 1:")
    for which, parts in r["prompt_to_mp4"].items():
        print(f"  {which:<8} " + "  ".join(f"{name} {value:.3f}" for name, value in parts.items()))
    return r["speedup"] >= SPEEDUP_TARGET and worst <= OUTSIDE_TARGET and shortest >= STEP_FLOOR


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    result = measure(args)
    reached = report(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
