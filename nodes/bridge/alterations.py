"""What other nodes have put on a MODEL, beside patches on its weights, that changes what it makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import comfy.model_patcher
import torch

# What changes nothing of a trajectory but its rounding or its speed, or is looked at by itself. All else is taken for a change.
_OPTIONS = {
    "transformer_options",
    "disable_cfg1_optimization",  # the negative is computed at cfg 1 too
    "denoise_mask_function",  # asked only where the latent has a noise mask, and those are refused
    "torch_compile_kwargs",
    "multigpu_clones",
    "multigpu_options",
    "multigpu_thread_pool",
}
_TRANSFORMER_OPTIONS = {"optimized_attention_override", "callbacks", "wrappers", "patches", "patches_replace"}
_WRAPPERS = {"torch.compile"}
_OBJECTS = {"model_sampling", "manual_cast_dtype"}  # the schedule, which capture sets itself; the dtype to compute in


def alterations(model: comfy.model_patcher.ModelPatcher) -> list[str]:
    """Each of them as "kind name (the function that made it)", as far as it has such; empty for a model that a loader gave, with
    LoRAs or without."""
    return list(dict.fromkeys(_found(model)))


def _found(model: comfy.model_patcher.ModelPatcher) -> Iterator[str]:
    options = model.model_options.get("transformer_options", {})
    for wrappers in (model.wrappers, options.get("wrappers", {})):
        for kind, keyed in wrappers.items():
            for key, functions in keyed.items():
                if functions and key not in _WRAPPERS:
                    yield f"wrapper {kind}{_made_by(functions)}" if key is None else f"wrapper {key}"
    yield from (f"{name}{_made_by(value)}" for name, value in _beside(model.model_options, _OPTIONS))
    yield from (f"option {name}{_made_by(value)}" for name, value in _beside(options, _TRANSFORMER_OPTIONS))
    for patches in (options.get("patches", {}), options.get("patches_replace", {})):
        yield from (f"patch {name}{_made_by(value)}" for name, value in _beside(patches))
    yield from (f"injection {name}" for name, value in _beside(model.injections))
    yield from (f"weight function {name}{_made_by(value)}" for name, value in _beside(model.weight_wrapper_patches))
    for name, value in _beside(model.object_patches, _OBJECTS):
        if not isinstance(value, torch.Tensor) and not hasattr(value, "_orig_mod"):  # the fingerprint's, and torch.compile's
            yield f"replaced {name}"
    if model.hook_patches or model.forced_hooks:
        yield "hooks on its weights"


def _beside(things: Mapping[str, Any], harmless: Set[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Those that are not harmless and hold anything."""
    for name, value in things.items():
        empty = value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value)
        if name not in harmless and not empty:
            yield name, value


def _made_by(value: Any) -> str:
    """The name of the first function in there, in brackets: it tells which node to take away. "" where there is none."""
    while isinstance(value, (list, tuple, dict)) and value:
        value = next(iter(value.values() if isinstance(value, dict) else value))
    name = getattr(value, "__qualname__", "") if callable(value) else ""
    return f" ({name.partition('.<locals>')[0]})" if name else ""
