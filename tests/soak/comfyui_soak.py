"""A ComfyUI that works for hours: hundreds of prompts over HTTP without a restart, some interrupted at a random moment.

`python -m tests.soak.comfyui_soak [--count 500] [--interrupts 30] [--checkout NAME]` does it on every ComfyUI found, or on the
one whose folder has that name, and prints for each what failed, how many prompts a minute it made and what memory it holds.
Exit code 1 unless every prompt made its files, every interrupt was obeyed, and memory stayed flat.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from accvideo_core.comfy_client import ComfyClient, ComfyError, ComfyInterrupted
from accvideo_core.tiny import weights_folder
from accvideo_core.tiny.clips import keyed_generator, sample_scenes
from accvideo_core.tiny.prompts import write_prompt
from tests.comfyui.prompts import applying, capturing, put_lora, stacked
from tests.comfyui.server import ROOT, Server, load_prompt, node, tiny_prompt
from tests.comfyui.setup_envs import find_checkouts, prepare

WARM = 100  # prompts until every kind has run and ComfyUI's own caches are full
WINDOW = 40  # prompts whose median tells what memory is held: a single reading depends on what has just run
FLAT = 0.03  # the largest such median over the smallest, after WARM


@dataclass
class Args:
    """Queue prompts on a ComfyUI and watch its memory."""

    count: int = 500
    """Prompts."""

    interrupts: int = 30
    """How many of them are interrupted while they run."""

    seed: int = 0
    """Of what is asked for and when it is interrupted."""

    checkout: str | None = None
    """Folder name of one ComfyUI; all that are found by default."""

    json: Path | None = None
    """Write the reports here, with the memory after each prompt."""


@dataclass
class Report:
    """What became of the prompts; `resident` is the server's memory in bytes after each."""

    prompts: int = 0
    interrupted: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    resident: list[int] = field(default_factory=list)

    def spread(self) -> float | None:
        """Largest over smallest median of WINDOW readings after WARM, less 1; None where there are not two."""
        later = self.resident[WARM:]
        medians = [statistics.median(later[at : at + WINDOW]) for at in range(0, len(later) - WINDOW + 1, WINDOW)]
        return max(medians) / min(medians) - 1 if len(medians) > 1 else None

    def trend(self) -> float | None:
        """How far a straight line through the readings after WARM climbs, as a share of their mean; None where there are not two.
        A leak climbs, a cache that comes and goes does not."""
        later = self.resident[WARM:]
        if len(later) < 2:
            return None
        slope, _ = statistics.linear_regression(range(len(later)), later)
        return slope * len(later) / statistics.fmean(later)

    def told(self) -> dict[str, Any]:
        told = asdict(self) | {"prompts_a_minute": round(60 * self.prompts / self.seconds, 1)}
        told |= {"memory_spread": self.spread(), "memory_trend": self.trend()}
        at = [0, WARM, len(self.resident) - 1]
        return told | {"resident": {i: f"{self.resident[i] / 1e6:,.0f} MB" for i in at if i < len(self.resident)}}


def resident(server: Server) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def wanted(number: int, lora: str, seed: int) -> dict[str, Any]:
    """The prompt of that number: mostly the student's five steps, and of everything else the pack does a little."""
    kinds = {2: "teacher", 3: "size", 4: "lora", 6: "compare", 7: "capture", 8: "custom"}
    kind = kinds.get(number % 10, "student")
    if kind == "lora":
        prompt = applying(stacked(lora, 0.5))
    elif kind == "compare":
        prompt = load_prompt(ROOT / "workflows" / "api" / "accvideo_tiny_compare.json")
    elif kind == "capture":
        return capturing("soak", {"seed": number})
    else:
        prompt = tiny_prompt()
    if kind == "teacher":
        prompt["1"]["inputs"]["which"], prompt["4"]["inputs"]["steps"] = "teacher", 20
    if kind == "size":
        prompt["3"]["inputs"] |= {"width": 80, "height": 64, "length": 5 + 4 * (number % 7)}
    if kind == "custom":
        prompt |= {
            "sigmas": node("AccVideoSigmas", family="tiny"),
            "guider": node("BasicGuider", model=["1", 0], conditioning=["2", 0]),
            "noise": node("RandomNoise", noise_seed=number),
            "euler": node("KSamplerSelect", sampler_name="euler"),
        }
        links = {"noise": "noise", "guider": "guider", "sampler": "euler", "sigmas": "sigmas", "latent_image": "3"}
        prompt["4"] = node("SamplerCustomAdvanced", **{name: [source, 0] for name, source in links.items()})
    generator = keyed_generator(seed, "soak", number)
    words = write_prompt(sample_scenes(1, generator).names(0), generator)
    for content in prompt.values():
        content["inputs"] |= {name: number for name in ("seed", "noise_seed") if name in content["inputs"]}
        content["inputs"] |= {"text": words} if content["class_type"] == "CLIPTextEncode" else {}
    return prompt


