"""LoRA files as other tools read them: from original modules to their keys, as a table of formats.

Everywhere the scale is 1: alpha, where it is written, is the rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .names import COMFYUI_PREFIX, DIFFUSERS_PREFIX, KOHYA_PREFIX, comfyui_name, diffusers_names


@dataclass(frozen=True)
class Change:
    """What is written of one original tensor: a pair (down (rank, columns), up (rows, rank)) or a difference of its shape."""

    tensor: str
    pair: tuple[torch.Tensor, torch.Tensor] | None = None
    difference: torch.Tensor | None = None


Written = tuple[dict[str, torch.Tensor], dict[str, str]]


def write_comfyui(changes: Mapping[str, Change], family: str) -> Written:
    """ComfyUI's native names: loads everywhere in ComfyUI, biases and norms included. Wan's modulations go by `diff_m`."""
    return _with_differences(changes, lambda module: COMFYUI_PREFIX + comfyui_name(module, family)), {}


def write_kohya(changes: Mapping[str, Change], family: str) -> Written:
    """musubi-tuner's names: original ones with underscores. ComfyUI's own loader knows only two thirds of them."""
    return _with_differences(changes, lambda module: KOHYA_PREFIX + module.replace(".", "_")), {}


def _with_differences(changes: Mapping[str, Change], name: Callable[[str], str]) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for tensor, change in changes.items():
        module, leaf = _split(tensor)
        stem = name(module)
        if change.pair is not None:
            down, up = change.pair
            out[f"{stem}.lora_down.weight"], out[f"{stem}.lora_up.weight"] = down, up
            out[f"{stem}.alpha"] = torch.tensor(float(len(down)))
        else:
            assert change.difference is not None
            out[f"{stem}.{_DIFFERENCE_LEAVES[leaf]}"] = change.difference
    return out


_DIFFERENCE_LEAVES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}


def write_peft(changes: Mapping[str, Change], family: str) -> Written:
    """diffusers' names and PEFT's keys, fused rows split (they share A), for `load_lora_weights`.

    Every weight must be a pair; a bias goes beside its weight's pair, and with a bias anywhere PEFT expects one everywhere.
    """
    out: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    with_bias = any(_split(tensor)[1] == "bias" for tensor in changes)
    for module in dict.fromkeys(_split(tensor)[0] for tensor in changes):
        pair, bias = changes[f"{module}.weight"].pair, changes.get(f"{module}.bias")
        assert pair is not None, module
        names, swapped = diffusers_names(module, family)
        down, up = pair
        zeros = torch.zeros(len(up), dtype=up.dtype)
        shifts = _rows(zeros if bias is None or bias.difference is None else bias.difference, names, swapped, down.shape[1])
        for name, part, shift in zip(names, _rows(up, names, swapped, down.shape[1]), shifts, strict=True):
            stem = DIFFUSERS_PREFIX + name
            out[f"{stem}.lora_A.weight"], out[f"{stem}.lora_B.weight"] = down.clone(), part
            ranks[name] = len(down)
            if with_bias:
                out[f"{stem}.lora_B.bias"] = shift
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes a pattern for the end of a name: `proj_out` alone would also be every `single_transformer_blocks.N.proj_out`.
    others = {"^" + re.escape(name): r for name, r in ranks.items() if r != rank}
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_bias": with_bias,
    }
    return out, {"lora_adapter_metadata": json.dumps({f"{DIFFUSERS_PREFIX}{key}": value for key, value in settings.items()})}


def _rows(tensor: torch.Tensor, names: tuple[str, ...], swapped: bool, width: int) -> list[torch.Tensor]:
    """The rows of each part: all but the last as wide as the network, which is what their inputs are."""
    if swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    sizes = [width] * (len(names) - 1)
    return [part.contiguous() for part in tensor.split([*sizes, len(tensor) - sum(sizes)])]


def _split(tensor: str) -> tuple[str, str]:
    module, _, leaf = tensor.rpartition(".")
    return module, leaf


@dataclass(frozen=True)
class KeyFormat:
    """A manner of naming. `only_pairs`: a weight must be a low-rank pair, and only biases can stand beside one."""

    write: Callable[[Mapping[str, Change], str], Written]
    only_pairs: bool = False


KEY_FORMATS = {
    "comfyui": KeyFormat(write_comfyui),
    "kohya": KeyFormat(write_kohya),
    "peft": KeyFormat(write_peft, only_pairs=True),
}
