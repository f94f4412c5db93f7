"""How the weights of HunyuanVideo's transformer are named on disk, as tables.

Inside, there is one naming: Tencent's original. A `Layout` is a table of module names from a foreign naming to the
original one; `{}` stands for a block's number and `{s}` for either stream (img, txt). A tensor is its module's name and a
leaf (`.weight`, `.bias`). What is recognised only to be refused with a clear word (other naming, quantised weights, other
models) is listed here too, so that this file alone says what AccVideo knows about names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

PREFIXES = ("", "model.diffusion_model.", "model.model.", "diffusion_model.", "model.", "net.")
"""What tools put before every name of the network."""

SIGNATURE = "txt_in.individual_token_refiner."
"""Part of a name that HunyuanVideo's transformer has, in the original and the ComfyUI naming, and no other model."""


@dataclass(frozen=True)
class Layout:
    """One naming: `modules` pairs a foreign module name with the original one, `leaves` a foreign leaf with ours."""

    name: str
    modules: tuple[tuple[str, str], ...]
    leaves: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))

    @cached_property
    def _originals(self) -> dict[str, str]:
        return {f.replace("{s}", s): o.replace("{s}", s) for f, o in self.modules for s in ("img", "txt")}

    def original(self, name: str) -> str | None:
        """The original name of a stored tensor, None if this naming has no such tensor."""
        module, _, leaf = name.rpartition(".")
        number = re.search(r"blocks\.(\d+)\.", module)
        pattern = module if number is None else module.replace(number[0], "blocks.{}.", 1)
        target, new_leaf = self._originals.get(pattern), dict(self.leaves).get(leaf)
        if target is None or new_leaf is None:
            return None
        return f"{target if number is None else target.replace('{}', number[1], 1)}.{new_leaf}"


