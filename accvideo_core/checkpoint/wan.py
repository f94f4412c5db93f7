"""Wan 2.1's transformer, whose students run in ComfyUI alone: its sizes from its shapes, the shapes from its sizes, its names.

Names and shapes are Wan's own (`wan/modules/model.py` of its repository), which ComfyUI keeps; diffusers has others
(`WanTransformer3DModel`). Text-to-video reads 16 latent channels; image-to-video 36 (latent, mask, image) and CLIP's image
tokens besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError
from .layouts import Layout


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan 2.1 transformer; head width 128. `image_dim` is None for text-to-video."""

    hidden_size: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    in_channels: int
    out_channels: int
    image_dim: int | None = None
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def t2v_14b(cls) -> WanConfig:
        """The released text-to-video model, 14 288 491 584 parameters."""
        return cls(5120, 40, 40, 13824, 4096, 16, 16)

    @classmethod
    def i2v_14b(cls) -> WanConfig:
        """The released image-to-video model, 16 396 447 808 parameters."""
        return cls(5120, 40, 40, 13824, 4096, 36, 16, image_dim=1280)


_HEAD = 128
_LARGEST = 2**20

# (Wan's own, diffusers)
_NAMES: tuple[tuple[str, str], ...] = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    *((f"blocks.{{}}.self_attn.{x}", f"blocks.{{}}.attn1.to_{x}") for x in "qkv"),
    ("blocks.{}.self_attn.o", "blocks.{}.attn1.to_out.0"),
    ("blocks.{}.self_attn.norm_q", "blocks.{}.attn1.norm_q"),
    ("blocks.{}.self_attn.norm_k", "blocks.{}.attn1.norm_k"),
    ("blocks.{}.norm3", "blocks.{}.norm2"),
    *((f"blocks.{{}}.cross_attn.{x}", f"blocks.{{}}.attn2.to_{x}") for x in "qkv"),
    ("blocks.{}.cross_attn.o", "blocks.{}.attn2.to_out.0"),
    ("blocks.{}.cross_attn.norm_q", "blocks.{}.attn2.norm_q"),
    ("blocks.{}.cross_attn.norm_k", "blocks.{}.attn2.norm_k"),
    ("blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
    ("blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
    ("blocks.{}.cross_attn.norm_k_img", "blocks.{}.attn2.norm_added_k"),
    ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    ("head.head", "proj_out"),
)
_TABLES = (("blocks.{}.modulation", "blocks.{}.scale_shift_table"), ("head.modulation", "scale_shift_table"))

WAN_ORIGINAL = Layout(
    "original", "wan", tuple(((own,), own) for own, _ in _NAMES), tensors=tuple((own, own) for own, _ in _TABLES)
)
WAN_DIFFUSERS = Layout(
    "diffusers",
    "wan",
    tuple(((foreign,), own) for own, foreign in _NAMES),
    tensors=tuple((foreign, own) for own, foreign in _TABLES),
)
WAN = (WAN_ORIGINAL, WAN_DIFFUSERS)


def infer_wan_config(shapes: Mapping[str, Sequence[int]]) -> WanConfig:
    """The sizes from {original name: shape}; CheckpointError naming what is missing or impossible."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(f"the network's sizes cannot be told without the tensor {name}")
        found = tuple(shapes[name])
        if len(found) != rank or not all(0 < n < _LARGEST for n in found):
            raise CheckpointError(f"the shapes are not Wan's: {name} is {found}")
        return found

    patch, text = shape("patch_embedding.weight", 5), shape("text_embedding.0.weight", 2)
    ffn, out = shape("blocks.0.ffn.0.weight", 2), shape("head.head.weight", 2)
    time = shape("time_embedding.0.weight", 2)
    if patch[0] % _HEAD:
        raise CheckpointError(f"a network {patch[0]} wide; Wan's heads are {_HEAD} wide and divide the width")
    numbers = [int(n[1]) for name in shapes if (n := re.match(r"blocks\.(\d{1,18})\.", name))]
    layers = max(numbers, default=-1) + 1
    if layers > len(shapes):
        raise CheckpointError(f"it has a block blocks.{layers - 1} but only {len(shapes)} tensors; the names are damaged")
    return WanConfig(
        hidden_size=patch[0],
        num_heads=patch[0] // _HEAD,
        num_layers=layers,
        ffn_dim=ffn[0],
        text_dim=text[1],
        in_channels=patch[1],
        out_channels=out[0] // math.prod(patch[2:]),
        image_dim=shape("img_emb.proj.1.weight", 2)[1] if any(name.startswith("img_emb.") for name in shapes) else None,
        freq_dim=time[1],
        patch_size=(patch[2], patch[3], patch[4]),
    )


def wan_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every tensor of the network."""
    d, f = config.hidden_size, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, width: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (width,)
        if bias:
            shapes[f"{name}.bias"] = (width,)

    shapes["patch_embedding.weight"], shapes["patch_embedding.bias"] = (d, config.in_channels, *config.patch_size), (d,)
    linear("text_embedding.0", d, config.text_dim)
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", d, config.freq_dim)
    linear("time_embedding.2", d, d)
    linear("time_projection.1", 6 * d, d)
    for block in (f"blocks.{i}" for i in range(config.num_layers)):
        shapes[f"{block}.modulation"] = (1, 6, d)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", d, d)
            for part in ("norm_q", "norm_k"):
                norm(f"{block}.{attention}.{part}", d, bias=False)
        if config.image_dim is not None:
            linear(f"{block}.cross_attn.k_img", d, d)
            linear(f"{block}.cross_attn.v_img", d, d)
            norm(f"{block}.cross_attn.norm_k_img", d, bias=False)
        norm(f"{block}.norm3", d, bias=True)
        linear(f"{block}.ffn.0", f, d)
        linear(f"{block}.ffn.2", d, f)
    if config.image_dim is not None:
        norm("img_emb.proj.0", config.image_dim, bias=True)
        linear("img_emb.proj.1", config.image_dim, config.image_dim)
        linear("img_emb.proj.3", d, config.image_dim)
        norm("img_emb.proj.4", d, bias=True)
    shapes["head.modulation"] = (1, 2, d)
    linear("head.head", config.out_channels * math.prod(config.patch_size), d)
    return shapes


def wan_family(config: WanConfig) -> str:
    """The key in `schedule.PRESETS`; CheckpointError for relatives of Wan 2.1 that are sampled or run otherwise."""
    kinds = {(16, False): "wan-t2v-14b", (36, True): "wan-i2v-14b-480p"}
    kind = (config.in_channels, config.image_dim is not None)
    if kind not in kinds or config.out_channels != 16:
        raise CheckpointError(
            f"it takes {config.in_channels} latent channels {'with' if kind[1] else 'without'} image tokens and gives "
            f"{config.out_channels}: a relative of Wan 2.1; AccVideo's students are text-to-video (16, without) and "
            "image-to-video (36, with)"
        )
    return kinds[kind]
