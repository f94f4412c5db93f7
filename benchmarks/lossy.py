"""What each lossy mode costs in quality, on the tiny world: clips that are right, and the error of the clean latents.

    python benchmarks/lossy.py --plan heldout.jsonl [--rows 300] [--json docs/benchmarks/lossy.json]

The same prompts and noise in float32, which is the reference, in bfloat16, and with the blocks' linear layers in fp8; every lossy
attention kernel that runs on the device, too. A clip is right if the oracle reads from it what its prompt names, all of it clean.
The plan is JSON lines with "prompt", "seed" and "named" (`accvideo tiny prompts` writes one).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.devices import pick_device
from accvideo_core.dit.attention import KERNELS, usable
from accvideo_core.dit.fp8 import multiplies_fp8, set_linears
from accvideo_core.studies.exam import read_clips, read_plan, rights, wilson
from accvideo_core.tiny import Which
from accvideo_core.tiny.pipeline import TinyPipeline


@dataclass
class Args:
    """Judge every lossy mode beside exact arithmetic."""

    plan: Path
    """JSON lines with "prompt", "seed" and what is "named"."""
    rows: int = 300
    """The plan's first so many rows."""
    models: tuple[Which, ...] = ("teacher", "student")
    """teacher (50 steps), student (5 steps)."""
    batch: int = 50
    """Clips generated at once."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    json: Path | None = None
    """Also write the results here."""


@dataclass(frozen=True)
class Mode:
    """A way to compute."""

    name: str
    dtype: torch.dtype = torch.float32
    linears: str = "exact"
    attention: str = "sdpa"


def modes(device: torch.device) -> list[Mode]:
    """The reference first."""
    found = [
        Mode("exact, float32"),
        Mode("exact, bfloat16", torch.bfloat16),
        Mode("fp8 linears, bfloat16", torch.bfloat16, linears="fp8"),
    ]
    can = usable(device, torch.bfloat16)
    found += [
        Mode(f"{k}, bfloat16", torch.bfloat16, attention=k) for k in KERNELS if KERNELS[k].lossy and not can[k].startswith("no")
    ]
    return found


def sample(args: Args, which: Which, mode: Mode, rows: Sequence[Any], device: torch.device) -> tuple[np.ndarray, torch.Tensor]:
    """(whether each clip is right, clean latents)."""
    pipeline = TinyPipeline.load(which, device, mode.dtype)
    pipeline.network.attention_kernel = mode.attention
    set_linears(pipeline.network, mode.linears)  # type: ignore[arg-type]
    right, latents = [], []
    for start in range(0, len(rows), args.batch):
        part = rows[start : start + args.batch]
        made = pipeline.generate([row.prompt for row in part], [row.seed for row in part])
        right.append(np.array(rights(read_clips(made.frames), part)))
        latents.append(made.latents.float().cpu())
    return np.concatenate(right), torch.cat(latents)


def main(args: Args) -> int:
    device, rows = pick_device(args.device), read_plan(args.plan)[: args.rows]
    found = []
    for which in args.models:
        reference: tuple[np.ndarray, torch.Tensor] | None = None
        for mode in modes(device):
            right, latents = sample(args, which, mode, rows, device)
            row: dict[str, Any] = {"mode": mode.name, "model": which, "clips": len(rows), "right": float(right.mean())}
            row["right_95"] = wilson(int(right.sum()), len(right))
            row["difference_95"] = None
            row["latent_error"] = 0.0
            if reference is None:
                reference = right, latents
            else:
                difference = right.astype(float) - reference[0]
                spread = 1.96 * difference.std() / math.sqrt(len(difference))
                row["difference_95"] = [difference.mean() - spread, difference.mean() + spread]
                row["latent_error"] = float((latents - reference[1]).norm() / reference[1].norm())
            found.append(row)
            print({name: value for name, value in row.items() if name != "clips"}, flush=True)
    emulated = (
        "" if multiplies_fp8(device) else "Products of fp8 numbers were computed in float32: the error is theirs, not the speed. "
    )
    absent = [k for k in KERNELS if KERNELS[k].lossy and usable(device, torch.bfloat16)[k].startswith("no")]
    note = emulated + (f"Not run on this device ({device.type}): {', '.join(absent)}." if absent else "")
    if args.json is not None:
        made = {"device": str(device), "torch": torch.__version__, "note": note.strip(), "rows": found}
        args.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