# (ComfyUI native, original). The original layout is the right-hand column onto itself.
_NAMES: tuple[tuple[str, str], ...] = (
    ("img_in.proj", "img_in.proj"),
    ("time_in.in_layer", "time_in.mlp.0"),
    ("time_in.out_layer", "time_in.mlp.2"),
    ("guidance_in.in_layer", "guidance_in.mlp.0"),
    ("guidance_in.out_layer", "guidance_in.mlp.2"),
    ("vector_in.in_layer", "vector_in.in_layer"),
    ("vector_in.out_layer", "vector_in.out_layer"),
    ("txt_in.input_embedder", "txt_in.input_embedder"),
    ("txt_in.t_embedder.in_layer", "txt_in.t_embedder.mlp.0"),
    ("txt_in.t_embedder.out_layer", "txt_in.t_embedder.mlp.2"),
    ("txt_in.c_embedder.in_layer", "txt_in.c_embedder.linear_1"),
    ("txt_in.c_embedder.out_layer", "txt_in.c_embedder.linear_2"),
    ("txt_in.individual_token_refiner.blocks.{}.norm1", "txt_in.individual_token_refiner.blocks.{}.norm1"),
    ("txt_in.individual_token_refiner.blocks.{}.norm2", "txt_in.individual_token_refiner.blocks.{}.norm2"),
    ("txt_in.individual_token_refiner.blocks.{}.self_attn.qkv", "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv"),
    ("txt_in.individual_token_refiner.blocks.{}.self_attn.proj", "txt_in.individual_token_refiner.blocks.{}.self_attn_proj"),
    ("txt_in.individual_token_refiner.blocks.{}.mlp.0", "txt_in.individual_token_refiner.blocks.{}.mlp.fc1"),
    ("txt_in.individual_token_refiner.blocks.{}.mlp.2", "txt_in.individual_token_refiner.blocks.{}.mlp.fc2"),
    (
        "txt_in.individual_token_refiner.blocks.{}.adaLN_modulation.1",
        "txt_in.individual_token_refiner.blocks.{}.adaLN_modulation.1",
    ),
    ("double_blocks.{}.{s}_mod.lin", "double_blocks.{}.{s}_mod.linear"),
    ("double_blocks.{}.{s}_attn.qkv", "double_blocks.{}.{s}_attn_qkv"),
    ("double_blocks.{}.{s}_attn.norm.query_norm", "double_blocks.{}.{s}_attn_q_norm"),
    ("double_blocks.{}.{s}_attn.norm.key_norm", "double_blocks.{}.{s}_attn_k_norm"),
    ("double_blocks.{}.{s}_attn.proj", "double_blocks.{}.{s}_attn_proj"),
    ("double_blocks.{}.{s}_mlp.0", "double_blocks.{}.{s}_mlp.fc1"),
    ("double_blocks.{}.{s}_mlp.2", "double_blocks.{}.{s}_mlp.fc2"),
    ("single_blocks.{}.linear1", "single_blocks.{}.linear1"),
    ("single_blocks.{}.linear2", "single_blocks.{}.linear2"),
    ("single_blocks.{}.norm.query_norm", "single_blocks.{}.q_norm"),
    ("single_blocks.{}.norm.key_norm", "single_blocks.{}.k_norm"),
    ("single_blocks.{}.modulation.lin", "single_blocks.{}.modulation.linear"),
    ("final_layer.linear", "final_layer.linear"),
    ("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
)

ORIGINAL = Layout("original", tuple((original, original) for _, original in _NAMES))
COMFYUI_NATIVE = Layout(
    # Older ComfyUI wrote the qk-norms' weight as `scale`.
    "comfyui-native",
    _NAMES,
    (("weight", "weight"), ("scale", "weight"), ("bias", "bias")),
)
LAYOUTS = (ORIGINAL, COMFYUI_NATIVE)

# (what it is, how its names show it). The first that matches any name is what the error says.
_REFUSED_NAMES: tuple[tuple[str, str], ...] = (
    ("a LoRA, not a whole model", r"(\.|_)lora_(A|B|up|down|mid)\.|\.lora_[AB]$|\.hada_w\d|\.lokr_w\d|\.dora_scale$"),
    ("fp8 weights with separate scales (ComfyUI scaled fp8)", r"(^|\.)scaled_fp8$|\.scale_weight$|\.scale_input$"),
    ("fp8 weights with separate scales (ComfyUI quantised)", r"\.comfy_quant$|\.weight_scale$"),
    ("HunyuanVideo in diffusers' naming", r"(^|\.)context_embedder\.token_refiner\."),
    ("HunyuanVideo 1.5", r"(^|\.)(byt5_in|vision_in|cond_type_embedding|time_r_in)\."),
)
_FOREIGN_NAMES: tuple[tuple[str, str], ...] = (
    ("Wan video", r"(^|\.)blocks\.\d+\.(self_attn|cross_attn)\.(q|k|v|o)\."),
    ("Flux", r"(^|\.)(double_blocks\.\d+\.img_attn\.|transformer_blocks\.\d+\.norm1_context\.)"),
    ("Stable Diffusion", r"(^|\.)(input_blocks|output_blocks|down_blocks|up_blocks|middle_block|joint_blocks)\."),
    ("LTX or another diffusers transformer", r"(^|\.)transformer_blocks\.\d+\."),
    ("a VAE", r"(^|\.)(decoder|encoder)\.(conv_in|mid|up|down|up_blocks|down_blocks)\b"),
    ("a text encoder", r"(^|\.)(text_model|embed_tokens|token_embedding|shared)\b|layers\.\d+\.(self_attn|mlp)\.\w+_proj\."),
)


def recognise(names: Iterable[str]) -> tuple[Layout, str, dict[str, str | None]]:
    """Find the naming and the prefix that explain most of `names`.

    Returns (layout, prefix, {stored name: original name or None where it belongs to no tensor of the network}).
    Raises ValueError saying what the names look like if they are not of a layout that can be read.
    """
    names = list(names)
    for what, pattern in _REFUSED_NAMES:
        seen = next((n for n in names if re.search(pattern, n)), None)
        if seen is not None:
            raise ValueError(f"it holds {what} (tensor {seen}), which cannot be read yet")
    if not any(SIGNATURE in n for n in names):
        seen_as = next((f"{what} (tensor {n})" for what, p in _FOREIGN_NAMES for n in names if re.search(p, n)), None)
        raise ValueError(
            f"it looks like {seen_as}, not HunyuanVideo" if seen_as else f"its tensors ({some(names)}) are not HunyuanVideo's"
        )

    def translate(layout: Layout, prefix: str) -> dict[str, str | None]:
        return {n: layout.original(n[len(prefix) :]) if n.startswith(prefix) else None for n in names}

    choices = [(layout, prefix, translate(layout, prefix)) for layout in LAYOUTS for prefix in PREFIXES]
    layout, prefix, table = max(choices, key=lambda c: sum(o is not None for o in c[2].values()))
    if not any(table.values()):
        stem = next(n for n in names if SIGNATURE in n).split(SIGNATURE)[0]
        raise ValueError(
            f"its names begin with {stem!r}, a prefix that is not known (known: {', '.join(p for p in PREFIXES if p)})"
        )
    return layout, prefix, table


def some(names: Iterable[str], limit: int = 10) -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
