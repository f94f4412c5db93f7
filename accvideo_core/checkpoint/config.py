"""The sizes of a network read from the shapes of its tensors, and what is wrong with a set of tensors for those sizes."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..dit import DiTConfig, HunyuanVideoDiT
from ..errors import CheckpointError
from .layouts import some
from .wan import WanConfig, infer_wan_config, wan_family, wan_shapes

NetworkConfig = DiTConfig | WanConfig

_ROPE_DIMS = (16, 56, 56)  # not visible in any shape; every HunyuanVideo has these

_LARGEST = 2**20  # no size of a real network is above it; a damaged header may say anything


def infer_config(state: Mapping[str, torch.Tensor | Sequence[int]]) -> DiTConfig:
    """The network's sizes from {original name: tensor or shape}.

    A block counts up to the highest number seen, so a missing block in between is reported by `find_differences` and not
    taken for a shallower network. Raises CheckpointError naming the tensors without which no size can be told.
    """
    shapes = {name: _shape(value) for name, value in state.items()}

    def first(*names: str) -> tuple[int, ...]:
        for name in names:
            if name in shapes:
                return shapes[name]
        raise CheckpointError(f"the network's sizes cannot be told without the tensor {' or '.join(names)}")

    patch = first("img_in.proj.weight")
    pooled = first("vector_in.in_layer.weight")
    text = first("txt_in.input_embedder.weight")
    out = first("final_layer.linear.weight")
    head = first("double_blocks.0.img_attn_q_norm.weight", "single_blocks.0.q_norm.weight")
    mlp = first("double_blocks.0.img_mlp.fc1.weight", "txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight")
    ranks = [len(shape) for shape in (patch, pooled, text, out, head, mlp)]
    if ranks != [5, 2, 2, 2, 1, 2] or not all(0 < n < _LARGEST for n in (*patch, *pooled, *text, *out, *head, *mlp)):
        found = f"img_in.proj.weight {patch}, txt_in.input_embedder.weight {text}, final_layer.linear.weight {out}"
        raise CheckpointError(f"the shapes are not HunyuanVideo's: {found}")
    hidden = patch[0]
    if head != (sum(_ROPE_DIMS),) or hidden % head[0]:
        raise CheckpointError(
            f"heads {head[0]} wide in a network {hidden} wide; HunyuanVideo's are {sum(_ROPE_DIMS)} wide and divide the width"
        )
    return DiTConfig(
        hidden_size=hidden,
        num_heads=hidden // head[0],
        depth_double=_depth(shapes, "double_blocks"),
        depth_single=_depth(shapes, "single_blocks"),
        text_dim=text[1],
        pooled_dim=pooled[1],
        in_channels=patch[1],
        out_channels=out[0] // math.prod(patch[2:]),
        patch_size=(patch[2], patch[3], patch[4]),
        rope_dims=_ROPE_DIMS,
        mlp_ratio=mlp[0] / hidden,
        refiner_depth=_depth(shapes, "txt_in.individual_token_refiner.blocks"),
        guidance_embed=any(name.startswith("guidance_in.") for name in shapes),
    )


def infer_any_config(family: str, shapes: Mapping[str, Sequence[int]]) -> NetworkConfig:
    """The sizes from {original name: shape}; `family` is the layout's: hunyuan or wan."""
    return infer_wan_config(shapes) if family == "wan" else infer_config(shapes)


def expected_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """{original name: shape} of every tensor of the network, from the network itself built without memory."""
    return wan_shapes(config) if isinstance(config, WanConfig) else dict(_network_shapes(config))


class _WithoutValues:
    """Layers that are not given initial values: without memory that is nine tenths of the time to build a network."""

    class Linear(nn.Linear):
        def reset_parameters(self) -> None:
            pass

    class Conv3d(nn.Conv3d):
        def reset_parameters(self) -> None:
            pass

    LayerNorm, RMSNorm = nn.LayerNorm, nn.RMSNorm


@functools.lru_cache(16)
def _network_shapes(config: DiTConfig) -> Mapping[str, tuple[int, ...]]:
    """Blocks of a kind are alike, so that one of each is built: half the time of opening a checkpoint otherwise."""
    depths = {"double_blocks": config.depth_double, "single_blocks": config.depth_single}
    shallow = replace(config, depth_double=min(1, config.depth_double), depth_single=min(1, config.depth_single))
    network = HunyuanVideoDiT(shallow, _WithoutValues, device="meta")
    shapes: dict[str, tuple[int, ...]] = {}
    for stem, group in itertools.groupby(network.state_dict().items(), lambda item: item[0].split(".")[0]):
        block = list(group)
        for i in range(depths.get(stem, 1)):
            shapes |= {name.replace(f"{stem}.0.", f"{stem}.{i}.", 1): tuple(tensor.shape) for name, tensor in block}
    return shapes


def family_of(config: NetworkConfig) -> str:
    """The key in `schedule.PRESETS`: HunyuanVideo reads text 4096 wide, only the tiny world another.

    Raises CheckpointError for relatives that are sampled otherwise (image-to-video takes more input channels).
    """
    if isinstance(config, WanConfig):
        return wan_family(config)
    if config.in_channels != 16 or config.out_channels != 16:
        raise CheckpointError(
            f"it takes {config.in_channels} latent channels and gives {config.out_channels}: an image-to-video relative of "
            "HunyuanVideo; AccVideo's students are text-to-video, 16 and 16"
        )
    return "hunyuan-t2v" if config.text_dim == 4096 else "tiny"


@dataclass(frozen=True)
class Differences:
    """How a set of tensors departs from what a network needs. Empty (false) when it fits exactly."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = []
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of the wrong shape", self.misshapen)):
            if names:
                parts.append(f"{len(names)} {what} ({some(names)})")
        return ", ".join(parts)


def find_differences(shapes: Mapping[str, Sequence[int]], config: NetworkConfig, unexpected: Iterable[str] = ()) -> Differences:
    """Compare {original name: shape} with the network of `config`; `unexpected` are stored names that have no original one."""
    expected = expected_shapes(config)
    misshapen = [
        f"{name} is {_by(shapes[name])} and should be {_by(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    return Differences(
        missing=tuple(name for name in expected if name not in shapes),
        unexpected=(*(name for name in shapes if name not in expected), *unexpected),
        misshapen=tuple(misshapen),
    )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape if isinstance(value, torch.Tensor) else value)


def _depth(names: Collection[str], stem: str) -> int:
    numbered = re.compile(rf"{re.escape(stem)}\.(\d{{1,18}})\.")
    numbers = [int(found[1]) for name in names if (found := numbered.match(name))]
    depth = max(numbers, default=-1) + 1
    if depth > len(names):
        raise CheckpointError(f"it has a block {stem}.{depth - 1} but only {len(names)} tensors; the names are damaged")
    return depth


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"
