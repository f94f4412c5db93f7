"""Small random networks, inputs and the measure by which our transformer is held against other implementations of it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from accvideo_core.checkpoint import expected_shapes
from accvideo_core.dit import Conditioning, DiTConfig, HunyuanVideoDiT

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


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    assert found.shape == expected.shape and torch.isfinite(found).all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


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


WAN = {"num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 16, "ffn_dim": 32, "num_layers": 3}


def wan_network(seed: int = 0, **sizes: int) -> Any:
    """diffusers' Wan, random, no tensor trivial; its modulations are as large as they come, so that the timestep shows."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    network = WanTransformer3DModel(**(WAN | sizes)).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name) if parameter.ndim == 1 else parameter)
    return network
