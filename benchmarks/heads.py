"""How many updates a head needs before it tells the student's latents from the teacher's, on the tiny world.

    python benchmarks/heads.py DATASET [--keys 0 2] [--updates 600] [--against wrong] [--json FILE]

DATASET is a SynVid dataset of the bundled teacher's (`accvideo capture`). Real are its key latents, fake is what the bundled
student makes of fresh noise for the same prompts; a head sees the frozen teacher's features of both, as in `accvideo distill`,
whose heads and loss these are. The student does not move. Three quarters of the prompts are learned from, a quarter is judged by:
the share of tokens on the right side of 0, and of pairs of a real and a fake clip in which the real one's mean logit is higher,
of prompts that name as many attributes.

`--against wrong` asks instead what a head could see if it were told: real are those of the teacher's own latents whose clip the
oracle calls right, fake those it calls wrong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.devices import autocast_dtype, pick_device
from accvideo_core.distill.adapters import adapter_for
from accvideo_core.distill.discriminator import Discriminator, Kind
from accvideo_core.distill.losses import GAN_LOSSES
from accvideo_core.sampling import euler_flow
from accvideo_core.schedule import PRESETS
from accvideo_core.studies.judge import judge
from accvideo_core.synvid import SynVidDataset
from accvideo_core.tiny import load_tiny
from accvideo_core.tiny.prompts import read_prompt

PRESET = PRESETS["tiny"]
CHUNK = 64  # latents that go through a network at once


@dataclass
class Args:
    """Train heads alone and judge them as they learn."""

    dataset: tyro.conf.Positional[Path]
    """SynVid dataset of the bundled teacher's."""
    keys: tuple[int, ...] = (0, 2)
    """Keys to train a head for, 0 the clean one."""
    against: Literal["student", "wrong"] = "student"
    """What is fake: the student's latents, or the teacher's of clips that the oracle calls wrong."""
    updates: int = 600
    """Updates of each head."""
    every: int = 100
    """Updates between judgements."""
    batch: int = 32
    """Real and as many fake latents an update."""
    lr: float = 1e-3
    """Learning rate; over the last third it falls to 0."""
    kind: Kind = "2d"
    """Heads that see each frame alone, or also its neighbours."""
    channels: int = 128
    """Channels inside a head."""
    seed: int = 0
    """Of noise, heads and draws."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    json: Path | None = None
    """Also write the results here."""


class Bench:
    def __init__(self, args: Args) -> None:
        self.args, self.device = args, pick_device(args.device)
        self.teacher, self.text, _ = load_tiny("teacher", self.device)
        self.student, _, _ = load_tiny("student", self.device)
        self.adapter, self.data = adapter_for("tiny"), SynVidDataset(args.dataset)
        self.adapter.check_header(self.data.header, self.teacher, self.adapter.fingerprint(self.teacher))
        self.prompts = [sample.prompt for sample in self.data.samples]
        self.noise = torch.randn(len(self.prompts), 16, 5, 8, 8, generator=torch.Generator().manual_seed(args.seed))
        self.cast = autocast_dtype(self.device)
        self.sigmas = PRESET.sigmas()  # noise first

    @torch.inference_mode()
    def features(self, key: int, of: Literal["teacher", "student"]) -> Tensor:
        """(N, tokens, D) float16 on the CPU: what the frozen teacher sees in the latents of either at a key."""
        clean, noisy = self.adapter.feature_blocks(self.teacher)
        block, last, made = clean if key == 0 else noisy, len(self.sigmas) - 1 - key, []
        for start in tqdm(range(0, len(self.prompts), CHUNK), f"features of the {of}, key {key}", leave=False):
            rows = range(start, min(start + CHUNK, len(self.prompts)))
            told = self.text.condition([self.prompts[i] for i in rows], torch.full((len(rows),), PRESET.guidance or 0.0))
            with self.precision():
                if of == "student":
                    noise = self.noise[rows.start : rows.stop].to(self.device)
                    latents = euler_flow(lambda x, s, c=told: self.student(x, s, c), noise, self.sigmas[: last + 1])
                else:
                    latents = self.latents(rows, key)
                level = self.sigmas[last].expand(len(rows)).to(self.device)
                made.append(self.adapter.features(self.teacher, latents, level, told, block).half().cpu())
        return torch.cat(made)

    def latents(self, rows: range, key: int) -> Tensor:
        """The teacher's, (B, C, T, H, W)."""
        return torch.stack([self.data.trajectory(i)[key] for i in rows]).float().to(self.device)

    @cached_property
    def right(self) -> Tensor:
        """(N,) whether the teacher's clip of a prompt shows what it asks for, by the oracle."""
        verdicts = judge(self.data, CHUNK, self.args.device)
        return torch.tensor([verdicts[sample.id].accepted for sample in self.data.samples])

    def sets(self) -> tuple[Tensor, Tensor]:
        """Numbers of the prompts whose real and fake latents are told apart."""
        every = torch.arange(len(self.prompts))
        return (every, every) if self.args.against == "student" else (every[self.right], every[~self.right])

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.cast, enabled=self.cast is not None)

    def learn(self, key: int) -> list[dict[str, Any]]:
        """What the head of a key gets right as it learns."""
        args, named = self.args, torch.tensor([len(read_prompt(prompt)) for prompt in self.prompts])
        real = self.features(key, "teacher")
        shown = real, self.features(key, "student") if args.against == "student" else real
        learned, held = zip(*(numbers.tensor_split([len(numbers) * 3 // 4]) for numbers in self.sets()), strict=True)
        alike = named[held[0]][:, None] == named[held[1]]
        grid = self.adapter.grid(self.teacher, self.noise.shape)
        head = Discriminator(real.shape[-1], 1, kind=args.kind, channels=args.channels, seed=args.seed).to(self.device)
        optimizer = AdamW(head.parameters(), args.lr, (0.0, 0.99))
        generator = torch.Generator().manual_seed(args.seed)

        def logits(features: Tensor) -> Tensor:
            with self.precision():
                return head(features.float().to(self.device), 0, grid).float().flatten(1)

        rows = []
        for done in range(1, args.updates + 1):
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, 3 * (args.updates + 1 - done) / args.updates)
            drawn = [numbers[torch.randint(len(numbers), (args.batch,), generator=generator)] for numbers in learned]
            loss = GAN_LOSSES["softplus"].head(*(logits(x[numbers]) for x, numbers in zip(shown, drawn, strict=True)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if done % args.every == 0:
                with torch.no_grad():
                    parts = ([logits(x[part]) for part in numbers.split(CHUNK)] for x, numbers in zip(shown, held, strict=True))
                    ours, theirs = map(torch.cat, parts)
                tokens = float(((ours > 0).float().mean() + (theirs < 0).float().mean()) / 2)
                pairs = float((ours.mean(1)[:, None] > theirs.mean(1))[alike.to(ours.device)].float().mean())
                rows.append({"key": key, "updates": done, "loss": float(loss.detach()), "tokens": tokens, "pairs": pairs})
                print(f"key {key}, {done:5d} updates: tokens {100 * tokens:.0f} %, pairs {100 * pairs:.0f} %", flush=True)
        return rows


def main(args: Args) -> int:
    bench = Bench(args)
    rows = [row for key in args.keys for row in bench.learn(key)]
    if args.json is not None:
        told = {"trajectories": len(bench.prompts), "batch": args.batch, "kind": args.kind, "against": args.against, "rows": rows}
        args.json.write_text(json.dumps(told) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
