"""A stack of LoRAs on a MODEL: each change as a native patch, and a report of what was applied and what was not.

ComfyUI's own patches are used for the forms it has (factors, differences), so that whatever else it does with patches works;
what it computes otherwise or not at all (LoHa, LoKr, DoRA) is computed by `accvideo_core.lora`, as in a merge.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..accvideo_core.checkpoint import find_student
from ..accvideo_core.checkpoint.layouts import some
from ..accvideo_core.errors import InvalidValueError, LoraError
from ..accvideo_core.lora import Lora, LoraModule, LoraPart, LoraUse, read_lora
from ..accvideo_core.lora.adapters import DIFFERENCE, LOW_RANK
from ..accvideo_core.lora.names import comfyui_name
from . import bridge
from .advice import MadeFor

log = logging.getLogger("accvideo")
KINDS = {"hunyuan-video": "HunyuanVideo", "wan": "WAN"}  # family of a LoRA: how ComfyUI's name of its models begins


@dataclass(frozen=True)
class StackedLora:
    """One LoRA of a stack: its name in ComfyUI's list, and the use to make of it."""

    name: str
    use: LoraUse


@dataclass(frozen=True)
class _Loaded:
    """A tensor in memory with the face of `adapters.StoredTensor`, for a LoRA whose file is closed by the time it is used."""

    key: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor


