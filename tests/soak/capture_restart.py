"""A capture by two processes, killed half-way and finished by one: every planned trajectory must be there exactly once.

`python -m tests.soak.capture_restart --count 2000 --folder soak` prints what happened as JSON. The suite runs a short form.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from accvideo_core import cli
from accvideo_core.headless.models import TinyText
from accvideo_core.synvid import SynVidStore
from accvideo_core.synvid.plan import Plan
from accvideo_core.tiny.clips import keyed_generator, sample_scenes
from accvideo_core.tiny.prompts import open_some, write_prompt

ROOT = Path(__file__).resolve().parents[2]


def make_plan(path: Path, count: int) -> Plan:
    """Samples of the tiny world, by number as id and seed."""
    plan, encoder = Plan(path, create=True), TinyText(torch.device("cpu"))
    generator = keyed_generator("soak")
    scenes = sample_scenes(count, generator)
    for i in range(len(plan.items), count):
        prompt = write_prompt(open_some(scenes.names(i), generator), generator)
        plan.add(prompt, *encoder.encode(prompt), i, (16, 5, 8, 8), f"sample-{i:06d}")
    return plan


def committed(dataset: Path) -> Counter[str]:
    """{id: how many manifest lines name it}, of whole lines."""
    lines = [line for file in (dataset / "manifest").glob("*.jsonl") for line in file.read_bytes().split(b"\n")[:-1]]
    return Counter(json.loads(line)["id"] for line in lines)


def run_and_kill(plan: Path, dataset: Path, options: list[str], kill_at: int) -> None:
    """`accvideo capture` by two processes under torchrun, all killed with SIGKILL once so many samples are committed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "accvideo_core"]
    command += ["capture", "--plan", str(plan), "--out", str(dataset), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while started.poll() is None and committed(dataset).total() < kill_at:
        time.sleep(0.05)
    for process in [*psutil.Process(started.pid).children(recursive=True), started]:  # torchrun's workers would outlive it
        process.kill()
    said, _ = started.communicate()
    if started.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the capture ended before it was killed:\n{said[-3000:]}")


def soak(folder: Path, count: int, kill_at: int, options: list[str]) -> dict[str, object]:
    """Two processes, killed once `kill_at` samples are there; this one goes on. AssertionError unless all is there once."""
    options = [*options, "--device", "cpu"]
    plan, dataset = make_plan(folder / "plan", count), folder / "dataset"
    start = time.perf_counter()
    run_and_kill(plan.path, dataset, options, kill_at)
    before = committed(dataset)
    assert cli.main(["capture", "--plan", str(plan.path), "--out", str(dataset), *options]) == 0
    after, store = committed(dataset), SynVidStore(dataset)
    assert kill_at <= before.total() < count, before.total()
    assert set(after) == set(plan.items) == set(store.samples()), len(after)
    assert set(after.values()) == {1}, [name for name, times in after.items() if times > 1]
    damages = store.verify()
    assert not damages, damages
    writers = len(list((dataset / "manifest").glob("*.jsonl")))
    seconds = time.perf_counter() - start
    return {"planned": count, "at_kill": before.total(), "captured_once": len(after), "writers": writers, "seconds": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    print(json.dumps(soak(args.folder, args.count, args.count // 2, ["--batch", str(args.batch)]), indent=1))
