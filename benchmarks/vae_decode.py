"""What AccVideo VAE Decode computes, and how its seams look, beside ComfyUI's VAE Decode and VAE Decode (Tiled).

    python benchmarks/vae_decode.py [--json docs/benchmarks/vae_decode.json]

Counted: the three nodes' own code cuts latents of full size on cards of given memory; the VAE's estimate decides what fits, and
nothing is decoded. Timed: HunyuanVideo's VAE at a quarter of its width, with random weights, decodes on the CPU a latent of which
about two thirds are let fit; in turn, and against the whole decoded at once.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from paired import bootstrap  # noqa: E402

from tests.comfyui.setup_envs import find_checkouts, prepare  # noqa: E402

VIDEOS = {"544 x 960 x 93": (24, 68, 120), "720 x 1280 x 129": (33, 90, 160)}


@dataclass
class Args:
    """Compare the ways to decode a latent that is too large for the memory."""

    cards: tuple[int, ...] = (8, 12, 16, 24, 48, 80)
    """GB of memory, each GB 2^30 bytes."""
    shape: tuple[int, int, int] = (3, 34, 60)
    """Frames, height and width of the latent that is timed."""
    fits: tuple[int, int, int] = (3, 34, 40)
    """The tile whose memory is let be free."""
    tile: int = 256
    """Pixels of VAE Decode (Tiled)'s tile in what is timed: its default, 512, is larger than what fits."""
    width: int = 32
    """Channels of the VAE's first layer; the released one has 128."""
    repeats: int = 5
    """Paired repeats."""
    json: Path | None = None
    """Also write the results here."""


def ask(checkout: Path, order: dict[str, Any]) -> dict[str, Any]:
    """What vae_worker.py says inside a ComfyUI."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(prepare(checkout)), str(HERE / "vae_worker.py"), str(checkout), str(torch.get_num_threads()), folder]
        done = subprocess.run(command, cwd=checkout, input=json.dumps(order), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"ComfyUI in {checkout} failed:\n{done.stderr[-4000:]}")
        return dict(json.loads(Path(folder, "told.json").read_text()))


def main(args: Args) -> int:
    checkouts = find_checkouts()
    if not checkouts:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH")
    made: dict[str, Any] = {"threads": torch.get_num_threads(), "counted": {}, "timed": {}}
    made["settings"] = {name: getattr(args, name) for name in ("shape", "fits", "tile", "width", "repeats")}
    cases = [{"video": name, "shape": shape, "gigabytes": card} for name, shape in VIDEOS.items() for card in args.cards]
    timed = {"shape": args.shape, "bytes_of": args.fits, "tile": args.tile, "width": args.width, "repeats": args.repeats}
    for checkout in checkouts:
        version = (checkout / "comfyui_version.py").read_text().split('"')[1]
        made["counted"][version] = ask(checkout, {"cut": cases})["cut"]
        for row in made["counted"][version]:
            ways = ", ".join(f"{name} {row[name]:.3f}" if row[name] else f"{name} does not fit" for name in WAYS)
            print(f"{version}: {row['video']} on {row['gigabytes']} GB, computed over needed: {ways}", flush=True)
        found = ask(checkout, {"time": timed})["time"]
        for name in WAYS:
            ratios = [a / b for a, b in zip(found[name]["seconds"], found["ours"]["seconds"], strict=True)]
            found[name] |= {"ratio": statistics.median(ratios), "interval": bootstrap(ratios)}
            print(f"{version}: {name}", {key: value for key, value in found[name].items() if key != "seconds"}, flush=True)
        made["timed"][version] = found
    if args.json is not None:
        args.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


WAYS = ("ours", "VAE Decode", "VAE Decode (Tiled)")

if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
