"""The exam through ComfyUI: the same prompts and seeds by the nodes of a real server and by the library, and both scores.

    python benchmarks/comfyui_exam.py --plan heldout.jsonl [--rows 100] [--json docs/benchmarks/comfyui_exam.json]

Every ComfyUI that the tests find is started on the CPU and runs the shipped API workflow, one prompt at a time, with the
teacher in 50 steps and the student in 5. "Same verdict" is the share of clips of which the oracle reads the same; pixels
differ by one where ComfyUI's SaveImage cuts off what the library rounds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.comfy_client import ComfyClient
from accvideo_core.studies.evaluation import Row, read_plan, score
from accvideo_core.tiny import Which, oracle, weights_folder
from accvideo_core.tiny.pipeline import TinyPipeline
from tests.comfyui.server import Server, node, tiny_prompt
from tests.comfyui.setup_envs import find_checkouts, prepare


@dataclass
class Args:
    """Score the tiny models through every ComfyUI found, beside the library."""

    plan: Path
    """JSON lines of prompts, seeds and named attributes, as `accvideo evaluate` takes them."""
    rows: int = 100
    """The first so many rows."""
    models: tuple[Which, ...] = ("teacher", "student")
    """Which; what the JSON says of the same rows by the other stays."""
    json: Path | None = None
    """Also write the results here."""


def by_library(which: Which, rows: Sequence[Row]) -> NDArray[np.uint8]:
    pipeline = TinyPipeline.load(which)
    return np.concatenate([pipeline.generate([r.prompt], [r.seed]).frames for r in tqdm(rows, f"{which}, library", leave=False)])


async def by_server(server: Server, which: Which, rows: Sequence[Row]) -> NDArray[np.uint8]:
    clips = []
    async with ComfyClient(server.url) as comfy:
        for row in tqdm(rows, f"{which}, {server.checkout.name}", leave=False):
            prompt = tiny_prompt(seed=row.seed, steps=50 if which == "teacher" else 5)
            prompt["1"]["inputs"]["which"], prompt["2"]["inputs"]["text"] = which, row.prompt
            del prompt["6"], prompt["7"]
            prompt["8"] = node("SaveImage", images=["5", 0], filename_prefix="exam/clip")
            files = sorted(server.path(file) for file in (await comfy.run(prompt)).files)
            clips.append(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
            for file in files:
                file.unlink()
    return np.stack(clips)


def compare(made: NDArray[np.uint8], reference: NDArray[np.uint8], rows: Sequence[Row]) -> dict[str, Any]:
    same = [oracle.read(a) == oracle.read(b) for a, b in zip(made, reference, strict=True)]
    off = np.abs(made.astype(int) - reference.astype(int))
    return {
        **score(made, rows),
        "same_verdict": float(np.mean(same)),
        "mean_difference": float(off.mean()),
        "most": int(off.max()),
    }


def line(which: str, where: str, result: dict[str, Any]) -> str:
    low, high = result["right_95"]
    text = f"{which:<9}{where:<28}right {result['right']:6.1%} ({low:.1%} to {high:.1%})"
    if "most" in result:
        text += f"   same verdict {result['same_verdict']:6.1%}"
        text += f", pixels off by {result['mean_difference']:.4f}, at most {result['most']}"
    return text


def main() -> int:
    args = tyro.cli(Args)
    rows = read_plan(args.plan)[: args.rows]
    kinds = args.models
    library = {which: by_library(which, rows) for which in kinds}
    results: dict[str, Any] = {"library": {which: score(frames, rows) for which, frames in library.items()}}
    for which in kinds:
        print(line(which, "library", results["library"][which]), flush=True)
    for checkout in find_checkouts():
        with tempfile.TemporaryDirectory() as base:
            server = Server(checkout, prepare(checkout), Path(base), weights_folder())
            try:
                server.wait_until_ready()
                results[checkout.name] = {
                    which: compare(asyncio.run(by_server(server, which, rows)), library[which], rows) for which in kinds
                }
            finally:
                server.stop()
        for which in kinds:
            print(line(which, checkout.name, results[checkout.name][which]), flush=True)
    if args.json:
        known = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        if known.get("rows") == len(rows):
            results = {where: known.get(where, {}) | result for where, result in results.items()}
        args.json.write_text(json.dumps({"rows": len(rows), **results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
