"""Patches on a MODEL's weights, which ComfyUI applies, offloads and removes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.weight_adapter
import torch

from ...accvideo_core.errors import InvalidValueError


class _ComputedDifference(comfy.weight_adapter.WeightAdapterBase):
    """A patch whose difference is computed by `accvideo_core.lora` from the weight it meets: LoHa, LoKr, DoRA.

    ComfyUI's own adapters know these forms, but not all of their spellings, and take another norm for DoRA.
    """

    name = "accvideo"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        # (function, tensors): ComfyUI copies an adapter by these two arguments, moving the tensors it finds in `weights`.
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[torch.Tensor], torch.Tensor],
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        compute, tensors = self.weights
        weight += function((strength * compute(weight, tensors)).to(weight.device, weight.dtype))
        return weight


def low_rank_patch(up: torch.Tensor, down: torch.Tensor, scale: float) -> Any:
    """ComfyUI's own patch for weight + strength * scale * up @ down; up (out, rank), down (rank, in)."""
    return comfy.weight_adapter.LoRAAdapter(set(), (up, down, scale * len(down), None, None, None))


def difference_patch(value: torch.Tensor) -> Any:
    """ComfyUI's own patch for weight + strength * value."""
    return ("diff", (value,))


def computed_patch(compute: Callable[[torch.Tensor, tuple], torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> Any:
    """A patch for weight + strength * compute(weight, tensors)."""
    return _ComputedDifference(set(), (compute, tensors))


Patch = tuple[str, tuple[int, int] | None, Any, float]
"""(name as in `tensor_shapes`, (start, length) of its rows or None for all, patch, strength)."""


def with_patches(model: comfy.model_patcher.ModelPatcher, patches: Iterable[Patch]) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL with patches on its weights, in their order; ComfyUI applies, offloads and removes them.

    Raises InvalidValueError for a name that the network does not have, which ComfyUI would pass over.
    """
    clone = model.clone()
    passed_over = _parameters_beside_modules(model.model.diffusion_model)
    # ComfyUI takes a strength and a dict, so a key only once at a time, and every time goes through the whole network. Each
    # patch goes into the first round of its strength that keeps the order on its tensor; tensors do not mind one another.
    rounds: list[tuple[float, dict[Any, Any]]] = []
    latest: dict[str, int] = {}
    for name, rows, patch, strength in patches:
        key = f"diffusion_model.{name}"
        if name in passed_over:
            _replace_parameter(clone, key, (strength, patch, 1.0, None if rows is None else (0, *rows), None))
            continue
        place = key if rows is None else (key, (0, *rows))
        fits = (i for i in range(latest.get(name, 0), len(rounds)) if rounds[i][0] == strength and place not in rounds[i][1])
        latest[name] = next(fits, len(rounds))
        if latest[name] == len(rounds):
            rounds.append((strength, {}))
        rounds[latest[name]][1][place] = patch
    for strength, places in rounds:
        if missing := set(places) - set(clone.add_patches(places, strength)):
            raise InvalidValueError(
                f"this model has no {', '.join(sorted(map(str, missing)))[:300]}; connect the model they are of"
            )
    return clone


def _parameters_beside_modules(network: torch.nn.Module) -> set[str]:
    """Parameters of modules that have modules with parameters inside (Wan's modulations): ComfyUI patches no such weight."""
    found = set()
    for name, module in network.named_modules():
        own = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
        if own and len(own) < sum(1 for _ in module.parameters()):
            found.update(own)
    return found


def _replace_parameter(clone: comfy.model_patcher.ModelPatcher, key: str, patch: tuple[Any, ...]) -> None:
    """Put the patched value in place of a parameter for as long as this MODEL is loaded: an object patch."""
    old = clone.get_model_object(key)
    with torch.inference_mode(False):
        value = comfy.lora.calculate_weight([patch], old.detach().to(torch.float32, copy=True), key).to(old.dtype)
        clone.add_object_patch(key, torch.nn.Parameter(value, requires_grad=False))
