"""What ComfyUI has or has not, by version, and how its functions are called all the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.utils
from comfy_api.latest import io


def _knows(function: Callable[..., Any], keyword: str) -> bool:
    return keyword in inspect.signature(function).parameters


DIFFERENCES = {
    "scales by module": hasattr(comfy.utils, "convert_old_quants"),
    "dynamic memory": hasattr(comfy.model_patcher, "CoreModelPatcher"),
    "loading without dynamic memory": _knows(comfy.sd.load_diffusion_model_state_dict, "disable_dynamic"),
    "latents that tell their reduction": _knows(comfy.sample.fix_empty_latent_channels, "downscale_ratio_spacial"),
    "nested latents": find_spec("comfy.nested_tensor") is not None,
}
"""What ComfyUI has or has not, by version. What the pack does in each case is told in docs/compatibility.md, row by row."""


HOLDS_QUANTISED = DIFFERENCES["scales by module"]


def call(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Call one of ComfyUI's functions with those keywords that this version of it knows: its signatures grow."""
    known = inspect.signature(function).parameters
    return function(*args, **{name: value for name, value in keywords.items() if name in known})


def advanced(given: io.Input) -> io.Input:
    """The input, tucked away on its node until somebody asks for advanced ones. ComfyUI 0.3.64 has no argument for it, but hands
    on what else an input says."""
    given.extra_dict = {**given.extra_dict, "advanced": True}
    return given
