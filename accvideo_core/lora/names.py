"""How LoRA files name the modules of HunyuanVideo and Wan, as tables.

A LoRA's key is a prefix, a module's name and a suffix. Trainers use three namings of one network (Tencent's original,
ComfyUI's native, diffusers'), with dots or, in kohya's manner, with underscores. Here every such name leads to a `Target`:
the original module and, where diffusers splits what the original fuses, which rows of it. The HunyuanVideo tables are the
checkpoint reader's own (`checkpoint/layouts.py`); Wan's follow diffusers' conversion script for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoint.layouts import COMFYUI_NATIVE, DIFFUSERS, DIFFUSERS_SWAPPED

HUNYUAN_VIDEO, WAN = "hunyuan-video", "wan"
ORIGINAL_NAMES, COMFYUI_NAMES, DIFFUSERS_NAMES = "original", "comfyui-native", "diffusers"

PREFIXES = (
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "Hunyuan_video_I2V_lora_",
    "lora_transformer_",
    "lora_unet__",
    "lora_unet_",
    "lycoris_",
    "",
)
"""What tools put before a module's name; the longest that fits is taken."""

# (original, diffusers) of Wan 2.1, text- and image-to-video. ComfyUI's native names are the original ones.
_WAN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("patch_embedding", ("patch_embedding",)),
    ("text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
    ("text_embedding.2", ("condition_embedder.text_embedder.linear_2",)),
    ("time_embedding.0", ("condition_embedder.time_embedder.linear_1",)),
    ("time_embedding.2", ("condition_embedder.time_embedder.linear_2",)),
    ("time_projection.1", ("condition_embedder.time_proj",)),
    ("img_emb.proj.0", ("condition_embedder.image_embedder.norm1",)),
    ("img_emb.proj.1", ("condition_embedder.image_embedder.ff.net.0.proj",)),
    ("img_emb.proj.3", ("condition_embedder.image_embedder.ff.net.2",)),
    ("img_emb.proj.4", ("condition_embedder.image_embedder.norm2",)),
    *((f"blocks.{{}}.self_attn.{x}", (f"blocks.{{}}.attn1.to_{x}",)) for x in "qkv"),
    ("blocks.{}.self_attn.o", ("blocks.{}.attn1.to_out.0",)),
    ("blocks.{}.self_attn.norm_q", ("blocks.{}.attn1.norm_q",)),
    ("blocks.{}.self_attn.norm_k", ("blocks.{}.attn1.norm_k",)),
    *((f"blocks.{{}}.cross_attn.{x}", (f"blocks.{{}}.attn2.to_{x}",)) for x in "qkv"),
    ("blocks.{}.cross_attn.o", ("blocks.{}.attn2.to_out.0",)),
    ("blocks.{}.cross_attn.norm_q", ("blocks.{}.attn2.norm_q",)),
    ("blocks.{}.cross_attn.norm_k", ("blocks.{}.attn2.norm_k",)),
    ("blocks.{}.cross_attn.k_img", ("blocks.{}.attn2.add_k_proj",)),
    ("blocks.{}.cross_attn.v_img", ("blocks.{}.attn2.add_v_proj",)),
    ("blocks.{}.cross_attn.norm_k_img", ("blocks.{}.attn2.norm_added_k",)),
    ("blocks.{}.norm3", ("blocks.{}.norm2",)),
    ("blocks.{}.ffn.0", ("blocks.{}.ffn.net.0.proj",)),
    ("blocks.{}.ffn.2", ("blocks.{}.ffn.net.2",)),
    ("head.head", ("proj_out",)),
)
# Parameters that are no module's weight or bias, by the module whose `diff_m` changes them.
_WAN_PARAMETERS = {"blocks.{}": "blocks.{}.modulation", "head": "head.modulation"}
# Layers without parameters, which some extractions list all the same, with a difference of zero.
_WITHOUT_PARAMETERS = {
    HUNYUAN_VIDEO: (r"double_blocks\.\{\}\.(img|txt)_norm[12]", r"single_blocks\.\{\}\.pre_norm", r"final_layer\.norm_final"),
    WAN: (r"blocks\.\{\}\.norm[12]", r"head\.norm"),
}

_NUMBER = re.compile(r"(blocks[._])(\d{1,6})(?=[._]|$)")


