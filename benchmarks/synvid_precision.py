"""What storing key latents in 16 bits does to the segment velocities a student is trained on.

    python benchmarks/synvid_precision.py --count 16 --json docs/benchmarks/synvid_precision.json

Trajectories of the bundled teacher, 50 Euler steps. For each segment the velocity is rebuilt from stored keys and compared with
the float32 one: relative rms over all samples. The noise (key 5) is made from its seed and exact.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.sampling import euler_flow, make_noise
from accvideo_core.schedule import PRESETS, flow_sigmas, key_indices
from accvideo_core.tiny.pipeline import TinyPipeline

GOAL = 0.01
PROMPTS = ("a red circle moving right on a black background", "a blue square moving down", "a shape", "a ball moving left")
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}


def trajectories(count: int) -> tuple[list[Tensor], list[float]]:
    """(key 0 .. m, each (count, C, T, H, W) float32; their sigmas) of the bundled teacher."""
    preset, pipeline = PRESETS["tiny"], TinyPipeline.load("teacher")
    sigmas = flow_sigmas(preset.teacher_steps, preset.shift)
    noise = make_noise((count, 16, 5, 8, 8), range(count))
    latents = {0: noise}
    velocity = pipeline.velocity(pipeline.condition([PROMPTS[i % len(PROMPTS)] for i in range(count)]))
    with torch.inference_mode():
        euler_flow(velocity, noise, sigmas, [lambda step: latents.__setitem__(step.index + 1, step.latent)])
    assert preset.keys is not None
    positions = key_indices(preset.teacher_steps, preset.keys)[::-1]
    return [latents[position] for position in positions], [float(sigmas[position]) for position in positions]


def velocity_error(keys: list[Tensor], segment: int, dtype: torch.dtype) -> float:
    """Relative rms error of a segment's velocity when its ends are stored in `dtype`; the last key, the noise, is exact."""
    exact = keys[segment].double() - keys[segment + 1].double()
    noisy = keys[segment + 1] if segment + 1 == len(keys) - 1 else keys[segment + 1].to(dtype)
    found = keys[segment].to(dtype).double() - noisy.double()
    return float((found - exact).norm() / exact.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="trajectories")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keys, sigmas = trajectories(args.count)
    rows = []
    print("| Segment | Sigma | fp16 | bf16 |\n|---|---|--:|--:|")
    for segment in reversed(range(len(keys) - 1)):
        errors = {name: velocity_error(keys, segment, dtype) for name, dtype in STORED.items()}
        rows.append({"segment": segment, "from": sigmas[segment + 1], "to": sigmas[segment], **errors})
        told = f"{sigmas[segment + 1]:.4f} to {sigmas[segment]:.4f}"
        print(f"| {segment} | {told} | {errors['fp16']:.3%} | {errors['bf16']:.3%} |")
    if args.json:
        args.json.write_text(json.dumps({"count": args.count, "torch": torch.__version__, "segments": rows}, indent=1) + "\n")
    return 0 if all(row["fp16"] <= GOAL for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
