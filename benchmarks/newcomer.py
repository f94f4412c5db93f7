"""A newcomer's path, timed: from a ComfyUI that has never run, with the pack in its custom_nodes, to the first video on the page.

    python benchmarks/newcomer.py [--json newcomer.json]

Every ComfyUI that the tests find is started on the CPU with a fresh base folder and opened in headless Chromium
(ACCVIDEO_CHROMIUM, or one on the path). Then what a person would do: drop workflows/accvideo_tiny_t2v.json onto the canvas,
click Run, and wait until the video plays. Times are of one run; other programs on the machine lengthen them.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.tiny import weights_folder
from tests.comfyui.server import ROOT, Server
from tests.comfyui.setup_envs import find_checkouts, prepare
from tests.comfyui.test_browser import DROP, READY

WORKFLOW = ROOT / "workflows" / "accvideo_tiny_t2v.json"
PLAYS = "[...document.querySelectorAll('video')].some((it) => it.readyState >= 2 && it.videoWidth > 0)"
MINUTES = 10 * 60_000  # milliseconds each step may take


@dataclass
class Args:
    """Time a newcomer's first video in every ComfyUI found."""

    json: Path | None = None
    """Also write the results here."""


def first_video(server: Server, chromium: str, begun: float) -> dict[str, Any]:
    """Seconds of each step, from `begun` (the start of ComfyUI) on, and how often a person clicked or dropped something."""
    from playwright.sync_api import sync_playwright

    told: dict[str, Any] = {}
    last = begun

    def done(step: str) -> None:
        nonlocal last
        now = time.perf_counter()
        told[step], last = round(now - last, 1), now

    server.wait_until_ready(600)
    done("ComfyUI starts")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(MINUTES)
        page.goto(server.url)
        page.wait_for_function(READY)
        page.wait_for_timeout(1500)  # it loads its own default workflow
        done("the page opens")
        acts = 0
        if page.locator("[role=dialog]:visible").count():  # the templates, which a first visit is shown
            page.keyboard.press("Escape")
            acts += 1
        page.evaluate(DROP, [WORKFLOW.name, base64.b64encode(WORKFLOW.read_bytes()).decode(), "application/json"])
        page.wait_for_function(f"app.graph.nodes.length === {len(json.loads(WORKFLOW.read_text())['nodes'])}")
        done("the workflow is dropped")
        page.get_by_role("button", name="Run", exact=True).first.click()
        acts += 2
        page.wait_for_function(PLAYS)
        done("Run, until the video plays")
        browser.close()
    return {**told, "all": round(last - begun, 1), "clicks and drops": acts}


def main() -> None:
    args = tyro.cli(Args)
    named = os.environ.get("ACCVIDEO_CHROMIUM")
    chromium = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium: install it, or set ACCVIDEO_CHROMIUM")
    results: dict[str, Any] = {"CPUs": os.cpu_count()}
    if hasattr(os, "getloadavg"):
        results["load before"] = round(os.getloadavg()[0], 1)
    for checkout in find_checkouts():
        python = prepare(checkout)
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            server = Server(checkout, python, Path(folder), weights_folder())
            try:
                results[checkout.name] = first_video(server, chromium, begun)
            finally:
                server.stop()
        print(checkout.name, *(f"{name}: {value}" for name, value in results[checkout.name].items()), sep="\n    ", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