@dataclass(frozen=True)
class Target:
    """Where a named module lies in the original network.

    module   original name, `part` of `parts` of its rows (0 of 1: all of them); the last part may be of another size
    swapped  the two halves of its rows stand the other way round there
    naming   which naming the name belongs to, for saying what a file is
    """

    module: str
    part: int
    parts: int
    swapped: bool
    naming: str


def _table(family: str) -> dict[str, Target]:
    """{template of a name with dots: target}; where namings share a name, the original one stands for it."""
    table: dict[str, Target] = {}
    for original, names in DIFFUSERS if family == HUNYUAN_VIDEO else _WAN:
        swapped = family == HUNYUAN_VIDEO and original in DIFFUSERS_SWAPPED
        for i, name in enumerate(names):
            table[name] = Target(original, i, len(names), swapped, DIFFUSERS_NAMES)
        table[original] = Target(original, 0, 1, False, ORIGINAL_NAMES)
    if family == HUNYUAN_VIDEO:
        for native, original in COMFYUI_NATIVE.modules:
            for stream in ("img", "txt"):
                target = Target(original.replace("{s}", stream), 0, 1, False, COMFYUI_NAMES)
                table.setdefault(native.replace("{s}", stream), target)
    return table


def _underscored(table: dict[str, Target]) -> dict[str, Target]:
    return {name.replace(".", "_"): target for name, target in reversed(table.items())}


_DOTTED = {family: _table(family) for family in (HUNYUAN_VIDEO, WAN)}
_TABLES = {family: _underscored(table) | table for family, table in _DOTTED.items()}
_TO_DIFFUSERS = {HUNYUAN_VIDEO: dict(DIFFUSERS), WAN: dict(_WAN)}
_TO_COMFYUI = {o.replace("{s}", s): n.replace("{s}", s) for n, o in COMFYUI_NATIVE.modules for s in ("img", "txt")}


def find(name: str, family: str) -> tuple[str, Target] | None:
    """(prefix, target) of a module as a LoRA file names it; None for one that the network does not have."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            template, number = template_of(name[len(prefix) :])
            target = _TABLES[family].get(template)
            if target is not None:
                module = target.module.replace("{}", number)
                return prefix, Target(module, target.part, target.parts, target.swapped, target.naming)
    return None


def find_parameter(name: str, family: str) -> str | None:
    """The parameter that `<name>.diff_m` changes: Wan's modulations, which belong to no layer."""
    if family == WAN:
        for prefix in PREFIXES:
            if name.startswith(prefix):
                template, number = template_of(name[len(prefix) :])
                for module, parameter in _WAN_PARAMETERS.items():
                    if template in (module, module.replace(".", "_")):
                        return parameter.replace("{}", number)
    return None


def has_no_parameters(name: str, family: str) -> bool:
    """Whether the named layer exists in the network but has nothing that a LoRA could change."""
    templates = [template_of(name[len(prefix) :])[0] for prefix in PREFIXES if name.startswith(prefix)]
    patterns = _WITHOUT_PARAMETERS[family]
    return any(re.fullmatch(p, t) or re.fullmatch(p.replace(r"\.", "_"), t) for p in patterns for t in templates)


def family_of_names(names: Iterable[str]) -> str | None:
    """The family whose table knows more of `names`; None if neither knows any. Blocks decide: both have a `proj_out`."""
    counts = dict.fromkeys(_TABLES, 0)
    for name in names:
        for family in counts:
            found = find(name, family)
            counts[family] += 0 if found is None else 1000 if "blocks" in found[1].module else 1
            counts[family] += find_parameter(name, family) is not None
    best = max(counts, key=lambda family: counts[family])
    return best if counts[best] else None


def template_of(name: str) -> tuple[str, str]:
    """A module's name with `{}` for its block's number, and that number ("" if it is in no block)."""
    number = _NUMBER.search(name)
    return (name, "") if number is None else (name[: number.start(2)] + "{}" + name[number.end(2) :], number[2])


def comfyui_name(module: str, family: str) -> str:
    """ComfyUI's native name of an original module."""
    template, number = template_of(module)
    return module if family == WAN else _TO_COMFYUI[template].replace("{}", number)


def diffusers_names(module: str, family: str) -> tuple[tuple[str, ...], bool]:
    """diffusers' names of an original module, one for each part of its rows, and whether the halves of the rows swap."""
    template, number = template_of(module)
    names = tuple(name.replace("{}", number) for name in _TO_DIFFUSERS[family][template])
    return names, family == HUNYUAN_VIDEO and template in DIFFUSERS_SWAPPED
