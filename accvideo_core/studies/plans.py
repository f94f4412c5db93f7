"""`accvideo tiny prompts`: prompts of the tiny world with seeds and what they name, to capture from and to judge by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..errors import InvalidValueError
from ..files import atomic_path, check_writable
from ..tiny.clips import keyed_generator, sample_scenes
from ..tiny.prompts import open_some, write_prompt
from .exam import Row


@dataclass(frozen=True)
class PlanArgs:
    """Write prompts of the tiny world, each with a seed and the attributes it names (none to all four), as JSON lines.

    The file serves `accvideo encode`, to capture trajectories, and `accvideo evaluate --plan`, to judge a model; take another
    --seed for each of the two."""

    count: tyro.conf.Positional[int]
    """How many."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The file to write, ending in .jsonl; nothing that is there is overwritten."""
    seed: int = 0
    """Another number gives other prompts."""


def drawn_plan(count: int, seed: int = 0) -> list[Row]:
    """`count` prompts; the first ones are the same whatever the count."""
    rows = []
    for number in range(count):
        generator = keyed_generator("plan", seed, number)
        named = open_some(sample_scenes(1, generator).names(0), generator)
        rows.append(Row(write_prompt(named, generator), int(torch.randint(2**53, (), generator=generator)), named))
    return rows


def run(args: PlanArgs) -> int:
    if args.count < 1:
        raise InvalidValueError(f"the count is {args.count}; ask for 1 prompt or more")
    if args.out.suffix != ".jsonl":
        raise InvalidValueError(f"{str(args.out)!r} must end in .jsonl: a line says more than the prompt")
    check_writable(args.out)
    if args.out.exists():
        raise InvalidValueError(f"{str(args.out)!r} is there already; name another file, or delete it")
    with atomic_path(args.out) as path:
        path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in drawn_plan(args.count, args.seed)), encoding="utf-8")
    print(args.out)
    return 0
