"""Networks of any size from a seed: every process makes the same weights and inputs on its own device, and no file is needed."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from accvideo_core.checkpoint import expected_shapes
from accvideo_core.dit import DiTConfig

# name -> (network, latent (T, H, W), text tokens). "tiny" is the bundled world's; the others grow in width or in tokens. The
# last ones want a GPU: 1.14 G parameters, and the 13 B model at 544 x 960 x 93 and 720 x 1280 x 129.
FULL = DiTConfig.hunyuan_video()
NARROW = DiTConfig(hidden_size=384, num_heads=3, depth_double=1, depth_single=1, text_dim=512)
BILLION = DiTConfig(hidden_size=2048, num_heads=16, depth_double=4, depth_single=8, text_dim=4096)
SIZES = {
    "tiny": (DiTConfig.tiny(), (5, 8, 8), 20),
    "small": (DiTConfig(hidden_size=384, num_heads=3, depth_double=2, depth_single=4, text_dim=512), (5, 16, 16), 32),
    "medium": (DiTConfig(hidden_size=768, num_heads=6, depth_double=1, depth_single=2, text_dim=1024), (5, 16, 16), 64),
    "1k": (NARROW, (4, 32, 32), 64),
    "4k": (NARROW, (16, 32, 32), 64),
    "16k": (NARROW, (16, 64, 64), 64),
    "1b-544p": (BILLION, (24, 68, 120), 256),
    "13b-1k": (FULL, (4, 32, 32), 64),
    "13b-4k": (FULL, (16, 32, 32), 64),
    "13b-16k": (FULL, (16, 64, 64), 64),
    "13b-544p": (FULL, (24, 68, 120), 64),
    "13b-720p": (FULL, (33, 90, 160), 64),
}


def drawn(name: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers that hang on the name alone, drawn on the device."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def weights(config: DiTConfig, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the network, none of them trivial, under original names."""
    state = {}
    for name, shape in expected_shapes(config).items():
        value = drawn(name, shape, device, dtype)
        if len(shape) > 1:
            value *= value[0].numel() ** -0.5
        else:
            value *= 0.2
            value += "norm" in name and name.endswith("weight")
        state[name] = value
    return state


def inputs(size: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """latent, sigma, text, pooled and guidance of one video; guidance 4, which bf16 holds after * 1000."""
    config, grid, tokens = SIZES[size]
    return {
        "latent": drawn("latent", (1, config.in_channels, *grid), device, dtype),
        "text": drawn("text", (1, tokens, config.text_dim), device, dtype),
        "pooled": drawn("pooled", (1, config.pooled_dim), device, dtype),
        "guidance": torch.tensor([4.0], device=device, dtype=dtype),
        "sigma": torch.tensor([0.5], device=device),  # float32 in all implementations
    }


def tokens_of(size: str) -> int:
    """Image and text tokens."""
    _, (t, h, w), text = SIZES[size]
    return t * h * w // 4 + text


def step_flops(size: str) -> dict[str, float]:
    """Multiplications and additions of one call in its blocks: those of linear layers, and of attention."""
    config = SIZES[size][0]
    n, d, blocks = tokens_of(size), config.hidden_size, config.depth_double + config.depth_single
    linear = 24.0 * n * d * d * blocks  # text or image: each token passes one stream's layers
    return {"linear": linear, "attention": 4.0 * n * n * d * blocks}