def _computed(parts: list[tuple[LoraPart, float]]) -> Any:
    """A patch that adds all `parts`, each times its factor, computed from the weight as it is before any of them."""
    tensors = tuple(stored.read() for part, _ in parts for stored in part.tensors.values())

    def compute(weight: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        given = iter(tensors)
        flat = weight.float().reshape(len(weight), -1)
        total = torch.zeros_like(flat)
        for part, factor in parts:
            loaded = {role: _Loaded(s.key, next(given).to(flat.device)) for role, s in part.tensors.items()}
            start, length = part.rows or (0, len(flat))
            total[start : start + length] += factor * replace(part, tensors=loaded).delta(flat[start : start + length])
        return total.reshape(weight.shape)

    return bridge.computed_patch(compute, tensors)


def _patch(part: LoraPart, shape: tuple[int, ...]) -> Any:
    """One part as ComfyUI's own patch where it has one for that form, for a weight (or its rows) of `shape`."""
    if part.form == LOW_RANK:
        down, up = part.low_rank()
        return bridge.low_rank_patch(up, down, part.scale)
    if part.form == DIFFERENCE:
        value = part.delta().reshape(shape)
        return bridge.difference_patch(value.to(part.tensors["value"].dtype) if part.scale == 1 else value)
    return _computed([(replace(part, rows=None), 1.0)])


def make_patches(
    tensors: Mapping[str, list[tuple[LoraModule, float]]], native: Mapping[str, tuple[str, tuple[int, ...]]]
) -> list[bridge.Patch]:
    """Patches for {original tensor: what LoRAs do to it, and how strongly}; `native` gives each its name and shape there.

    What depends on the weight (DoRA) comes first on each tensor and at once, so that it sees the weight without the others,
    as in a merge.
    """
    patches: list[bridge.Patch] = []
    for tensor, changes in tensors.items():
        name, shape = native[tensor]
        parts = [(part, factor) for module, factor in changes for part in module.parts]
        if dependent := [(part, factor) for part, factor in parts if part.needs_weight]:
            patches.append((name, None, _computed(dependent), 1.0))
        for part, factor in parts:
            if not part.needs_weight:
                rows = shape if part.rows is None else (part.rows[1], *shape[1:])
                patches.append((name, part.rows, _patch(part, rows), factor))
    return patches


def native_name(tensor: str, family: str, shapes: Mapping[str, Any]) -> str | None:
    """What a MODEL calls an original tensor; None if it has none. Older ComfyUI calls a qk-norm's weight `scale`."""
    module, _, leaf = tensor.rpartition(".")
    if leaf not in ("weight", "bias"):
        return tensor if tensor in shapes else None
    stem = comfyui_name(module, family)
    return next((f"{stem}.{x}" for x in (leaf, "scale" if leaf == "weight" else leaf) if f"{stem}.{x}" in shapes), None)


def apply_stack(model: Any, stack: Iterable[StackedLora], allow_unmatched: bool = False) -> tuple[Any, str]:
    """(MODEL with every LoRA of the stack as native patches, report).

    Raises LoraError for a LoRA of another model, and, unless allowed, for keys and modules that this model has not.
    """
    shapes = bridge.tensor_shapes(model)
    tensors: dict[str, list[tuple[LoraModule, float]]] = {}
    native: dict[str, tuple[str, tuple[int, ...]]] = {}
    reports: list[str] = []
    opened: list[Lora] = []
    made_for: MadeFor | None = None
    try:
        for entry in stack:
            lora = read_lora(entry.use.path, allow_unmatched)
            opened.append(lora)
            if not bridge.model_kind(model).startswith(KINDS[lora.family]):
                raise LoraError(
                    f"{entry.name} is a LoRA for {lora.family}, but the model is a {bridge.model_kind(model)}; "
                    "choose one of its family"
                )
            misfits: dict[str, str] = {}
            applied: dict[str, LoraModule] = {}
            elsewhere: dict[str, LoraModule] = {}
            for tensor, module in lora.modules.items():
                if not (factor := entry.use.factor(tensor)):
                    elsewhere[tensor] = module
                elif (name := native_name(tensor, lora.family, shapes)) is None:
                    misfits[tensor] = "the model has no such tensor"
                elif why := module.misfit(shapes[name]):
                    misfits[tensor] = why
                else:
                    applied[tensor] = module
                    native[tensor] = name, shapes[name]
                    tensors.setdefault(tensor, []).append((module, factor))
            if misfits and not allow_unmatched:
                named = some([f"{tensor}: {why}" for tensor, why in misfits.items()], 3)
                raise LoraError(
                    f"{entry.name}: {len(misfits)} of {len(lora.modules)} tensors do not fit this model ({named}); choose a LoRA "
                    "of this model, or allow unmatched keys to leave them out"
                )
            if places := entry.use.blocks.unused(shapes):
                raise InvalidValueError(
                    f"blocks {entry.use.blocks.text!r}: this model has nothing at {', '.join(places)}; leave that out"
                )
            if not applied and entry.use.strength:
                raise LoraError(
                    f"{entry.name} changes nothing of this model within blocks {entry.use.blocks.text!r}; widen the blocks"
                )
            reports.append(_report(entry, lora, applied, elsewhere, misfits))
            if entry.use.strength > 0 and (student := find_student(entry.name, lora.metadata)) is not None:
                made_for = MadeFor("student", student.steps)
        patched = bridge.with_patches(model, make_patches(tensors, native))
        if made_for is not None:
            bridge.note(patched, made_for)
    finally:
        for lora in opened:
            lora.close()
    report = "\n".join(reports)
    for line in report.splitlines():
        log.info("AccVideo: %s", line)
    return patched, report


def _sources(modules: Iterable[LoraModule]) -> list[str]:
    """Modules as the file names them, each once."""
    return list(dict.fromkeys(part.source for module in modules for part in module.parts))


def _report(
    entry: StackedLora,
    lora: Lora,
    applied: Mapping[str, LoraModule],
    elsewhere: Mapping[str, LoraModule],
    misfits: Mapping[str, str],
) -> str:
    done = _sources(applied.values())
    held_back = [source for source in _sources(elsewhere.values()) if source not in set(done)]
    unfit = [source for source in _sources(lora.modules[tensor] for tensor in misfits) if source not in set(done)]
    total = len(_sources(lora.modules.values()))
    where = "" if entry.use.blocks.text == "all" else f" on blocks {entry.use.blocks.text}"
    lines = [f"{entry.name} ({lora.format}): {len(done)} of {total} modules applied, strength {entry.use.strength:g}{where}"]
    if held_back:
        lines.append(f"  left out by strength 0 or blocks: {len(held_back)} modules ({some(held_back)})")
    if places := entry.use.blocks.unused(lora.modules):
        lines.append(f"  NOT APPLIED: it has no module in {', '.join(places)}")
    if unfit:
        lines.append(f"  NOT APPLIED: {len(unfit)} modules that do not fit this model ({some(unfit)})")
    if lora.unmatched:
        lines.append(f"  NOT APPLIED: {len(lora.unmatched)} keys that are not understood ({some(lora.unmatched)})")
    reasons: dict[str, list[str]] = {}
    for key, why in lora.ignored.items():
        reasons.setdefault(why, []).append(key)
    lines += [f"  ignored, {why}: {len(keys)} keys ({some(keys)})" for why, keys in reasons.items()]
    return "\n".join(lines)
