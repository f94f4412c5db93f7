"""The student: the teacher's trajectories, and the loss of Eq. 6 on their key points."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import load_student
from ...checkpoint.students import student_metadata
from ...distill import segment_velocity
from ...distill.adapters import adapter_for
from ...distill.source import check_schedule
from ...dit import Conditioning, HunyuanVideoDiT
from ...errors import InvalidValueError
from ...sampling import euler_flow
from ...schedule import key_indices, key_sigmas
from ...synvid import SynVidDataset
from ..clips import keyed_generator, sample_scenes
from ..pipeline import TinyPipeline
from ..prompts import open_some, write_prompt
from ..share import Share
from ..training import Defaults
from .common import KEYS, LATENT_SHAPE, PRESET, TEACHER_STEPS, block_matrices, draw_guidance, sample_sheet, save_weights
from .flow import ShapeError
from .trajectories import Capture


def draw_noise_and_prompts(count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """(count, 16, 5, 8, 8) noise, and prompts that leave a random part open."""
    scenes = sample_scenes(count, generator)
    prompts = [write_prompt(open_some(scenes.names(i), generator), generator) for i in range(count)]
    return torch.randn(count, *LATENT_SHAPE, generator=generator), prompts


class StudentTask:
    """The trajectory loss alone, half of it as the shape filters see it: from key point k+1 of a teacher's trajectory, the
    velocity of the segment to key k.

    What is to be seen is decided in the second segment, and in the third: they take many more trajectories to learn than the
    others, and nearly all that the student lacks of its teacher is lost there. So `early` trajectories end behind them and are
    solved in fewer steps, and `turns` says which segments a batch has, all alike by default.

    In a further round, of a student to start from, `push` has for every segment how far to take that student's own velocity on,
    away from the teacher's over the segment in `teacher_steps`, where the student itself arrives from new noise and prompts; None
    leaves the segment to the trajectories. What it cannot tell from the second segment's beginning comes out as a mean of what it
    may become, which later steps do not part again: 1 goes away from one step of the teacher's, the mean of all there is, as
    guidance does, and as the guided base was pushed from a weaker one. 0 holds what the student does, and -1 is what the teacher
    does, from there: in the last segment, which trajectories of the teacher's alone teach from other beginnings, the better.

    What is pushed, or taught by heads, has more energy than the teacher's clips, and what is learned as a mean less: `amplitude`
    times the clean latent is where the last segment is to lead.
    """

    early_segments, early_steps = 3, 5  # and steps of each

    defaults = Defaults(steps=400, batch=32, lr=5e-4, warmup=50, ema=0.998)

    def __init__(
        self,
        seed: int,
        device: torch.device,
        weights: Path,
        run: Path,
        count: int,
        dataset: Path | None = None,
        early: int = 0,
        start: Path | None = None,
        push: Sequence[float | None] = (),
        teacher_steps: int = 1,
        turns: Sequence[int] = (),
        amplitude: float = 1.0,
    ) -> None:
        from .. import load_tiny, part_hash

        self.seed, self.device, self.count = seed, device, count
        self.made_from = {part: part_hash(part, weights) for part in ("encoder", "text_encoder", "teacher")}
        self.teacher, self.text, self.vae = load_tiny("teacher", device=device, folder=weights)
        captured = dict(self.made_from)
        self.first = self.teacher if start is None else self.begin_with(start)
        self.turns, self.push, self.teacher_steps = turns or range(KEYS), push or [None] * KEYS, teacher_steps
        self.amplitude = amplitude
        chosen: dict[str, Sequence[float | None]] = {
            "push": push,
            "turns": turns,
            "teacher_steps": [teacher_steps] if push else (),
            "amplitude": [amplitude] if amplitude != 1 else (),
        }
        self.made_from |= {name: " ".join(map(str, values)) for name, values in chosen.items() if values}
        self.network = copy.deepcopy(self.first)
        self.network.requires_grad_(True).train()
        self.model: nn.Module = self.network
        self.matrices = block_matrices(self.network)
        points = sorted(key_indices(TEACHER_STEPS, KEYS))
        self.capture = Capture(self.teacher, self.text, points, False, run, seed, captured, device)
        self.dataset = None if dataset is None else self.open(dataset)
        if self.is_all_its_own():
            self.count = 0
        self.made_from |= {"trajectories": str(self.count), "early": str(early)}
        until = list(range(0, self.early_segments * self.early_steps + 1, self.early_steps))
        self.early, self.quick = early, replace(self.capture, points=until, name="early", multistep=KEYS * self.early_steps)
        self.sigmas = key_sigmas(TEACHER_STEPS, KEYS, PRESET.shift).to(device)
        self.error = ShapeError(self.vae, device)
        self.latents: list[Tensor]  # for each key point, noise first, (N, 16, 5, 8, 8) of the trajectories that reach it
        self.prompts: list[str]

    def open(self, address: Path) -> SynVidDataset:
        """A dataset of this teacher's. SynVidError if it is another's, or of another schedule."""
        dataset, adapter = SynVidDataset(address), adapter_for("tiny")
        adapter.check_header(dataset.header, self.teacher, adapter.fingerprint(self.teacher))
        check_schedule(dataset.header)
        self.made_from["dataset"], self.count = dataset.digest, len(dataset)
        return dataset

    def begin_with(self, student: Path) -> HunyuanVideoDiT:
        """The network of a student's file. InvalidValueError if it is not of the teacher's size."""
        network = load_student(student, self.device, torch.float32).requires_grad_(False)
        if network.config != self.teacher.config:
            raise InvalidValueError(f"start is {str(student)!r}, which is not of the tiny teacher's size; choose a tiny student")
        self.made_from["start"] = hashlib.sha256(student.read_bytes()).hexdigest()
        return network

    def is_all_its_own(self) -> bool:
        """Whether no segment is learned from trajectories."""
        return all(self.push[k] is not None for k in self.turns)

    def prepare(self, share: Share) -> None:
        if self.is_all_its_own():
            self.latents, self.prompts = [torch.empty(0)] * (KEYS + 1), []
            return
        if self.dataset is None:
            keys, self.prompts, _ = self.capture.all(self.count, share)
        else:
            keys = torch.stack([torch.stack(self.dataset.trajectory(i)[::-1]).half() for i in range(self.count)])
            self.prompts = [sample.prompt for sample in self.dataset.samples]
        self.latents = list(keys.unbind(1))
        if self.early:
            keys, prompts, _ = self.quick.all(self.early, share)
            self.prompts = [*self.prompts, *prompts]
            for position, more in enumerate(keys.unbind(1)):
                self.latents[position] = torch.cat([self.latents[position], more])

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        generator = keyed_generator(self.seed, "student", step)
        position = torch.tensor(self.turns)[torch.randperm(batch, generator=generator) % len(self.turns)]
        reached = torch.tensor([len(latents) for latents in self.latents[1:]])
        index = (torch.rand(batch, generator=generator, dtype=torch.float64) * reached[position]).long()
        guidance = draw_guidance(batch, generator)[rows]
        index, position = index[rows], position[rows]
        learned = [i for i, k in enumerate(position.tolist()) if self.push[k] is None]
        own = [i for i, k in enumerate(position.tolist()) if self.push[k] is not None]
        noisier, target = (torch.empty(len(position), *LATENT_SHAPE, device=self.device) for _ in range(2))
        prompts = [self.prompts[i] if k in learned else "" for k, i in enumerate(index.tolist())]
        if own:
            noise, drawn = draw_noise_and_prompts(batch, generator)
            new = drawn[rows]
            prompts = [new[i] if i in own else prompt for i, prompt in enumerate(prompts)]
        with torch.no_grad():
            cond = self.text.condition(prompts, guidance)
        if learned:
            noisier[learned], target[learned] = self.segments(position[learned], index[learned])
        if own:
            noisier[own], target[own] = self.pushed(noise[rows][own].to(self.device), position[own], cond.rows(own))
        last = position == KEYS - 1
        target[last] = self.amplitude * target[last] + (1 - self.amplitude) / self.sigmas[KEYS - 1] * noisier[last]
        return self.error(self.network(noisier, self.sigmas[position], cond).float() - target).mean()

    def segments(self, position: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The beginnings of these trajectories' segments, and the segments' velocities."""
        places = list(zip(position.tolist(), index.tolist(), strict=True))
        noisier, cleaner = (torch.stack([self.latents[k + d][i].float() for k, i in places]).to(self.device) for d in (0, 1))
        return noisier, segment_velocity(noisier, cleaner, self.sigmas[position], self.sigmas[position + 1])

    @torch.no_grad()
    def pushed(self, noise: Tensor, position: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Where the student arrives at the beginning of each row's segment, and the velocity it is to have there."""
        latent, due = noise.clone(), torch.empty_like(noise)
        for k in range(int(position.max()) + 1):
            going, here, push = position >= k, position == k, self.push[k]
            mine = self.first(latent[going], self.sigmas[k].expand(int(going.sum())), cond.rows(going)).float()
            due[going] = mine  # of the rows that go on until their own segment
            if push and here.any():
                due[here] += push * (due[here] - self.taught(k, latent[here], cond.rows(here)))
            latent[position > k] += (self.sigmas[k + 1] - self.sigmas[k]) * due[position > k]
        return latent, due

    def taught(self, segment: int, latent: Tensor, cond: Conditioning) -> Tensor:
        """The teacher's velocity over a segment, in `teacher_steps` of its steps."""
        sigmas = PRESET.sigmas(KEYS * self.teacher_steps)[segment * self.teacher_steps :][: self.teacher_steps + 1]
        clean = euler_flow(lambda x, s: self.teacher(x, s, cond), latent, sigmas)
        return segment_velocity(latent, clean, *(self.sigmas[k].expand(len(latent)) for k in (segment, segment + 1)))

    def export(self, folder: Path, steps: int) -> list[Path]:
        note = {"steps": str(steps), "seed": str(self.seed), "family": "tiny", **self.made_from, **student_metadata(KEYS)}
        return [save_weights(folder / "student.safetensors", self.network, torch.bfloat16, note)]

    def sheet(self, path: Path) -> None:
        sample_sheet(path, TinyPipeline(self.network, self.text, self.vae, "student"), PRESET.steps)
