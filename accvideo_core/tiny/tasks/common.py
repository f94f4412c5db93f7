"""What the parts of the tiny world's training share: where latents live, how weights are kept, contact sheets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from ...dit import HunyuanVideoDiT
from ...files import atomic_path
from ...schedule import PRESETS
from ..pipeline import TinyPipeline
from ..vae import CHANNELS

PRESET = PRESETS["tiny"]
TEACHER_STEPS, KEYS = PRESET.teacher_steps, PRESET.keys or 5
LATENT_SHAPE = (CHANNELS, 5, 8, 8)
# The two values one guidance of 6 takes in the network: 6000 in float32, 6016 in bfloat16.
GUIDANCES = (6.0, 6.016)


def to_network(frames: Tensor, device: torch.device) -> Tensor:
    """(B, T, H, W, 3) in [0, 1] -> (B, 3, T, H, W) in [-1, 1] on the device."""
    return (frames * 2 - 1).permute(0, 4, 1, 2, 3).contiguous().to(device)


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
    """Write a module's tensors; the metadata names what it was made from, and `load_tiny` holds the parts to it."""
    state = {name: t.detach().to("cpu", dtype).contiguous() for name, t in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **metadata})
    return path


def hidden_matrices(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """What Muon is for: matrices and convolutions inside a network; not those that read its input or make its output."""
    return [p for layer in layers for p in layer.parameters() if p.ndim >= 2]


def block_matrices(network: HunyuanVideoDiT) -> list[nn.Parameter]:
    return hidden_matrices([*network.double_blocks, *network.single_blocks])


def draw_guidance(count: int, generator: torch.Generator) -> Tensor:
    return torch.tensor(GUIDANCES)[torch.randint(2, (count,), generator=generator)]


SHEET_PROMPTS = (
    "a red ball moving left on a black background",
    "an azure box rising on a grey background",
    "a golden triangle",
    "a snowy disc going to the right on a teal background",
    "a violet thing falling",
    "a shape on a brown background",
)


def sample_sheet(path: Path, pipeline: TinyPipeline, steps: int) -> None:
    made = pipeline.generate(SHEET_PROMPTS, range(len(SHEET_PROMPTS)), steps)
    write_sheet(path, list(zip(SHEET_PROMPTS, made.frames, strict=True)))


def write_sheet(path: Path, rows: list[tuple[str, NDArray[np.uint8]]]) -> None:
    """A PNG with a row of stills for each label and clip (T, H, W, 3)."""
    from ...media import contact_sheet, write_png

    write_png(path, contact_sheet(rows))
