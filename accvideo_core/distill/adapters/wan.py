"""Wan 2.1's text-to-video transformer (arXiv 2503.20314), and each expert of Wan 2.2's, as diffusers' WanTransformer3DModel.

It differs from HunyuanVideo in all that an adapter is about: no pooled text, no embedded guidance (its teachers need real
classifier-free guidance, which capture does), text filled up with zeros to 512 tokens that are attended to, blocks of one kind,
a forward that gives no features, other names on disk. Its timestep is 1000 * sigma.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...checkpoint import WanConfig, open_checkpoint, write_safetensors
from ...checkpoint.config import find_differences
from ...checkpoint.convert import diffusers_config
from ...checkpoint.wan import WAN_DIFFUSERS, infer_wan_config
from ...errors import AccVideoError, CheckpointError, InvalidValueError, MissingExtraError, SynVidError
from ...synvid.capture import Texts
from .base import Adapter

TEXT_TOKENS = 512
_FLOAT32 = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}  # diffusers keeps these whatever the dtype


@dataclass(frozen=True)
class WanTexts:
    """text (B, 512, text_dim), zeros after each row's valid tokens."""

    text: Tensor

    def to(self, device: torch.device | str | None = None) -> WanTexts:
        return WanTexts(self.text.to(device))

    def rows(self, index: Any) -> WanTexts:
        return WanTexts(self.text[index])


class WanAdapter(Adapter):
    """`WanTransformer3DModel` without image input, from and to Wan's own names. Networks are Any: diffusers has no types."""

    @staticmethod
    def family_of(network: Any) -> str | None:
        names = {kind.__name__ for kind in type(network).__mro__}
        return "wan-t2v-14b" if "WanTransformer3DModel" in names and network.config.image_dim is None else None

    def velocity(self, network: Any, latent: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        self.grid(network, latent.shape)  # the network would cut off what makes no whole patch
        if latent.shape[1] != network.config.in_channels:
            raise InvalidValueError(f"the latent must be (B, {network.config.in_channels}, T, H, W), got {tuple(latent.shape)}")
        dtype = getattr(network, "compute_dtype", None) or network.patch_embedding.weight.dtype
        predicted: Tensor = network(
            hidden_states=latent.to(dtype),
            timestep=sigma.float() * 1000.0,
            encoder_hidden_states=conditioning.text.to(dtype),
            return_dict=False,
        )[0]
        return predicted.to(latent.dtype)

    def features(self, network: Any, latent: Tensor, sigma: Tensor, conditioning: Any, block: str) -> Tensor:
        self.check_block(network, block)
        with _ending_after(network, int(block.removeprefix("blocks."))) as tap:
            ended = self.velocity(network, latent, sigma, conditioning)
        # Through what the network returns: that is where sharding sees a gradient come, and gathers the weights for it.
        return tap.tokens + 0 * ended.sum().to(tap.tokens.dtype)

    def block_names(self, network: Any) -> tuple[str, ...]:
        return tuple(f"blocks.{i}" for i in range(network.config.num_layers))

    def width(self, network: Any) -> int:
        return int(network.config.num_attention_heads * network.config.attention_head_dim)

    def patch(self, network: Any) -> tuple[int, int, int]:
        frames, height, width = network.config.patch_size
        return frames, height, width

    def conditioning(self, texts: Texts, guidance: float | None) -> WanTexts:
        if guidance is not None:
            raise InvalidValueError(f"guidance is {guidance}, but Wan embeds none; use classifier-free guidance (cfg)")
        if texts.pooled is not None or texts.text.shape[1] > TEXT_TOKENS:
            found = f"{texts.text.shape[1]} tokens and {'a' if texts.pooled is not None else 'no'} pooled vector"
            raise SynVidError(f"a batch of texts with {found}; Wan's have at most {TEXT_TOKENS} and none: encode them for Wan")
        text = texts.text if texts.mask is None else torch.where(texts.mask[..., None], texts.text, 0.0)
        return WanTexts(pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1])))

    def check_text(self, network: Any, text: Tensor, pooled: Tensor | None) -> None:
        self.check_widths((text.shape[-1], None if pooled is None else len(pooled)), (network.config.text_dim, None))

    def embeds_guidance(self, network: Any) -> bool:
        return False

    def load(self, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        kind = _transformer()
        with open_checkpoint(path) as checkpoint:
            if not isinstance(checkpoint.config, WanConfig) or checkpoint.config.image_dim is not None:
                raise CheckpointError(f"{path} is of the family {checkpoint.family}, not {self.family}; choose another file")
            dtype = checkpoint.compute_dtype if dtype is None else dtype
            with torch.device("meta"):
                network: Any = kind.from_config(diffusers_config(checkpoint.config))
            state = {}
            for key in checkpoint:
                (name,) = WAN_DIFFUSERS.stored(key)
                own = torch.float32 if _FLOAT32 & set(name.split(".")) else dtype
                state[name] = checkpoint.read(key).to(device=device, dtype=own)
        network.load_state_dict(state, strict=True, assign=True)
        # The only buffers, which no file has: they were computed without memory, too.
        config = network.config
        network.rope = type(network.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len).to(device)
        return network.eval()

    def export(self, state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        tensors = dict(self.original(state))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        try:
            differences = find_differences(shapes, infer_wan_config(shapes))
        except AccVideoError as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error
        if differences:
            raise CheckpointError(f"cannot write {path}: the tensors do not fit the network: {differences}")
        write_safetensors(path, tensors, metadata)

    def original(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            yield WAN_DIFFUSERS.original(name) or name, tensor

    def set_checkpointing(self, network: Any, on: bool) -> None:
        (network.enable_gradient_checkpointing if on else network.disable_gradient_checkpointing)()


class _Tap(nn.Module):
    """Stands after the last block that is needed and keeps what comes out of it."""

    tokens: Tensor

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        self.tokens = tokens
        return tokens


@contextlib.contextmanager
def _ending_after(network: Any, block: int) -> Iterator[_Tap]:
    """The network runs to that block alone: its forward sees a shorter list of blocks, while all stay registered, so that
    sharding, which looks for them at the first call, finds them. A hook would not be seen by a compiled block."""
    tap = _Tap()
    vars(network)["blocks"] = [*network.blocks[: block + 1], tap]
    try:
        yield tap
    finally:
        del vars(network)["blocks"]


def _transformer() -> Any:
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise MissingExtraError("Wan needs", "diffusers", "text") from error
    return WanTransformer3DModel
