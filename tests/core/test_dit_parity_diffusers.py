"""Our transformer is diffusers' HunyuanVideoTransformer3DModel, padded text with mask included, on equal random weights."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from torch import Tensor

from accvideo_core.checkpoint.layouts import to_diffusers
from accvideo_core.dit import Conditioning, DiTConfig, layers, model
from tests.networks import (
    CONFIGS,
    LIMIT,
    MUTATIONS,
    ONE_HEAD,
    SHAPES,
    THREE_HEADS,
    TWO_HEADS,
    error,
    ours,
    random_inputs,
    random_weights,
)

diffusers = pytest.importorskip("diffusers")


def theirs(config: DiTConfig, state: dict[str, Tensor], inputs: tuple, dtype: torch.dtype = torch.float32) -> Tensor:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with torch.device("meta"):
        network = diffusers.HunyuanVideoTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            num_layers=config.depth_double,
            num_single_layers=config.depth_single,
            num_refiner_layers=config.refiner_depth,
            guidance_embeds=config.guidance_embed,
            text_embed_dim=config.text_dim,
            pooled_projection_dim=config.pooled_dim,
        )
    network.load_state_dict({name: t.to(dtype) for name, t in to_diffusers(state).items()}, strict=True, assign=True)
    latent, sigma, c = inputs
    mask = torch.ones(c.text.shape[:2], dtype=torch.bool) if c.text_mask is None else c.text_mask
    guidance = None if c.guidance is None else c.guidance.to(dtype) * 1000  # as its pipeline does
    with torch.no_grad():
        return network(latent.to(dtype), sigma * 1000, c.text.to(dtype), mask, c.pooled.to(dtype), guidance, return_dict=False)[
            0
        ].float()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_full_text(config, shape):
    state, inputs = random_weights(config), random_inputs(config, shape)
    assert error(ours(config, state, inputs), theirs(config, state, inputs)) <= LIMIT


@pytest.mark.parametrize("lengths", [(3,), (1,), (5, 5), (2, 6, 4)], ids=str)
@pytest.mark.parametrize("config", [ONE_HEAD, TWO_HEADS, THREE_HEADS], ids=["one head", "two heads", "three heads"])
def test_padded_text_with_mask(config, lengths):
    state, inputs = random_weights(config), random_inputs(config, (len(lengths), 2, 6, 10), lengths)
    assert error(ours(config, state, inputs), theirs(config, state, inputs)) <= LIMIT


def test_long_padded_sequences_take_the_other_path_and_agree(monkeypatch):
    """From ROW_BY_ROW_TOKENS on, each row attends to its own valid keys; the same answer without a mask."""
    state, inputs = random_weights(TWO_HEADS), random_inputs(TWO_HEADS, (3, 2, 6, 10), (2, 6, 4))
    expected = theirs(TWO_HEADS, state, inputs)
    monkeypatch.setattr(importlib.import_module("accvideo_core.dit.attention"), "ROW_BY_ROW_TOKENS", 1)
    assert error(ours(TWO_HEADS, state, inputs), expected) <= LIMIT


@pytest.mark.parametrize("lengths", [None, (3,)], ids=["full", "padded"])
@pytest.mark.parametrize("config", [ONE_HEAD, TWO_HEADS, THREE_HEADS], ids=["one head", "two heads", "three heads"])
def test_bfloat16_is_as_exact_as_the_peer(config, lengths):
    """Both against the fp32 result of the same bf16 weights and inputs. Guidance 4 is exact in bf16 after * 1000; 6 is not."""
    state = {name: t.bfloat16().float() for name, t in random_weights(config).items()}
    latent, sigma, c = random_inputs(config, (1, 1, 6, 10), lengths, guidance=4.0)
    c = Conditioning(c.text.bfloat16().float(), c.pooled.bfloat16().float(), c.guidance, c.text_mask)
    inputs = (latent.bfloat16().float(), sigma, c)
    exact = theirs(config, state, inputs)
    peer = error(theirs(config, state, inputs, torch.bfloat16), exact)
    assert error(ours(config, state, inputs, torch.bfloat16), exact) <= 1.5 * peer


def test_guidance_in_bfloat16_is_6016_as_everywhere():
    config, inputs = TWO_HEADS, random_inputs(TWO_HEADS, SHAPES["odd"], guidance=6.0)
    state = {name: t.bfloat16().float() for name, t in random_weights(config).items()}
    latent, sigma, c = inputs
    rounded = (latent, sigma, Conditioning(c.text, c.pooled, torch.full((1,), 6.016)))
    found = ours(config, state, inputs, torch.bfloat16)
    near, far = ours(config, state, rounded), ours(config, state, inputs)
    assert error(found, near) < 0.3 * error(found, far)
    assert error(found, theirs(config, state, inputs, torch.bfloat16)) < 0.3 * error(far, near)


@pytest.fixture(scope="module")
def case():
    state, inputs = random_weights(TWO_HEADS), random_inputs(TWO_HEADS, (2, 2, 6, 10), (3, 6))
    expected = theirs(TWO_HEADS, state, inputs)
    assert error(ours(TWO_HEADS, state, inputs), expected) <= LIMIT
    return state, inputs, expected


class TestTheTestsCanFail:
    """Each change below is one a port could carry unnoticed; the comparison must see every one of them."""

    @pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
    def test_swapped_rows(self, case, mutate):
        state, inputs, expected = case
        assert error(ours(TWO_HEADS, mutate(state), inputs), expected) > 100 * LIMIT

    def test_a_flipped_rope_pair(self, case, monkeypatch):
        state, inputs, expected = case
        table = layers.rope_table

        def flipped(*args):
            turns = table(*args)
            turns[:, 10, 1] *= -1  # one pair of 64 turns the other way
            return turns

        monkeypatch.setattr(model, "rope_table", flipped)
        assert error(ours(TWO_HEADS, state, inputs), expected) > 100 * LIMIT

    def test_rope_on_the_grid_in_another_order(self, case, monkeypatch):
        state, inputs, expected = case
        table = layers.rope_table
        monkeypatch.setattr(model, "rope_table", lambda grid, *rest: table((grid[0], grid[2], grid[1]), *rest))
        assert error(ours(TWO_HEADS, state, inputs), expected) > 100 * LIMIT

    def test_padding_that_is_pooled(self, case):
        state, (latent, sigma, c), expected = case
        unmasked = Conditioning(c.text, c.pooled, c.guidance)
        assert error(ours(TWO_HEADS, state, (latent, sigma, unmasked)), expected) > 100 * LIMIT

    @pytest.mark.parametrize("change", ["sigma", "guidance", "pooled"])
    def test_other_inputs(self, case, change):
        state, (latent, sigma, c), expected = case
        pooled = c.pooled * 1.01 if change == "pooled" else c.pooled
        guidance = c.guidance + 0.01 if change == "guidance" else c.guidance
        inputs = (latent, sigma + (0.001 if change == "sigma" else 0), Conditioning(c.text, pooled, guidance, c.text_mask))
        assert error(ours(TWO_HEADS, state, inputs), expected) > 10 * LIMIT
