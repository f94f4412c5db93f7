"""`accvideo extract-lora`: its arguments and what it prints. Beside `extract.py`, so that importing that brings no command line
along.
"""

from __future__ import annotations

import json as json_module
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..progress import byte_progress
from .blocks import parse_blocks
from .extract import DTYPES, extract_lora


@dataclass(frozen=True)
class ExtractArgs:
    """Write the difference of two checkpoints as a LoRA."""

    tuned: tyro.conf.Positional[Path]
    """The model that the LoRA shall give, in any layout `accvideo inspect` reads."""
    base: tyro.conf.Positional[Path]
    """The model that the LoRA will be applied to."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The file to write."""
    rank: Annotated[int, tyro.conf.arg(aliases=["-r"])] = 32
    """Rank of every pair, or the largest with --energy."""
    energy: float | None = None
    """Choose each rank: as many as hold this share (0 to 1) of a difference's squared norm, up to --rank."""
    format: Literal["comfyui", "kohya", "peft"] = "comfyui"
    """How the keys are named: comfyui loads everywhere in ComfyUI, kohya as musubi-tuner writes them, peft for diffusers."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """What the values are stored as."""
    blocks: str = "all"
    """Only these blocks, for example double.0-9,single."""
    weights: str | None = None
    """Which network of a tuned .pt file that holds several: module (the default), ema, ..."""
    base_weights: str | None = None
    """The same of the base."""
    lossy: bool = False
    """Leave out differences that the format has no place for (PEFT: norms) instead of refusing."""
    overwrite: bool = False
    """Replace the file if it exists."""
    modules: bool = False
    """Print every tensor's rank and residual, not only the ten worst."""
    json: bool = False
    """Print JSON instead of text."""


def run(args: ExtractArgs) -> int:
    """Extract and print the report; 0 when written."""
    with byte_progress("extract") as advance:
        report = extract_lora(
            args.tuned,
            args.base,
            args.out,
            args.rank,
            energy=args.energy,
            key_format=args.format,
            dtype=DTYPES[args.dtype],
            blocks=None if args.blocks == "all" else parse_blocks(args.blocks),
            weights=args.weights,
            base_weights=args.base_weights,
            lossy=args.lossy,
            overwrite=args.overwrite,
            progress=advance,
        )
    if args.json:
        print(json_module.dumps(asdict(report) | {"path": str(report.path)}, indent=2))
        return 0
    worst = sorted(report.modules, key=lambda module: -module.residual)
    for module in report.modules if args.modules else worst[:10]:
        kind = "difference" if module.rank is None else f"rank {module.rank}"
        print(f"{module.tensor}: {kind}, misses {module.residual:.2%} of a difference of {module.difference:.2%}")
    for tensor in report.left_out:
        print(f"left out    {tensor}")
    print(
        f"{report.path}: {len(report.modules)} tensors, {report.unchanged} unchanged, {report.bytes / 1e6:,.1f} MB, "
        f"misses {report.residual:.2%} of the difference"
    )
    return 0
