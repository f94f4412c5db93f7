"""How the weights of HunyuanVideo's transformer are named on disk, as tables.

Inside, there is one naming: Tencent's original. A `Layout` is a table of module names from a foreign naming to the
original one; `{}` stands for a block's number and `{s}` for either stream (img, txt). A tensor is its module's name and a
leaf (`.weight`, `.bias`). Wan's tables are in `wan.py`; how a file's names are matched with all of them, and what is
recognised only to be refused with a clear word, stands in `recognition.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

PREFIXES = ("", "model.diffusion_model.", "model.model.", "diffusion_model.", "model.", "net.")
"""What tools put before every name of the network."""

SIGNATURE = "txt_in.individual_token_refiner."
"""Part of a name that HunyuanVideo's transformer has, in the original and the ComfyUI naming, and no other model."""


@dataclass(frozen=True)
class Place:
    """Where a stored tensor belongs: rows of the original tensor `name`, as part `index` of `count` stacked in that order."""

    name: str
    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Layout:
    """One naming.

    family   first word of the families it belongs to: hunyuan, wan
    modules  (foreign module names, original one): several foreign ones are the rows of the original, stacked in order
    leaves   (foreign leaf, ours)
    tensors  (foreign, original) names of parameters that are no layer's weight or bias
    swapped  original modules whose two halves of rows stand the other way round in this naming
    scales   original modules whose weight is written as `scale`, which every version of ComfyUI reads
    """

    name: str
    family: str
    modules: tuple[tuple[tuple[str, ...], str], ...]
    leaves: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))
    tensors: tuple[tuple[str, str], ...] = ()
    swapped: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()

    @cached_property
    def _places(self) -> dict[str, tuple[str, int, int]]:
        return {
            name.replace("{s}", s): (original.replace("{s}", s), index, len(foreign))
            for foreign, original in self.modules
            for index, name in enumerate(foreign)
            for s in ("img", "txt")
        }

    @cached_property
    def _foreign(self) -> dict[str, tuple[str, ...]]:
        return {o.replace("{s}", s): tuple(n.replace("{s}", s) for n in f) for f, o in self.modules for s in ("img", "txt")}

    @cached_property
    def _tensors(self) -> dict[str, str]:
        return dict(self.tensors)

    @cached_property
    def _leaves(self) -> dict[str, str]:
        return dict(self.leaves)

    def place(self, name: str) -> Place | None:
        """Where a stored tensor belongs, None if this naming has no such tensor."""
        whole, number = _unnumbered(name)
        if (target := self._tensors.get(whole)) is not None:
            return Place(target.replace("{}", number))
        module, number, leaf = split_name(name)
        found, new_leaf = self._places.get(module), self._leaves.get(leaf)
        if found is None or new_leaf is None:
            return None
        return Place(f"{found[0].replace('{}', number)}.{new_leaf}", *found[1:])

    def original(self, name: str) -> str | None:
        """The original name of a stored tensor (or of that whose rows it holds), None if this naming has no such tensor."""
        place = self.place(name)
        return None if place is None else place.name

    def stored(self, name: str) -> tuple[str, ...]:
        """The names this layout gives to an original tensor, in the order of its rows. KeyError for no original name."""
        whole, number = _unnumbered(name)
        for foreign, original in self.tensors:
            if original == whole:
                return (foreign.replace("{}", number),)
        module, number, leaf = split_name(name)
        if leaf == "weight" and module in self.scales:
            leaf = "scale"
        return tuple(f"{foreign.replace('{}', number)}.{leaf}" for foreign in self._foreign[module])

    def is_swapped(self, name: str) -> bool:
        """Whether the two halves of this original tensor stand the other way round here."""
        return split_name(name)[0] in self.swapped


def split_name(name: str) -> tuple[str, str, str]:
    """A tensor's (module with `{}` for its block's number, that number or "", leaf)."""
    module, _, leaf = name.rpartition(".")
    return (*_unnumbered(module), leaf)


_NUMBER = re.compile(r"blocks\.(\d+)\.")


@lru_cache(8192)  # every layout asks the same of a file's names
def _unnumbered(name: str) -> tuple[str, str]:
    number = _NUMBER.search(name)
    return (name, "") if number is None else (name.replace(number[0], "blocks.{}.", 1), number[1])


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

ORIGINAL = Layout("original", "hunyuan", tuple(((original,), original) for _, original in _NAMES))
COMFYUI_NATIVE = Layout(
    # Older ComfyUI wrote the qk-norms' weight as `scale`.
    "comfyui-native",
    "hunyuan",
    tuple(((native,), original) for native, original in _NAMES),
    (("weight", "weight"), ("scale", "weight"), ("bias", "bias")),
    scales=tuple(o.replace("{s}", s) for _, o in _NAMES if o.endswith(("q_norm", "k_norm")) for s in ("img", "txt")),
)

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

HUNYUAN_DIFFUSERS = Layout(
    "diffusers", "hunyuan", tuple((foreign, original) for original, foreign in DIFFUSERS), swapped=DIFFUSERS_SWAPPED
)
HUNYUAN = (ORIGINAL, COMFYUI_NATIVE, HUNYUAN_DIFFUSERS)


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
