"""What capturing costs over plain sampling: seconds, and bytes on the disk over the information stored.

    python benchmarks/capture.py [--only tiny stand-in bytes] [--repeats 20] [--json docs/benchmarks/capture.json]

`tiny` is the tiny teacher at batch 64; `stand-in` has latents of the 13 B model's medium split (16 x 24 x 68 x 120) and a network
that waits --step-seconds, as a CPU does while a GPU works. What a capture adds to a trajectory depends neither on how many steps
it has nor on how long they take: it keeps the same five latents. So it can be measured on shorter trajectories, where it is
easier to see (--steps 5, a step of 0.4 s); its share of one of 50 steps, the stand-in's of REAL_STEP, is told beside.

Capturing and plain sampling of the same batches take turns, in another order each repeat. Capturing is timed from the first step
until the last byte is flushed to the disk. Overhead is the median of the paired ratios, with its 95 % bootstrap interval.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from paired import bootstrap
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.sampling import euler_flow, make_noise
from accvideo_core.synvid import Header, SynVidStore
from accvideo_core.synvid.capture import Network, batches, capture, stack_texts
from accvideo_core.synvid.plan import Plan
from accvideo_core.tiny import load_tiny
from tests.soak.capture_restart import make_plan

MEDIUM = (16, 24, 68, 120)
REAL_STEP = 3.11  # seconds of the medium split's step at an H200's measured bf16 rate; any other GPU takes longer
REAL_STEPS = 50
OVERHEAD_TARGET, BYTES_TARGET = 0.02, 1.02
Part = Literal["tiny", "stand-in", "bytes"]


@dataclass
class Args:
    """Measure what capturing costs."""

    only: tuple[Part, ...] = ("tiny", "stand-in", "bytes")
    """Which parts to run."""
    repeats: int = 20
    """Paired repeats."""
    batch: int = 64
    """Trajectories a batch of the tiny teacher."""
    steps: int = 50
    """Steps of a trajectory."""
    step_seconds: float = 0.4
    """What a step of the stand-in network takes."""
    batches: int = 2
    """Batches of one trajectory a repeat of the stand-in; the tiny teacher has one a repeat."""
    folder: Path | None = None
    """Where to write, on the disk to be measured; by default the system's temporary folder."""
    json: Path | None = None
    """Also write the results here."""


@torch.inference_mode()
def sample(network: Network, plan: Plan, batch: int, header: Header) -> None:
    """What `capture` does without capturing."""
    for group in batches(plan.items.values(), batch):
        conditioning = stack_texts([plan.text(item.text) for item in group], header.guidance)
        noise = make_noise((len(group), *group[0].shape), [item.seed for item in group])
        euler_flow(lambda x, sigma, c=conditioning: network(x, sigma, c), noise, torch.tensor(header.sigmas))


def measure(name: str, network: Network, plan: Plan, batch: int, header: Header, folder: Path, repeats: int) -> dict[str, Any]:
    """Paired times of sampling and of capturing every sample of the plan, each capture into a dataset of its own."""

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def captured() -> None:
        store = SynVidStore(folder / "dataset", header)
        if faults := capture(network, plan, list(plan.items.values()), store, batch):
            raise RuntimeError(f"nothing may be left out: {faults}")

    pairs = []
    for repeat in range(-1, repeats):  # the first one warms up and is not counted
        first, second = ("plain", "capture") if repeat % 2 else ("capture", "plain")
        works = {"plain": lambda: sample(network, plan, batch, header), "capture": captured}
        seconds = {which: timed(works[which]) for which in (first, second)}
        shutil.rmtree(folder / "dataset")
        if repeat >= 0:
            pairs.append((seconds["plain"], seconds["capture"]))
            print(f"{name} {repeat + 1}/{repeats}: plain {pairs[-1][0]:.3f} s, capture {pairs[-1][1]:.3f} s", file=sys.stderr)
    ratios = [capture / plain - 1 for plain, capture in pairs]
    low, high = bootstrap(ratios)
    count = len(plan.items)
    extra = [(capture - plain) / count for plain, capture in pairs]
    return {
        "part": name,
        "trajectories": count,
        "batch": batch,
        "plain_seconds": statistics.median(plain for plain, _ in pairs),
        "capture_seconds": statistics.median(capture for _, capture in pairs),
        "extra_seconds_a_trajectory": statistics.median(extra),
        "extra_interval": bootstrap(extra),
        "overhead": statistics.median(ratios),
        "interval": [low, high],
    }


