"""Kill writers of a SynVid dataset at random moments, fill their disk, take away their permission; then count what is there.

    python -m tests.soak.synvid_kill --captures 200 --writers 4 --kills 300

Writers are forked processes that capture what the plan still lacks, each its share, and are killed with SIGKILL after a random
time (--life), again and again; now and then one meets a full disk (a limit on the size of files, so that writes
end half-way as on a full disk) and carries on after it. At the end a fresh writer of each share finishes the plan undisturbed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from accvideo_core.errors import OutputError
from accvideo_core.synvid import SynVidStore
from accvideo_core.synvid.manifest import parse
from tests.synvid_data import HEADER, PLAN, commit


def in_a_fork(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own that has all imports already; the process's id."""
    if child := os.fork():
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def capture(path: Path, share: int, shares: int, plan: tuple[str, ...], name: str | None = None) -> None:
    """Capture what is missing of a share of the plan, in batches of 1 to 3; a full disk is met once and then gone."""
    store = SynVidStore(path, HEADER, name)
    wanted = store.missing(plan[share::shares])
    chance = random.Random(os.getpid())
    while wanted:
        batch, wanted = wanted[: chance.randint(1, 3)], []
        full = chance.random() < 0.1
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (chance.randint(1, 2000), resource.RLIM_INFINITY))
        with contextlib.suppress(OutputError):
            commit(store, batch)
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wanted = store.missing(plan[share::shares])


def soak(path: Path, captures: int, writers: int, kills: int, life: float = 0.06, seed: int = 0) -> dict[str, int]:
    """Kill, finish, and check; what was counted. A writer lives at most `life` seconds. AssertionError if anything is not as
    promised."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails instead of ending the process
    chance, plan = random.Random(seed), PLAN[:captures]
    running: dict[int, tuple[int, float]] = {}
    counts = collections.Counter(kills=0, finished=0)
    shares = list(range(writers))
    while counts["kills"] < kills and shares:
        while shares and len(running) < writers:
            share = shares.pop()
            # half of the writers come back under the name in which one was killed
            name = f"writer-{share}" if chance.random() < 0.5 else None
            child = in_a_fork(lambda share=share, name=name: capture(path, share, writers, plan, name))  # type: ignore[misc]
            running[child] = (share, time.monotonic() + chance.uniform(0.1, 1) * life)
        time.sleep(0.002)
        for child, (share, end) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
                counts["kills"] += 1
            if ended:
                del running[child]
                assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"a writer failed with status {status}"
                counts["finished"] += not os.WIFSIGNALED(status)
                if os.WIFSIGNALED(status):
                    shares.append(share)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts["kills"] += 1
    counts["left to the last writers"] = len(SynVidStore(path, HEADER).missing(plan))
    for share in range(writers):
        capture(path, share, writers, plan)
    return {**counts, **check(path, plan)}


def check(path: Path, plan: tuple[str, ...]) -> dict[str, int]:
    """Every planned sample is there once, everything hashes as committed, no line names a file that is not there."""
    store = SynVidStore(path)
    assert store.missing(plan) == []
    manifests = sorted((path / "manifest").iterdir())
    lines = [entry for manifest in manifests for entry in parse(manifest.read_bytes())[0]]
    committed = collections.Counter(entry.id for entry in lines)  # type: ignore[union-attr]
    assert committed == collections.Counter(plan), committed - collections.Counter(plan)
    assert store.verify() == []
    assert all((path / entry.file).is_file() for entry in lines)  # type: ignore[union-attr]
    torn = sum(not manifest.read_bytes().endswith(b"\n") for manifest in manifests)
    unnamed = store.unnamed()
    files = len({entry.file for entry in lines})  # type: ignore[union-attr]
    return {"samples": len(lines), "files": files, "manifests": len(manifests), "torn lines": torn, "unnamed files": len(unnamed)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captures", type=int, default=200)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--life", type=float, default=0.06, help="the longest that a writer lives, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(json.dumps(soak(Path(folder) / "synvid", args.captures, args.writers, args.kills, args.life, args.seed), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
