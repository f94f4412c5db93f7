"""`accvideo inspect`: a weight file of any kind, handed to the wing that knows it: a whole network, or a LoRA."""

from __future__ import annotations

import json as json_module
from typing import Any

from .checkpoint import holds_lora
from .checkpoint.inspect import InspectArgs
from .checkpoint.inspect import run as inspect_checkpoint
from .errors import InvalidValueError

__all__ = ["InspectArgs", "run"]


def run(args: InspectArgs) -> int:
    """Print the report on `args.file`; 0 if nothing is wrong, 1 otherwise. Errors as reading the file raises them."""
    if not holds_lora(args.file):
        return inspect_checkpoint(args)
    from .lora import describe

    if args.step or args.self_check:
        raise InvalidValueError(f"{args.file} is a LoRA; --self-check and --step are for whole networks")
    report = describe(args.file)
    print(json_module.dumps(report, indent=2) if args.json else _as_text(report))
    return 1 if report["problems"] else 0


def _as_text(report: dict[str, Any]) -> str:
    lines = []
    for name, value in report.items():
        if name == "problems" or value in ({}, []):
            continue
        shown = ", ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        lines.append(f"{name:<15} {shown if len(shown) <= 400 else f'{shown[:400]}... ({len(value)} in all)'}")
    lines += [f"PROBLEM         {problem}" for problem in report["problems"]] or ["ok              nothing wrong found"]
    return "\n".join(lines)
