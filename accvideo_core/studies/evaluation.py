"""`accvideo evaluate`: generate a plan's clips and let the oracle say how many show what their prompts ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..devices import pick_device
from ..errors import AccVideoError, InvalidValueError
from ..files import atomic_path, check_writable
from ..tiny import oracle
from ..tiny.clips import CLASSES
from ..tiny.pipeline import DTYPES, TinyPipeline
from ..tiny.text import tokenize


@dataclass(frozen=True)
class EvaluateArgs:
    """Judge the bundled student (or teacher) on a plan of prompts and seeds."""

    plan: Path
    """JSON lines with "prompt", "seed" and, as {"colour": "red", ...}, the attributes "named" in the prompt."""
    teacher: bool = False
    """Judge the teacher (50 steps by default) instead of the student."""
    steps: int | None = None
    """Sampling steps; default 5 for the student, 50 for the teacher."""
    shift: float | None = None
    """Time shift of the schedule; default 7."""
    frames_out: Path | None = None
    """Also keep the clips: an .npz with `frames`, uint8 (N, 17, 64, 64, 3), row i answering row i of the plan."""
    limit: int | None = None
    """Only the first so many rows."""
    batch: int = 50
    """Clips generated at once."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Row:
    prompt: str
    seed: int
    named: dict[str, str]


def run(args: EvaluateArgs) -> int:
    """Print the score; exit code 0 whatever it is."""
    for name, value in (("batch", args.batch), ("limit", args.limit)):
        if value is not None and value < 1:
            raise InvalidValueError(f"{name} is {value}; it must be at least 1")
    rows = read_plan(args.plan)[: args.limit]
    if args.frames_out:
        check_writable(args.frames_out)
    pipeline = TinyPipeline.load("teacher" if args.teacher else "student", pick_device(args.device), DTYPES[args.dtype])
    parts = []
    for start in tqdm(range(0, len(rows), args.batch), desc="clips", unit="batch", disable=args.json, leave=False):
        chunk = rows[start : start + args.batch]
        made = pipeline.generate([r.prompt for r in chunk], [r.seed for r in chunk], args.steps, args.shift)
        parts.append(made.frames)
    frames = np.concatenate(parts)
    if args.frames_out:
        with atomic_path(args.frames_out) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, frames=frames)
    result = {
        "model": f"tiny-{pipeline.which}",
        "steps": pipeline.default_steps if args.steps is None else args.steps,
        "dtype": args.dtype,
        **score(frames, rows),
    }
    print(json.dumps(result, indent=1) if args.json else as_table(result))
    return 0


def read_plan(path: Path) -> list[Row]:
    """Rows of a plan file; AccVideoError names the file and line that cannot be used."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AccVideoError(f"cannot read the plan {str(path)!r} ({error}); give a file of JSON lines") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            expected = '{"prompt": "a red ball", "seed": 7, "named": {"colour": "red", "shape": "circle"}}'
            raise AccVideoError(f"{path}, line {number}: {error}; a row looks like {expected}") from error
    if not rows:
        raise AccVideoError(f"the plan {str(path)!r} has no rows; give a file of JSON lines")
    return rows


def _row(value: Any) -> Row:
    """A checked row, so that hours of generating never end at a bad one; ValueError says what is wrong with it."""
    prompt, seed, named = value["prompt"], value["seed"], value.get("named") or {}
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt is {prompt!r}, not a text")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise ValueError(f"the seed is {seed!r}, not a whole number from 0 to 2**64 - 1")
    for kind, name in named.items():
        if name not in CLASSES.get(kind, ()):
            raise ValueError(f"no {kind} {name!r}; attributes are {json.dumps(CLASSES)}")
    tokenize(prompt)
    return Row(prompt, seed, dict(named))


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    p, d = successes / trials, 1 + z * z / trials
    half = z * math.sqrt(p * (1 - p) / trials + z * z / 4 / trials**2) / d
    centre = (p + z * z / 2 / trials) / d
    return centre - half, centre + half


def score(frames: NDArray[np.uint8], rows: Sequence[Row]) -> dict[str, Any]:
    """Right: every attribute clean and every named one as named. Valid: every attribute clean. Per attribute: how often
    a named one is right, how often it is clean, and how far open ones are from uniform (total variation)."""
    reads = [oracle.read(clip) for clip in frames]
    valid = [all(v.clean for v in r.values()) for r in reads]
    right = [ok and all(r[k].name == n for k, n in row.named.items()) for ok, r, row in zip(valid, reads, rows, strict=True)]
    result: dict[str, Any] = {
        "clips": len(reads),
        "right": float(np.mean(right)),
        "right_95": [round(x, 4) for x in wilson(sum(right), len(right))],
        "valid": float(np.mean(valid)),
    }
    for kind, classes in CLASSES.items():
        named = [r[kind].name == row.named[kind] for r, row in zip(reads, rows, strict=True) if kind in row.named]
        free = [r[kind].name for r, row in zip(reads, rows, strict=True) if kind not in row.named]
        share = np.array([free.count(c) for c in classes]) / max(len(free), 1)
        result[kind] = {
            "named_right": float(np.mean(named)) if named else None,
            "clean": float(np.mean([r[kind].clean for r in reads])),
            "open_tv_to_uniform": float(np.abs(share - 1 / len(classes)).sum() / 2) if free else None,
        }
    return result


def as_table(result: dict[str, Any]) -> str:
    """The score for people."""

    def share(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:5.1f}%"

    low, high = result["right_95"]
    lines = [
        f"{result['model']}, {result['steps']} steps, {result['dtype']}, {result['clips']} clips",
        f"right {share(result['right'])} (95 %: {share(low)} to {share(high)}), valid {share(result['valid'])}",
        f"{'attribute':<12}{'named right':>12}{'clean':>8}{'open: TV to uniform':>22}",
    ]
    for kind in CLASSES:
        row = result[kind]
        free = "-" if row["open_tv_to_uniform"] is None else f"{row['open_tv_to_uniform']:.3f}"
        lines.append(f"{kind:<12}{share(row['named_right']):>12}{share(row['clean']):>8}{free:>22}")
    return "\n".join(lines)
