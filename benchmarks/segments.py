"""Which of a student's steps cost it what it lacks of its teacher, on the tiny world.

    python benchmarks/segments.py PLAN [--dataset DATASET] [--rows 400] [--json FILE]

PLAN is a plan of prompts and seeds (`accvideo tiny prompts`). Clips are made by the teacher (T) in the first segments and by the
student (S) in the others, for every number of the teacher's: what is right by the oracle falls most at the step that costs most.
And the other way round, which tells what its steps cost from where it arrives itself; the last segments once by the teacher's
fine steps and once by one step of the teacher's (t) each.

Beside it the error of each step: mean squared difference of the student's velocity to that of the teacher's segment, from the
teacher's own key latent and from where the student itself has arrived, the teacher going on from there. With DATASET, the SynVid
dataset a student has learned from, also on as many of its trajectories; where those are much better, it wants more of them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.checkpoint import load_student
from accvideo_core.devices import autocast_dtype, pick_device
from accvideo_core.dit import HunyuanVideoDiT
from accvideo_core.errors import InvalidValueError
from accvideo_core.sampling import euler_flow, make_noise
from accvideo_core.schedule import PRESETS, key_indices
from accvideo_core.studies.exam import Reads, Row, read_clips, read_plan, score_reads
from accvideo_core.synvid import SynVidDataset
from accvideo_core.tiny import LATENT_SCALE, load_tiny
from accvideo_core.tiny.pipeline import TinyPipeline
from accvideo_core.tiny.vae import to_pixels

PRESET = PRESETS["tiny"]


@dataclass
class Args:
    """Let the teacher take a student's first steps, and see what that is worth."""

    plan: tyro.conf.Positional[Path]
    """Prompts and seeds the student was not trained on (accvideo tiny prompts)."""
    student: Path | None = None
    """A student's file; by default the bundled one."""
    dataset: Path | None = None
    """SynVid dataset the student has learned from."""
    rows: int = 400
    """Rows of the plan to make clips of."""
    forced: int = 128
    """Rows of the plan, and trajectories of the dataset, to measure errors on."""
    batch: int = 50
    """Clips at a time."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    json: Path | None = None
    """Also write the results here."""


class Bench:
    def __init__(self, args: Args) -> None:
        self.args, self.device = args, pick_device(args.device)
        self.teacher, text, vae = load_tiny("teacher", self.device)
        self.student = load_tiny("student", self.device)[0] if args.student is None else load_student(args.student, self.device)
        self.student.float()
        self.pipeline = TinyPipeline(self.student, text, vae, "student")
        self.cast = autocast_dtype(self.device)
        self.keys = PRESET.sigmas()  # noise first
        fine = PRESET.sigmas(PRESET.teacher_steps)
        points = sorted(key_indices(PRESET.teacher_steps, PRESET.steps))
        self.grids = [fine[a : b + 1] for a, b in zip(points, points[1:], strict=False)]

    @torch.inference_mode()
    def go(self, network: HunyuanVideoDiT, latent: Tensor, sigmas: Tensor, prompts: list[str]) -> Tensor:
        told = self.pipeline.condition(prompts)
        with torch.autocast(self.device.type, self.cast, enabled=self.cast is not None):
            return euler_flow(lambda x, s: network(x, s, told), latent, sigmas)

    def step(self, number: int, latent: Tensor, prompts: list[str]) -> Tensor:
        return self.go(self.student, latent, self.keys[number : number + 2], prompts)

    def single(self, number: int, latent: Tensor, prompts: list[str]) -> Tensor:
        return self.go(self.teacher, latent, self.keys[number : number + 2], prompts)

    def segment(self, number: int, latent: Tensor, prompts: list[str]) -> Tensor:
        return self.go(self.teacher, latent, self.grids[number], prompts)

    @torch.inference_mode()
    def read(self, clean: Tensor) -> Reads:
        return read_clips(to_pixels(self.pipeline.vae.decode(clean / LATENT_SCALE)))

    def right(self, rows: list[Row]) -> dict[str, float]:
        """The share that is right by who makes which segments: TTSSS is the teacher in the first two, the student then."""
        going = {"T": self.segment, "S": self.step, "t": self.single}
        reads: dict[str, Reads] = {}
        for start in tqdm(range(0, len(rows), self.args.batch), "clips", mininterval=5):
            some = rows[start : start + self.args.batch]
            prompts, shape = [row.prompt for row in some], (len(some), 16, 5, 8, 8)
            noise = make_noise(shape, [row.seed for row in some]).to(self.device)
            for first, then in ("TS", "ST", "St"):
                latent = noise
                for changed in range(PRESET.steps + 1):
                    name = changed * first + (PRESET.steps - changed) * then
                    if len(reads.get(name, [])) <= start:
                        clean = latent
                        for number in range(changed, PRESET.steps):
                            clean = going[then](number, clean, prompts)
                        reads.setdefault(name, []).extend(self.read(clean))
                    if changed < PRESET.steps:
                        latent = going[first](changed, latent, prompts)
        return {name: score_reads(each, rows)["right"] for name, each in reads.items()}

    def errors(self, noise: Tensor, prompts: list[str], keys: list[Tensor] | None = None) -> dict[str, list[float]]:
        """By segment: on the teacher's key latents, made here unless they are given, and on the student's own."""
        latent = own = noise.to(self.device)
        found: dict[str, list[float]] = {"teacher's": [], "own": []}
        for number in range(PRESET.steps):
            fall = float(self.keys[number + 1] - self.keys[number])
            due = self.segment(number, latent, prompts) if keys is None else keys[number + 1].to(self.device)
            made = self.step(number, latent, prompts)
            found["teacher's"].append(float(((made - due) / fall).square().mean()))
            due_own, own = self.segment(number, own, prompts), self.step(number, own, prompts)
            found["own"].append(float(((own - due_own) / fall).square().mean()))
            latent = due
        return found


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    bench, rows = Bench(args), read_plan(args.plan)
    if not 0 < max(args.rows, args.forced) <= len(rows):
        raise InvalidValueError(f"{args.plan} has {len(rows)} rows; --rows and --forced must be from 1 to so many")
    result = {"right": bench.right(rows[: args.rows]), "rows": args.rows}
    for name, share in result["right"].items():
        print(f"{name}  {100 * share:5.1f} % right", flush=True)
    few = rows[: args.forced]
    noise = make_noise((len(few), 16, 5, 8, 8), [row.seed for row in few])
    result["errors"] = {"new trajectories": bench.errors(noise, [row.prompt for row in few])}
    if args.dataset is not None:
        data = SynVidDataset(args.dataset)
        some = range(min(args.forced, len(data)))
        keys = list(torch.stack([torch.stack(data.trajectory(i)[::-1]) for i in some]).float().unbind(1))
        learned = bench.errors(keys[0], [data.samples[i].prompt for i in some], keys)
        result["errors"]["trajectories it learned from"] = learned
    for where, errors in result["errors"].items():
        for points, values in errors.items():
            print(f"{where}, at {points} points: " + " ".join(f"{value:.3f}" for value in values))
    if args.json is not None:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
