"""Reading segments at random from a cold disk: our readers against the disk's own rate for blocks of that size.

    python benchmarks/synvid_read.py --json docs/benchmarks/synvid_read.json      # 20 GB of disk, some minutes
    python benchmarks/synvid_read.py --gb 1 --rounds 3 --pairs 20                 # a small proof

The dataset is written through the store, in the medium split's shape: a key latent is a block of 6.27 MB. A round measures each
way once, in an order that turns, the page cache emptied of all files before each (posix_fadvise):

disk     one plain read after another of a block at a random place of a random file, into memory that is there already
keys     `read_keys(sample, (k, k + 1))` of random samples and k, both stored: checked, in memory of their own
mapped   the same blocks through a memory map with read-ahead asked for (MADV_WILLNEED), copied out, not checked: for comparison
segment  `dataset[sample, k]`: as float32, with the text

Threads are the same on all sides. A ratio is a way's bytes per second over the disk's, of the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from paired import bootstrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.sampling import make_noise
from accvideo_core.synvid import Header, SampleInfo, SynVidDataset, SynVidSampler, SynVidStore, sample_id

GOAL = 0.8
SHAPE = (16, 24, 68, 120)  # medium: 544 x 960, 93 frames
BATCH = 8
BLOCK = 2 * math.prod(SHAPE)
Job = Callable[[random.Random], int]


def make(path: Path, gigabytes: float) -> SynVidStore:
    """A dataset of about that size through `commit`: real noise, key latents cut from one block of random values."""
    store = SynVidStore(path, Header.of("hunyuan-t2v", "f" * 64, teacher="synthetic"), "benchmark")
    text = store.put_text(torch.randn(256, 4096).half(), torch.randn(768).half())
    pool = torch.randn(math.prod(SHAPE) + 10_000)
    segments, size = store.header.segments, math.prod(SHAPE)
    count = max(2 * BATCH, round(gigabytes * 1e9 / (segments * BLOCK) / BATCH) * BATCH)
    for begin in range(len(store.samples()), count, BATCH):
        seeds = list(range(begin, begin + BATCH))
        keys = [torch.stack([pool[s * 7 + k :][:size].view(SHAPE) for s in seeds]) for k in range(segments)]
        infos = [SampleInfo(sample_id("x", s, SHAPE), "x", text, s, 1.0) for s in seeds]
        store.commit(keys, infos, make_noise((BATCH, *SHAPE), seeds))
    return store


def evict(path: Path) -> None:
    for file in path.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def jobs(path: Path, threads: int) -> dict[str, Job]:
    """Each reads one random pair and returns its bytes on the disk."""
    dataset = SynVidDataset(path)
    files = sorted((path / "latents").rglob("*.safetensors"))
    samples, segments = dataset.samples, dataset.header.segments
    layout = dataset.reader._layout(samples[0].file)
    memory = {i: memoryview(bytearray(BLOCK)) for i in range(threads)}
    free = list(memory)

    def disk(chance: random.Random) -> int:
        mine = free.pop()
        for _ in range(2):
            file = chance.choice(files)
            with open(file, "rb", buffering=0) as opened:
                opened.seek(chance.randrange(file.stat().st_size // BLOCK - 1) * BLOCK)
                done = 0
                while done < BLOCK:
                    done += opened.readinto(memory[mine][done:])
        free.append(mine)
        return 2 * BLOCK

    def keys(chance: random.Random) -> int:
        k = chance.randrange(segments - 1)
        return sum(tensor.nbytes for tensor in dataset.reader.read_keys(chance.choice(samples), (k, k + 1)))

    def mapped(chance: random.Random) -> int:
        sample, k = chance.choice(samples), chance.randrange(segments - 1)
        for key in (k, k + 1):
            begin = layout[f"key_{key}"].begin + sample.row * BLOCK
            start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            length = begin - start + BLOCK
            with (
                open(path / sample.file, "rb") as opened,
                mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ, offset=start) as view,
            ):
                view.madvise(mmap.MADV_WILLNEED)
                out = torch.empty(SHAPE, dtype=torch.float16)
                out.view(-1).view(torch.uint8).numpy().data[:] = memoryview(view)[begin - start :].toreadonly()
        return 2 * BLOCK

    def segment(chance: random.Random) -> int:
        dataset[chance.randrange(len(samples)), chance.randrange(segments - 1)]
        return 2 * BLOCK

    return {"disk": disk, "keys": keys, "mapped": mapped, "segment": segment}


def measure(path: Path, threads: int, rounds: int, pairs: int) -> list[dict[str, Any]]:
    ways = jobs(path, threads)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with ThreadPoolExecutor(threads) as pool:
        for turn in range(rounds):
            names = list(ways)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                evict(path)
                chances = [random.Random(f"{turn}/{name}/{i}") for i in range(pairs)]
                begun = time.perf_counter()
                done = sum(pool.map(ways[name], chances))
                rates[name].append(done / (time.perf_counter() - begun))
    rows = []
    for name, found in rates.items():
        ratios = [ours / disk for ours, disk in zip(found, rates["disk"], strict=True)]
        row = {"way": name, "threads": threads, "gb_per_s": statistics.median(found) / 1e9}
        rows.append(row | {"ratio": statistics.median(ratios), "interval": bootstrap(ratios)})
    return rows


def memory_over_an_epoch(path: Path) -> dict[str, Any]:
    """Bytes resident after a tenth of an epoch, and the most after that."""
    dataset = SynVidDataset(path)
    sampler = SynVidSampler(dataset, BATCH)
    process, steps = psutil.Process(), sampler.steps_per_epoch
    seen = []
    for step in range(steps):
        dataset.collate([dataset[draw] for draw in sampler.draws(step)])
        gc.collect()
        seen.append(process.memory_info().rss)
    early, late = max(seen[: max(2, steps // 10)]), max(seen[max(2, steps // 10) :])
    return {"steps": steps, "segments": steps * BATCH, "early": early, "late": late, "growth": late - early}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=20.0, help="size of the dataset, GB of 10^9 bytes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=100, help="in a round, for each way")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where the dataset is made (default: a temporary folder, removed afterwards)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "synvid"
        begun = time.perf_counter()
        store = make(path, args.gb)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        report: dict[str, Any] = {"bytes": size, "samples": len(store.samples()), "block": BLOCK, "goal": GOAL}
        report |= {"rounds": args.rounds, "pairs": args.pairs, "torch": torch.__version__, "cores": os.cpu_count()}
        report["writing"] = {"seconds": time.perf_counter() - begun, "gb_per_s": size / 1e9 / (time.perf_counter() - begun)}
        report["reading"] = [row for threads in args.threads for row in measure(path, threads, args.rounds, args.pairs)]
        report["memory"] = memory_over_an_epoch(path)
    print(f"{size / 1e9:.1f} GB, {report['samples']} samples, written at {report['writing']['gb_per_s']:.2f} GB/s")
    print("| Way | Threads | GB/s | over the disk's own (95 % interval) |\n|---|--:|--:|--:|")
    for row in report["reading"]:
        low, high = row["interval"]
        print(f"| {row['way']} | {row['threads']} | {row['gb_per_s']:.2f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    memory = report["memory"]
    grown = f"{memory['early'] / 1e6:.0f} MB after a tenth, at most {memory['late'] / 1e6:.0f} MB later"
    print(f"memory over an epoch of {memory['segments']} segments: {grown}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    met = all(row["ratio"] >= GOAL for row in report["reading"] if row["way"] == "keys")
    return 0 if met and memory["growth"] < 2 * BATCH * BLOCK else 1


if __name__ == "__main__":
    raise SystemExit(main())
