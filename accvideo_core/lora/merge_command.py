"""`accvideo merge-lora`: its arguments and what it prints. Beside `merge.py`, so that importing that brings no command line
along.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..progress import byte_progress
from .merge import merge_lora, parse_lora_use
from .storage import DTYPES


@dataclass(frozen=True)
class MergeArgs:
    """Write a checkpoint with LoRAs merged into it."""

    base: tyro.conf.Positional[Path]
    """The model, in any layout `accvideo inspect` reads."""
    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-l"], metavar="PATH[:STRENGTH[:BLOCKS]]")]
    """A LoRA, its strength (default 1) and its blocks, for example style.safetensors:0.8:double.0-9,single=0.5; may be
    repeated."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The file to write."""
    dtype: Literal["keep", "bf16", "fp16", "fp32", "fp8_e4m3fn", "scaled_fp8"] = "keep"
    """What the values are stored as; keep leaves every tensor its own. Both kinds of fp8 are for the weights of Linears:
    fp8_e4m3fn rounds what changed by chance, scaled_fp8 gives each a scale."""
    weights: str | None = None
    """Which network of a base .pt file that holds several: module (the default), ema, ..."""
    allow_unmatched: bool = False
    """Leave out what belongs to no tensor of the base, or to one of another shape, instead of refusing."""
    overwrite: bool = False
    """Replace the file if it exists."""
    json: bool = False
    """Print JSON instead of text."""


def run(args: MergeArgs) -> int:
    """Merge and print the report; 0 when written."""
    uses = [parse_lora_use(text) for text in args.lora]
    with byte_progress("merge") as advance:
        report = merge_lora(
            args.base,
            uses,
            args.out,
            dtype=DTYPES[args.dtype],
            weights=args.weights,
            overwrite=args.overwrite,
            allow_unmatched=args.allow_unmatched,
            progress=advance,
        )
    if args.json:
        loras = [
            {"file": str(use.path), "strength": use.strength, "blocks": use.blocks.text, "tensors": n}
            for use, n in report.applied
        ]
        said = {"path": str(report.path), "tensors": report.tensors, "changed": report.changed, "bytes": report.bytes}
        print(json.dumps({**said, "loras": loras, "left_out": dict(report.left_out)}, indent=2))
        return 0
    for use, count in report.applied:
        print(f"{use.path}: {count} tensors, strength {use.strength:g}, blocks {use.blocks.text}")
    for name, reason in report.left_out.items():
        print(f"left out    {name}: {reason}")
    print(f"{report.path}: {report.changed} of {report.tensors} tensors changed, {report.bytes / 1e9:,.2f} GB")
    return 0
