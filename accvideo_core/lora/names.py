"""How LoRA files name the modules of HunyuanVideo and Wan, as tables.

A LoRA's key is a prefix, a module's name and a suffix. Trainers use three namings of one network (Tencent's original,
ComfyUI's native, diffusers'), with dots or, in kohya's manner, with underscores. Here every such name leads to a `Target`:
the original module and, where diffusers splits what the original fuses, which rows of it. The tables of names are the
checkpoint reader's (`checkpoint/layouts.py`, `checkpoint/wan.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from ..checkpoint.layouts import COMFYUI_NATIVE, HUNYUAN_DIFFUSERS, ORIGINAL, Layout
from ..checkpoint.wan import WAN_DIFFUSERS, WAN_ORIGINAL

HUNYUAN_VIDEO, WAN = "hunyuan-video", "wan"
ORIGINAL_NAMES, COMFYUI_NAMES, DIFFUSERS_NAMES = ORIGINAL.name, COMFYUI_NATIVE.name, HUNYUAN_DIFFUSERS.name


class Dialect(NamedTuple):
    """What one file's names are read as: original and ComfyUI names go together, diffusers' stand alone, because some words
    mean another layer there (Wan's `norm2` is `norm3` in the original)."""

    family: str
    naming: str


DIALECTS: dict[Dialect, tuple[Layout, ...]] = {
    Dialect(HUNYUAN_VIDEO, ORIGINAL_NAMES): (ORIGINAL, COMFYUI_NATIVE),
    Dialect(HUNYUAN_VIDEO, DIFFUSERS_NAMES): (HUNYUAN_DIFFUSERS,),
    Dialect(WAN, ORIGINAL_NAMES): (WAN_ORIGINAL,),
    Dialect(WAN, DIFFUSERS_NAMES): (WAN_DIFFUSERS,),
}

COMFYUI_PREFIX, DIFFUSERS_PREFIX, KOHYA_PREFIX = "diffusion_model.", "transformer.", "lora_unet_"
PREFIXES = (
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    COMFYUI_PREFIX,
    DIFFUSERS_PREFIX,
    "Hunyuan_video_I2V_lora_",
    "lora_transformer_",
    "lora_unet__",
    KOHYA_PREFIX,
    "lycoris_",
    "",
)
"""What tools put before a module's name; the longest that fits is taken."""

# Layers without parameters, which some extractions list all the same, with a difference of zero.
_WITHOUT_PARAMETERS = {
    HUNYUAN_VIDEO: (r"double_blocks\.\{\}\.(img|txt)_norm[12]", r"single_blocks\.\{\}\.pre_norm", r"final_layer\.norm_final"),
    WAN: (r"blocks\.\{\}\.norm[12]", r"head\.norm"),
}

_Value = TypeVar("_Value")
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


def _table(dialect: Dialect) -> dict[str, Target]:
    """{template of a name with dots: target}; where namings share a name, the first listed, the original, stands for it."""
    table: dict[str, Target] = {}
    for layout in DIALECTS[dialect]:
        for foreign, original in layout.modules:
            for stream in ("img", "txt"):
                module = original.replace("{s}", stream)
                for i, name in enumerate(foreign):
                    target = Target(module, i, len(foreign), original in layout.swapped, layout.name)
                    table.setdefault(name.replace("{s}", stream), target)
    return table


def _parameters(dialect: Dialect) -> dict[str, str]:
    """{name: original name} of parameters that are no module's weight or bias; `blocks.0` stands for `blocks.0.modulation`."""
    table = {foreign: original for layout in DIALECTS[dialect] for foreign, original in layout.tensors}
    return table | {original.rpartition(".")[0]: original for original in table.values()}


def _with_underscores(table: dict[str, _Value]) -> dict[str, _Value]:
    return {name.replace(".", "_"): value for name, value in reversed(table.items())} | table


_TABLES = {dialect: _with_underscores(_table(dialect)) for dialect in DIALECTS}
_PARAMETERS = {dialect: _with_underscores(_parameters(dialect)) for dialect in DIALECTS}


def find(name: str, dialect: Dialect) -> tuple[str, Target] | None:
    """(prefix, target) of a module as a LoRA file names it; None for one that the network does not have."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            template, number = template_of(name[len(prefix) :])
            target = _TABLES[dialect].get(template)
            if target is not None:
                return prefix, replace(target, module=target.module.replace("{}", number))
    return None


def find_parameter(name: str, dialect: Dialect) -> str | None:
    """The parameter that a name stands for (Wan's modulations, which belong to no layer), None for any other name."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            template, number = template_of(name[len(prefix) :])
            if (parameter := _PARAMETERS[dialect].get(template)) is not None:
                return parameter.replace("{}", number)
    return None


def has_no_parameters(name: str, dialect: Dialect) -> bool:
    """Whether the named layer exists in the network but has nothing that a LoRA could change."""
    templates = [template_of(name[len(prefix) :])[0] for prefix in PREFIXES if name.startswith(prefix)]
    patterns = _WITHOUT_PARAMETERS[dialect.family]
    return any(re.fullmatch(p, t) or re.fullmatch(p.replace(r"\.", "_"), t) for p in patterns for t in templates)


def dialect_of(names: Iterable[str]) -> Dialect | None:
    """The dialect that knows most of `names`, None if none knows any. Blocks decide: both families have a `proj_out`."""
    counts = dict.fromkeys(DIALECTS, 0)
    for name in names:
        for dialect in DIALECTS:
            found = find(name, dialect)
            counts[dialect] += 0 if found is None else 1000 if "blocks" in found[1].module else 1
            counts[dialect] += find_parameter(name, dialect) is not None
    best = max(DIALECTS, key=lambda dialect: counts[dialect])
    return best if counts[best] else None


def template_of(name: str) -> tuple[str, str]:
    """A module's name with `{}` for its block's number, and that number ("" if it is in no block)."""
    number = _NUMBER.search(name)
    return (name, "") if number is None else (name[: number.start(2)] + "{}" + name[number.end(2) :], number[2])


def comfyui_name(module: str, family: str) -> str:
    """ComfyUI's native name of an original module; Wan's are its own."""
    return module if family == WAN else COMFYUI_NATIVE.stored(f"{module}.weight")[0].rpartition(".")[0]


def diffusers_names(module: str, family: str) -> tuple[tuple[str, ...], bool]:
    """diffusers' names of an original module, one for each part of its rows, and whether the halves of the rows swap."""
    layout = HUNYUAN_DIFFUSERS if family == HUNYUAN_VIDEO else WAN_DIFFUSERS
    names = layout.stored(f"{module}.weight")
    return tuple(name.rpartition(".")[0] for name in names), layout.is_swapped(f"{module}.weight")
