"""How the weights of HunyuanVideo's transformer are named on disk, as tables.

Inside, there is one naming: Tencent's original. A `Layout` is a table of module names from a foreign naming to the
original one; `{}` stands for a block's number and `{s}` for either stream (img, txt). A tensor is its module's name and a
leaf (`.weight`, `.bias`). What is recognised only to be refused with a clear word (other naming, quantised weights, other
models) is listed here too, so that this file alone says what AccVideo knows about names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

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
        module, number, leaf = split_name(name)
        target, new_leaf = self._originals.get(module), dict(self.leaves).get(leaf)
        return None if target is None or new_leaf is None else f"{target.replace('{}', number)}.{new_leaf}"


def split_name(name: str) -> tuple[str, str, str]:
    """A tensor's (module with `{}` for its block's number, that number or "", leaf)."""
    module, _, leaf = name.rpartition(".")
    number = re.search(r"blocks\.(\d+)\.", module)
    return (module, "", leaf) if number is None else (module.replace(number[0], "blocks.{}.", 1), number[1], leaf)


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

# (original, diffusers). Several names are the fused rows in order, each as many as the network is wide, the last the rest.
_REFINER = "txt_in.individual_token_refiner.blocks.{}."
_DIFFUSERS_REFINER = "context_embedder.token_refiner.refiner_blocks.{}."
DIFFUSERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("img_in.proj", ("x_embedder.proj",)),
    ("time_in.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    ("guidance_in.mlp.0", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.mlp.2", ("time_text_embed.guidance_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("txt_in.input_embedder", ("context_embedder.proj_in",)),
    ("txt_in.t_embedder.mlp.0", ("context_embedder.time_text_embed.timestep_embedder.linear_1",)),
    ("txt_in.t_embedder.mlp.2", ("context_embedder.time_text_embed.timestep_embedder.linear_2",)),
    ("txt_in.c_embedder.linear_1", ("context_embedder.time_text_embed.text_embedder.linear_1",)),
    ("txt_in.c_embedder.linear_2", ("context_embedder.time_text_embed.text_embedder.linear_2",)),
    (_REFINER + "norm1", (_DIFFUSERS_REFINER + "norm1",)),
    (_REFINER + "norm2", (_DIFFUSERS_REFINER + "norm2",)),
    (_REFINER + "self_attn_qkv", tuple(_DIFFUSERS_REFINER + f"attn.to_{x}" for x in "qkv")),
    (_REFINER + "self_attn_proj", (_DIFFUSERS_REFINER + "attn.to_out.0",)),
    (_REFINER + "mlp.fc1", (_DIFFUSERS_REFINER + "ff.net.0.proj",)),
    (_REFINER + "mlp.fc2", (_DIFFUSERS_REFINER + "ff.net.2",)),
    (_REFINER + "adaLN_modulation.1", (_DIFFUSERS_REFINER + "norm_out.linear",)),
    ("double_blocks.{}.img_mod.linear", ("transformer_blocks.{}.norm1.linear",)),
    ("double_blocks.{}.img_attn_qkv", tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv")),
    ("double_blocks.{}.img_attn_q_norm", ("transformer_blocks.{}.attn.norm_q",)),
    ("double_blocks.{}.img_attn_k_norm", ("transformer_blocks.{}.attn.norm_k",)),
    ("double_blocks.{}.img_attn_proj", ("transformer_blocks.{}.attn.to_out.0",)),
    ("double_blocks.{}.img_mlp.fc1", ("transformer_blocks.{}.ff.net.0.proj",)),
    ("double_blocks.{}.img_mlp.fc2", ("transformer_blocks.{}.ff.net.2",)),
    ("double_blocks.{}.txt_mod.linear", ("transformer_blocks.{}.norm1_context.linear",)),
    ("double_blocks.{}.txt_attn_qkv", tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv")),
    ("double_blocks.{}.txt_attn_q_norm", ("transformer_blocks.{}.attn.norm_added_q",)),
    ("double_blocks.{}.txt_attn_k_norm", ("transformer_blocks.{}.attn.norm_added_k",)),
    ("double_blocks.{}.txt_attn_proj", ("transformer_blocks.{}.attn.to_add_out",)),
    ("double_blocks.{}.txt_mlp.fc1", ("transformer_blocks.{}.ff_context.net.0.proj",)),
    ("double_blocks.{}.txt_mlp.fc2", ("transformer_blocks.{}.ff_context.net.2",)),
    (
        "single_blocks.{}.linear1",
        (*(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.{}.proj_mlp"),
    ),
    ("single_blocks.{}.linear2", ("single_transformer_blocks.{}.proj_out",)),
    ("single_blocks.{}.q_norm", ("single_transformer_blocks.{}.attn.norm_q",)),
    ("single_blocks.{}.k_norm", ("single_transformer_blocks.{}.attn.norm_k",)),
    ("single_blocks.{}.modulation.linear", ("single_transformer_blocks.{}.norm.linear",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)
DIFFUSERS_SWAPPED = ("final_layer.adaLN_modulation.1",)
"""Modules whose two halves of rows stand the other way round in diffusers (shift, scale here; scale, shift there)."""

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


def to_diffusers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A whole network's tensors under diffusers' names: fused rows split, the final layer's halves swapped (views where
    possible). KeyError for a name that is not an original one."""
    width, table = state["img_in.proj.weight"].shape[0], dict(DIFFUSERS)
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        module, number, leaf = split_name(name)
        names = [f"{target.replace('{}', number)}.{leaf}" for target in table[module]]
        if module in DIFFUSERS_SWAPPED:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        parts = tensor.split([width] * (len(names) - 1) + [len(tensor) - width * (len(names) - 1)])
        out.update(zip(names, parts, strict=True))
    return out


def some(names: Iterable[str], limit: int = 10) -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
