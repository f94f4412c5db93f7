"""The student: the teacher's trajectories, and the loss of Eq. 6 on their key points."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint.students import student_metadata
from ...distill import segment_velocity
from ...distill.adapters import adapter_for
from ...distill.source import check_schedule
from ...schedule import key_indices, key_sigmas
from ...synvid import SynVidDataset
from ..clips import keyed_generator
from ..pipeline import TinyPipeline
from ..share import Share
from ..training import Defaults
from .common import KEYS, PRESET, TEACHER_STEPS, block_matrices, draw_guidance, sample_sheet, save_weights
from .flow import ShapeError
from .trajectories import Capture


class StudentTask:
    """The trajectory loss alone, half of it as the shape filters see it: from key point k+1 of a teacher's trajectory, the
    velocity of the segment to key k."""

    defaults = Defaults(steps=400, batch=32, lr=5e-4, warmup=50, ema=0.998)

    def __init__(
        self, seed: int, device: torch.device, weights: Path, run: Path, count: int, dataset: Path | None = None
    ) -> None:
        from .. import load_tiny, part_hash

        self.seed, self.device, self.count = seed, device, count
        self.made_from = {part: part_hash(part, weights) for part in ("encoder", "text_encoder", "teacher")}
        self.teacher, self.text, self.vae = load_tiny("teacher", device=device, folder=weights)
        self.network = copy.deepcopy(self.teacher)
        self.network.requires_grad_(True).train()
        self.model: nn.Module = self.network
        self.matrices = block_matrices(self.network)
        points = sorted(key_indices(TEACHER_STEPS, KEYS))
        self.capture = Capture(self.teacher, self.text, points, False, run, seed, self.made_from, device)
        self.dataset = None if dataset is None else self.open(dataset)
        self.sigmas = key_sigmas(TEACHER_STEPS, KEYS, PRESET.shift).to(device)
        self.error = ShapeError(self.vae, device)
        self.keys: Tensor  # (N, m + 1, 16, 5, 8, 8), noise first
        self.prompts: list[str]

    def open(self, address: Path) -> SynVidDataset:
        """A dataset of this teacher's. SynVidError if it is another's, or of another schedule."""
        dataset, adapter = SynVidDataset(address), adapter_for("tiny")
        adapter.check_header(dataset.header, self.teacher, adapter.fingerprint(self.teacher))
        check_schedule(dataset.header)
        self.made_from["dataset"], self.count = dataset.digest, len(dataset)
        return dataset

    def prepare(self, share: Share) -> None:
        if self.dataset is None:
            self.keys, self.prompts, _ = self.capture.all(self.count, share)
        else:
            keys = [torch.stack(self.dataset.trajectory(i)[::-1]).half() for i in range(self.count)]
            self.keys, self.prompts = torch.stack(keys), [sample.prompt for sample in self.dataset.samples]

    def loss(self, step: int, batch: int, rows: slice) -> Tensor:
        generator = keyed_generator(self.seed, "student", step)
        index = torch.randint(len(self.keys), (batch,), generator=generator)
        position = torch.randperm(batch, generator=generator) % (len(self.sigmas) - 1)  # every segment equally often
        guidance = draw_guidance(batch, generator)[rows]
        index, position = index[rows], position[rows]
        noisier = self.keys[index, position].float().to(self.device)
        cleaner = self.keys[index, position + 1].float().to(self.device)
        sigma, sigma_next = self.sigmas[position], self.sigmas[position + 1]
        with torch.no_grad():
            cond = self.text.condition([self.prompts[int(i)] for i in index], guidance)
        target = segment_velocity(noisier, cleaner, sigma, sigma_next)
        return self.error(self.network(noisier, sigma, cond).float() - target).mean()

    def export(self, folder: Path, steps: int) -> list[Path]:
        note = {"steps": str(steps), "seed": str(self.seed), "family": "tiny", "trajectories": str(self.count), **self.made_from}
        note |= student_metadata(KEYS)
        return [save_weights(folder / "student.safetensors", self.network, torch.bfloat16, note)]

    def sheet(self, path: Path) -> None:
        sample_sheet(path, TinyPipeline(self.network, self.text, self.vae, "student"), PRESET.steps)