def stand_in(seconds: float) -> Network:
    """A network that takes that long, and hardly any of the CPU."""

    def network(latent: Tensor, sigma: Tensor, conditioning: object) -> Tensor:
        time.sleep(seconds)
        return latent

    return network


def measure_bytes(network: Network, plan: Plan, header: Header, folder: Path) -> dict[str, Any]:
    """Apparent bytes of a dataset captured at batch 8, over m fp16 latents and each text once."""
    store = SynVidStore(folder / "dataset", header)
    capture(network, plan, list(plan.items.values()), store, 8)
    files = [path for path in (folder / "dataset").rglob("*") if path.is_file()]
    on_disk = sum(path.stat().st_size for path in files)
    samples = store.samples().values()
    latents = sum(header.segments * 2 * torch.Size(sample.shape).numel() for sample in samples)
    texts = [tensor for name in {sample.text for sample in samples} for tensor in store.text(name) if tensor is not None]
    information = latents + sum(tensor.numel() * tensor.element_size() for tensor in texts)
    shutil.rmtree(folder / "dataset")
    ratio = on_disk / information
    sizes = {"bytes": on_disk, "information": information, "files": len(files)}
    return {"part": "bytes", "trajectories": len(samples), "batch": 8, **sizes, "ratio": ratio, "holds": ratio <= BYTES_TARGET}


def medium_plan(folder: Path, count: int) -> Plan:
    """Trajectories of the medium split, with texts of HunyuanVideo's widths."""
    plan = Plan(folder, create=True)
    for seed in range(count):
        text = torch.randn(120, 4096, generator=torch.Generator().manual_seed(seed)).half()
        plan.add(f"prompt {seed}", text, torch.zeros(768).half(), seed, MEDIUM)
    return plan


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    teacher, _, _ = load_tiny("teacher")
    header = Header.of("tiny", "0" * 64, args.steps)
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if "tiny" in args.only:
            plan = make_plan(folder / "tiny", args.batch)
            results.append(measure("tiny", teacher, plan, args.batch, header, folder, args.repeats))
        if "stand-in" in args.only:
            plan = medium_plan(folder / "medium", args.batches)
            network, real = stand_in(args.step_seconds), Header.of("hunyuan-t2v", "0" * 64, args.steps)
            results.append(measure("stand-in", network, plan, 1, real, folder, args.repeats))
        if "bytes" in args.only:
            plan = make_plan(folder / "bytes", 64)
            results.append(measure_bytes(teacher, plan, Header.of("tiny", "0" * 64, 5), folder))
    for result in results:
        if result["part"] == "bytes":
            print(f"bytes: {result['bytes']:,} on disk for {result['information']:,} of information: {result['ratio']:.4f}")
        else:
            low, high = result["interval"]
            print(
                f"{result['part']}: {result['plain_seconds']:.3f} s plain, {result['capture_seconds']:.3f} s captured, overhead "
                f"{result['overhead']:.2%} (95 %: {low:.2%} to {high:.2%}), "
                f"{result['extra_seconds_a_trajectory'] * 1000:.1f} ms a trajectory"
            )
            step = REAL_STEP if result["part"] == "stand-in" else result["plain_seconds"] / result["trajectories"] / args.steps
            shares = [result["extra_seconds_a_trajectory"], *result["extra_interval"]]
            result["of_real_trajectory"] = [share / (REAL_STEPS * step) for share in shares]
            typical, low, high = result["of_real_trajectory"]
            print(f"  of a trajectory of {REAL_STEPS} steps of {step:.4g} s: {typical:.2%} ({low:.2%} to {high:.2%})")
            result["holds"] = high <= OVERHEAD_TARGET
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if args.json is not None:
        settings = {"repeats": args.repeats, "steps": args.steps, "step_seconds": args.step_seconds, **machine}
        args.json.write_text(json.dumps({**settings, "torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
