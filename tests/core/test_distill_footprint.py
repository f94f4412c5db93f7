"""The memory a run will need: computed, held against scaled models; and what is said when it does not suffice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from accvideo_core.distill.config import TrainConfig
from accvideo_core.distill.discriminator import Discriminator
from accvideo_core.distill.footprint import footprint, table
from accvideo_core.distill.memory import explained
from accvideo_core.distill.parallel import World
from accvideo_core.dit import Conditioning, DiTConfig, HunyuanVideoDiT
from accvideo_core.errors import InvalidValueError, TrainingError
from tests.peak import Peak

ROOT = Path(__file__).resolve().parents[2]
HUNYUAN = DiTConfig.hunyuan_video()
MEDIUM = (24, 68, 120)


def scaled(width: int, double: int, single: int) -> DiTConfig:
    return DiTConfig(hidden_size=width, num_heads=width // 128, depth_double=double, depth_single=single, text_dim=16)


def adversarial_peak(config: DiTConfig, latent: tuple[int, int, int], text: int) -> int:
    """Bytes that the gradient through head, teacher and student needs at most; weights have none, their latent has, since a
    sharded run keeps no whole gradients."""
    student, teacher = (network(config, seed).requires_grad_(False) for seed in (0, 1))
    heads = Discriminator(config.hidden_size, 1, "per-key", "2d", 256, 2).requires_grad_(False)
    noise, sigma, told = inputs(latent, text)
    noise.requires_grad_()
    with Peak([noise, told.text, told.pooled, *student.parameters(), *teacher.parameters(), *heads.parameters()]) as peak:
        _, found = teacher(student(noise, sigma, told), sigma, told, features=[teacher.block_names()[-1]], stop_early=True)
        heads(found.pop(teacher.block_names()[-1]), 0, (latent[0], latent[1] // 2, latent[2] // 2)).mean().backward()
    return peak.peak


def trajectory_peak(config: DiTConfig, latent: tuple[int, int, int], text: int) -> tuple[int, int]:
    """The same of a student's trajectory loss, and the bytes of its weights' gradients, which it includes."""
    student, (noise, sigma, told) = network(config, 0), inputs(latent, text)
    with Peak([noise, told.text, told.pooled, *student.parameters()]) as peak:
        student(noise, sigma, told).square().mean().backward()
    return peak.peak, sum(2 * p.numel() for p in student.parameters())


def network(config: DiTConfig, seed: int) -> HunyuanVideoDiT:
    made = HunyuanVideoDiT(config, dtype=torch.bfloat16).init_weights(seed)
    made.checkpointing = True
    return made


def inputs(latent: tuple[int, int, int], text: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    told = Conditioning(torch.randn(1, text, 16), torch.randn(1, 768), torch.tensor([6.0]))
    return torch.randn(1, 16, *latent), torch.tensor([0.5]), told


class TestFootprint:
    @pytest.mark.parametrize(
        ("width", "double", "single", "latent", "text"),
        [(256, 2, 5, (4, 16, 32), 32), (3072, 1, 7, (8, 68, 120), 256)],
        ids=["small", "wide"],
    )
    def test_the_adversarial_step_of_a_scaled_model_takes_what_was_computed(
        self, width: int, double: int, single: int, latent: tuple[int, int, int], text: int
    ) -> None:
        config = scaled(width, double, single)
        computed = footprint(config, latent, world=1, text=text)
        with FakeTensorMode():
            assert computed.kept + computed.working == pytest.approx(adversarial_peak(config, latent, text), rel=0.1)

    def test_tensors_without_data_take_what_real_ones_do(self) -> None:
        config, latent = scaled(128, 1, 2), (2, 16, 16)
        with FakeTensorMode():
            told = adversarial_peak(config, latent, 16)
        assert adversarial_peak(config, latent, 16) == told

    def test_and_so_does_its_trajectory_step(self) -> None:
        config, latent = scaled(128, 1, 3), (4, 32, 64)
        found = footprint(config, latent, world=1, text=32, adversarial=False)
        with FakeTensorMode():
            measured, gradients = trajectory_peak(config, latent, 32)
        computed = found.kept + found.working
        assert computed < 1.1 * measured and measured < 1.1 * (computed + gradients)

    def test_what_is_sharded_is_divided_and_what_is_shared_is_too(self) -> None:
        eight, sixteen = (footprint(HUNYUAN, MEDIUM, world) for world in (8, 16))
        assert sixteen.weights == eight.weights / 2 and sixteen.training == eight.training / 2
        four = footprint(HUNYUAN, MEDIUM, 8, sequence=4)
        assert four.weights == eight.weights and four.kept < eight.kept / 3.9

    def test_sixteen_bytes_and_more_a_parameter_of_a_full_student(self) -> None:
        """4 master, 4 gradient, 8 AdamW, 4 average, 2 teacher."""
        found = footprint(HUNYUAN, MEDIUM, 8)
        assert found.weights + found.training == 22 * 12_821_012_544 / 8

    def test_a_lora_alone_shares_its_base_with_the_teacher(self) -> None:
        alone, four = footprint(HUNYUAN, MEDIUM, 1, lora=64), footprint(HUNYUAN, MEDIUM, 4, lora=64)
        assert alone.weights == pytest.approx(2 * 12_821_012_544, rel=0.06)
        assert four.weights == pytest.approx(4 * 12_821_012_544 / 4, rel=0.06)

    @pytest.mark.parametrize(("world", "sequence"), [(8, 3), (5, 5)])
    def test_a_world_that_cannot_be_has_none(self, world: int, sequence: int) -> None:
        with pytest.raises(InvalidValueError, match=f"{sequence} processes"):
            footprint(HUNYUAN, MEDIUM, world, sequence)

    def test_the_document_has_the_computed_table(self) -> None:
        assert table() in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


OPTIONS = ("--micro-batch", "--precision", "--checkpointing", "--queue-length", "--lora")


class TestOutOfMemory:
    def shortage(self, config: TrainConfig) -> str:
        with pytest.raises(TrainingError) as caught, explained(config, World()):
            torch.empty(2**50, dtype=torch.uint8)  # more than a process can address
        return str(caught.value)

    def test_the_message_says_what_to_change_in_order(self) -> None:
        message = self.shortage(TrainConfig(batch=8, precision="float32", queue_length=3))
        cures = (
            "--micro-batch 1",
            "bfloat16",
            "--checkpointing",
            "--queue-length",
            "--lora",
            "more GPUs",
            "--sequence",
            "smaller",
        )
        places = [message.find(cure) for cure in cures]
        assert -1 not in places and places == sorted(places)

    def test_what_is_changed_already_is_not_suggested(self) -> None:
        message = self.shortage(TrainConfig(batch=8, micro_batch=1, precision="bfloat16", checkpointing=True, lora=4))
        assert "1. more GPUs" in message
        assert not any(
            option in message for option in ("--micro-batch", "--checkpointing", "--lora", "--queue-length", "--precision")
        )

    def test_other_errors_pass_as_they_are(self) -> None:
        with pytest.raises(RuntimeError, match="mat1 and mat2"), explained(TrainConfig(), World()):
            torch.ones(2, 3) @ torch.ones(2, 3)