def slow(number: int) -> dict[str, Any]:
    """A prompt that takes long enough to be interrupted at any moment of it."""
    prompt = tiny_prompt(seed=number, steps=50)
    prompt["1"]["inputs"]["which"] = "teacher"
    prompt["3"]["inputs"]["batch_size"] = 2
    return prompt


async def _interrupt(comfy: ComfyClient, prompt: dict[str, Any], share: float) -> bool:
    """Run it, and stop it after that share of its steps; whether it was stopped."""
    reached = asyncio.Event()
    run = asyncio.create_task(comfy.run(prompt, on_progress=lambda it: it.value >= share * it.total and reached.set()))
    moment = asyncio.create_task(reached.wait())
    await asyncio.wait([run, moment], return_when=asyncio.FIRST_COMPLETED)
    moment.cancel()
    await comfy.interrupt()
    try:
        await run
    except ComfyInterrupted:
        return True
    return False


def soak(server: Server, count: int, interrupts: int, seed: int = 0, tell: Callable[[Report], object] = lambda _: None) -> Report:
    """Queue `count` prompts one after another, `interrupts` of them stopped; `tell` is called after each. The last is never
    stopped, so that after every interrupt some prompt shows that the server still works."""
    chance = random.Random(seed)
    stopped = set(chance.sample(range(count - 1), interrupts))
    lora = put_lora(server, weights_folder(), name="soak")
    report = Report()

    async def go() -> None:
        async with ComfyClient(server.url) as comfy:
            for number in range(count):
                try:
                    if number in stopped:
                        if await _interrupt(comfy, slow(number), chance.uniform(0, 0.9)):
                            report.interrupted += 1
                        else:
                            report.failed.append(f"prompt {number}: the interrupt was not obeyed")
                    else:
                        prompt = wanted(number, lora, seed)
                        result = await comfy.run(prompt)
                        if not result.files and not any("writer" in node for node in result.texts):
                            report.failed.append(f"prompt {number}: it made nothing")
                except ComfyError as error:
                    report.failed.append(f"prompt {number}: {error}")
                report.prompts += 1
                report.resident.append(resident(server))
                tell(report)

    begin = time.monotonic()
    asyncio.run(go())
    report.seconds = time.monotonic() - begin
    return report


def main(args: Args) -> int:
    checkouts = [path for path in find_checkouts() if args.checkout in (None, path.name)]
    fault = not checkouts
    reports = {}
    for checkout in checkouts:
        with tempfile.TemporaryDirectory() as base:
            server = Server(checkout, prepare(checkout), Path(base) / "comfyui", weights_folder())

            def tell(report: Report, name: str = checkout.name) -> None:
                if report.prompts % WINDOW == 0:
                    held = statistics.median(report.resident[-WINDOW:]) / 1e6
                    print(f"{name}: {report.prompts} prompts, {held:,.0f} MB, {len(report.failed)} failed", flush=True)

            try:
                server.wait_until_ready()
                report = soak(server, args.count, args.interrupts, args.seed, tell)
            finally:
                server.stop()
        print(json.dumps({"comfyui": checkout.name, **report.told()}), flush=True)
        reports[checkout.name] = report.told() | {"resident": report.resident}
        spread = report.spread()
        fault |= bool(report.failed) or report.interrupted != args.interrupts or (spread is not None and spread > FLAT)
    if args.json:
        args.json.write_text(json.dumps(reports) + "\n", encoding="utf-8")
    return int(fault)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
