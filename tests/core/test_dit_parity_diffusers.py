"""Our transformer is diffusers' HunyuanVideoTransformer3DModel, padded text with mask included, on equal random weights."""

from __future__ import annotations

import functools
import importlib
import logging

import pytest
import torch
from torch import Tensor

from accvideo_core.checkpoint import expected_shapes
from accvideo_core.checkpoint.layouts import to_diffusers
from accvideo_core.dit import Conditioning, DiTConfig, HunyuanVideoDiT, layers, model

diffusers = pytest.importorskip("diffusers")

LIMIT = 1e-5  # relative L2 error in fp32
ONE_HEAD = DiTConfig(hidden_size=128, num_heads=1, depth_double=2, depth_single=3, text_dim=48)
TWO_HEADS = DiTConfig(hidden_size=256, num_heads=2, depth_double=1, depth_single=2, text_dim=32, pooled_dim=40)
THREE_HEADS = DiTConfig(hidden_size=384, num_heads=3, depth_double=2, depth_single=1, text_dim=64)
UNGUIDED = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=1, text_dim=16, guidance_embed=False)
ONE_REFINER = DiTConfig(hidden_size=256, num_heads=2, depth_double=1, depth_single=1, text_dim=16, refiner_depth=1)
CONFIGS = {"one head": ONE_HEAD, "two heads": TWO_HEADS, "three heads": THREE_HEADS, "unguided": UNGUIDED, "refiner": ONE_REFINER}

# latent (B, T, H, W): one frame, one token, odd patch counts in both directions, several frames, a batch
SHAPES = {"frame": (1, 1, 8, 8), "token": (1, 1, 2, 2), "odd": (1, 3, 6, 10), "clip": (1, 5, 8, 8), "batch": (3, 2, 4, 6)}


@functools.lru_cache
def random_weights(config: DiTConfig, seed: int = 0) -> dict[str, Tensor]:
    """No tensor trivial: norm scales around 1, biases of every layer, modulations that shift, scale and gate."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[name] = value * value[0].numel() ** -0.5
        else:
            state[name] = 1 + 0.3 * value if "norm" in name and name.endswith("weight") else 0.3 * value
    return state


def random_inputs(
    config: DiTConfig,
    shape: tuple[int, int, int, int],
    lengths: tuple[int, ...] | None = None,
    guidance: float = 6.0,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Conditioning]:
    """(latent, sigma, conditioning) with text padded by noise after each row's length; None for no mask at all."""
    generator = torch.Generator().manual_seed(seed)
    batch, *sizes = shape
    tokens = 7 if lengths is None else max(lengths) + 4
    text = torch.randn(batch, tokens, config.text_dim, generator=generator)
    mask = None if lengths is None else torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
    conditioning = Conditioning(
        text=text,
        pooled=torch.randn(batch, config.pooled_dim, generator=generator),
        guidance=torch.full((batch,), guidance) if config.guidance_embed else None,
        text_mask=mask,
    )
    latent = torch.randn(batch, config.in_channels, *sizes, generator=generator)
    sigma = torch.tensor([1.0, 0.5, 0.125])[:batch]
    return latent, sigma, conditioning


def ours(config: DiTConfig, state: dict[str, Tensor], inputs: tuple, dtype: torch.dtype = torch.float32) -> Tensor:
    network = HunyuanVideoDiT(config, device="meta", dtype=dtype)
    network.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    with torch.no_grad():
        return network(*inputs)


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


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    assert found.shape == expected.shape and torch.isfinite(found).all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


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


def swapped(state: dict[str, Tensor], name: str, parts: int, i: int, j: int) -> dict[str, Tensor]:
    pieces = list(state[name].chunk(parts))
    pieces[i], pieces[j] = pieces[j], pieces[i]
    return state | {name: torch.cat(pieces)}


MUTATIONS = {
    "final shift and scale": lambda s: swapped(s, "final_layer.adaLN_modulation.1.weight", 2, 0, 1),
    "double block's shift and scale": lambda s: swapped(s, "double_blocks.0.img_mod.linear.weight", 6, 0, 1),
    "text stream's shift and scale": lambda s: swapped(s, "double_blocks.0.txt_mod.linear.bias", 6, 3, 4),
    "single block's shift and scale": lambda s: swapped(s, "single_blocks.1.modulation.linear.weight", 3, 0, 1),
    "refiner's two gates": lambda s: swapped(s, "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1.bias", 2, 0, 1),
    "q and k": lambda s: swapped(s, "double_blocks.0.txt_attn_qkv.weight", 3, 0, 1),
    "k and v": lambda s: swapped(s, "single_blocks.0.linear1.weight", 7, 1, 2),
}


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
            cos, sin = table(*args)
            sin[:, 10] = -sin[:, 10]  # one pair of 64 turns the other way
            return cos, sin

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
