"""The computed tables of docs/workflows.md are what docs/memory.py prints, and its sums are right where they can be known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from docs import memory

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_documents_tables_are_the_scripts() -> None:
    text = (DOCS / "workflows.md").read_text(encoding="utf-8")
    assert memory.cards() in text and memory.counts() in text


def test_what_the_notes_say_of_tiles_is_counted() -> None:
    for (pixels, frames), told in memory.DECODING.items():
        assert round(memory.counted_decoding(pixels, frames) / 1e9, 1) == told


def test_weights_of_the_released_model() -> None:
    assert memory.weight_bytes(memory.HUNYUAN, "bf16") == 2 * 12_821_012_544
    assert memory.weight_bytes(memory.HUNYUAN, "fp8") == pytest.approx(12_821_012_544, rel=1e-3)


def test_counting_adds_up_what_exists_at_one_time() -> None:
    """Three tensors of 4 000 bytes are made; the first is gone when the third is, and weights are not counted."""
    network = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.ReLU(), torch.nn.Tanh()).to("meta")
    assert memory.counted_bytes(network, torch.empty(100, 10, device="meta")) == 8_000


def test_no_more_weights_lie_on_a_card_than_fit() -> None:
    for setting in memory.SETTINGS:
        used = setting.on_card + memory.sampling_bytes(setting.config, setting.video)
        assert used <= setting.card * memory.GIB and setting.streamed >= 0
        assert memory.DECODING[setting.tile] * 1e9 <= setting.card * memory.GIB
