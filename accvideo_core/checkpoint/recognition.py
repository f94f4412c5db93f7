"""Which naming and prefix explain a file's tensor names; what is no such model is refused by what its names look like."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from .layouts import HUNYUAN, PREFIXES, SIGNATURE, Layout, Place, some
from .wan import WAN

LAYOUTS: tuple[Layout, ...] = (*HUNYUAN, *WAN)

_LORA = (
    r"\.lora_(up|down|mid)\.|\.lora_[AB](\.|$)|[._]lora\.(up|down)\.|\.lora_linear_layer\.|\.lora_magnitude_vector"
    r"|\.(hada_[wt]|lokr_[wt])\d|\.dora_scale$|\.diff(_[bm])?$|\.[wb]_norm$|\.set_weight$"
)
# (what it is, how its names show it). The first that matches any name is what the error says.
_REFUSED_NAMES: tuple[tuple[str, str], ...] = (
    ("a LoRA, not a whole model", _LORA),
    ("weights of bitsandbytes", r"\.weight\.(absmax|quant_map|quant_state)\b|\.SCB$"),
    ("HunyuanVideo 1.5", r"(^|\.)(byt5_in|vision_in|cond_type_embedding|time_r_in)\."),
)
_FOREIGN_NAMES: tuple[tuple[str, str], ...] = (
    ("Flux", r"(^|\.)(double_blocks\.\d+\.img_attn\.|transformer_blocks\.\d+\.norm1_context\.)"),
    ("Stable Diffusion", r"(^|\.)(input_blocks|output_blocks|down_blocks|up_blocks|middle_block|joint_blocks)\."),
    ("LTX or another diffusers transformer", r"(^|\.)transformer_blocks\.\d+\."),
    ("a VAE", r"(^|\.)(decoder|encoder)\.(conv_in|conv1|mid|middle|up|down|upsamples|up_blocks|down_blocks)\b"),
    ("a text encoder", r"(^|\.)(text_model|embed_tokens|token_embedding|shared)\b|layers\.\d+\.(self_attn|mlp)\.\w+_proj\."),
)
_SIGNATURES: tuple[str, ...] = (
    re.escape(SIGNATURE),
    r"context_embedder\.token_refiner\.",
    r"blocks\.\d+\.cross_attn\.(norm_)?[qk]\.",
    r"condition_embedder\.(time_proj|text_embedder)\b",
)


def is_lora(names: Iterable[str]) -> bool:
    """Whether the names are those of a LoRA."""
    return any(re.search(_LORA, name) for name in names)


def recognise(names: Iterable[str]) -> tuple[Layout, str, dict[str, Place | None]]:
    """Find the naming and the prefix that explain most of `names`.

    Returns (layout, prefix, {stored name: its place, or None where it belongs to no tensor of the network}).
    Raises ValueError saying what the names look like if they are not of a layout that can be read.
    """
    names = list(names)
    for what, pattern in _REFUSED_NAMES:
        seen = next((n for n in names if re.search(pattern, n)), None)
        if seen is not None:
            raise ValueError(f"it holds {what} (tensor {seen}), which is not read as a checkpoint")
    signed = next((f for n in names for s in _SIGNATURES if (f := re.search(s, n))), None)
    if signed is None:
        seen_as = next((f"{what} (tensor {n})" for what, p in _FOREIGN_NAMES for n in names if re.search(p, n)), None)
        raise ValueError(
            f"it looks like {seen_as}, not HunyuanVideo or Wan 2.1"
            if seen_as
            else f"its tensors ({some(names)}) are neither HunyuanVideo's nor Wan 2.1's"
        )

    layout, prefix, table, most = LAYOUTS[0], "", dict.fromkeys(names), -1
    prefixes = [prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names)]
    for choice in itertools.product(LAYOUTS, prefixes):
        found = _translate(names, *choice)
        if (score := sum(place is not None for place in found.values())) > most:
            (layout, prefix), table, most = choice, found, score
        if most == len(names):
            break
    if not any(table.values()):
        stem = signed.string[: signed.start()]
        raise ValueError(
            f"its names begin with {stem!r}, a prefix that is not known (known: {', '.join(p for p in PREFIXES if p)})"
        )
    return layout, prefix, table


def _translate(names: list[str], layout: Layout, prefix: str) -> dict[str, Place | None]:
    return {name: layout.place(name[len(prefix) :]) if name.startswith(prefix) else None for name in names}
