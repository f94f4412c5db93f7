"""The exam of the tiny world: a plan of prompts and seeds, and how many clips show, to the oracle, what their prompts ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import AccVideoError
from ..json_lines import read_json_lines
from ..tiny import oracle
from ..tiny.clips import CLASSES
from ..tiny.text import tokenize

Reads = list[dict[str, oracle.Verdict]]


@dataclass(frozen=True)
class Row:
    prompt: str
    seed: int
    named: dict[str, str]


def read_plan(path: Path) -> list[Row]:
    """Rows of a plan file; AccVideoError names the file and line that cannot be used."""
    expected = 'a row looks like {"prompt": "a red ball", "seed": 7, "named": {"colour": "red", "shape": "circle"}}'
    rows = read_json_lines(path, _row, "the plan", expected)
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


def read_clips(frames: NDArray[np.uint8]) -> Reads:
    """The oracle's verdicts on clips (N, T, H, W, 3)."""
    return [oracle.read(clip) for clip in frames]


def rights(reads: Reads, rows: Sequence[Row]) -> list[bool]:
    """Per clip: every attribute clean and every named one as named."""
    return [
        all(verdict.clean and verdict.name == row.named.get(kind, verdict.name) for kind, verdict in read.items())
        for read, row in zip(reads, rows, strict=True)
    ]


def score(frames: NDArray[np.uint8], rows: Sequence[Row]) -> dict[str, Any]:
    """`score_reads` of clips (N, T, H, W, 3)."""
    return score_reads(read_clips(frames), rows)


def score_reads(reads: Reads, rows: Sequence[Row]) -> dict[str, Any]:
    """Right: every attribute clean and every named one as named. Valid: every attribute clean. Per attribute: how often
    a named one is right, how often it is clean, and how far open ones are from uniform (total variation). Shares come with
    Wilson's 95 % interval, those of the attributes under "intervals_95"."""
    right, valid = rights(reads, rows), [all(v.clean for v in r.values()) for r in reads]
    result: dict[str, Any] = {
        "clips": len(reads),
        "right": float(np.mean(right)),
        "right_95": _interval(right),
        "valid": float(np.mean(valid)),
        "valid_95": _interval(valid),
        "intervals_95": {},
    }
    for kind, classes in CLASSES.items():
        named = [r[kind].name == row.named[kind] for r, row in zip(reads, rows, strict=True) if kind in row.named]
        clean = [r[kind].clean for r in reads]
        free = [r[kind].name for r, row in zip(reads, rows, strict=True) if kind not in row.named]
        share = np.array([free.count(c) for c in classes]) / max(len(free), 1)
        result[kind] = {
            "named_right": float(np.mean(named)) if named else None,
            "clean": float(np.mean(clean)),
            "open_tv_to_uniform": float(np.abs(share - 1 / len(classes)).sum() / 2) if free else None,
        }
        result["intervals_95"][kind] = {"named_right": _interval(named), "clean": _interval(clean)}
    return result


def _interval(marks: Sequence[bool]) -> list[float]:
    return [round(x, 4) for x in wilson(sum(marks), len(marks))]
