"""HunyuanVideo, and the tiny world that is built like it: the network is our own `dit`, which gives features itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import load_student, save_original
from ...dit import Conditioning, HunyuanVideoDiT
from ...synvid.capture import Texts, conditioning_of
from .base import Adapter


class HunyuanAdapter(Adapter):
    """`HunyuanVideoDiT` under its original names; embedded guidance, no classifier-free one. Families hunyuan-t2v and tiny."""

    @staticmethod
    def family_of(network: nn.Module) -> str | None:
        if not isinstance(network, HunyuanVideoDiT):
            return None
        return "hunyuan-t2v" if network.config.text_dim == 4096 else "tiny"

    def velocity(self, network: nn.Module, latent: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        predicted: Tensor = network(latent, sigma, conditioning)
        return predicted

    def features(self, network: nn.Module, latent: Tensor, sigma: Tensor, conditioning: Any, block: str) -> Tensor:
        _, found = network(latent, sigma, conditioning, features=(block,), stop_early=True)
        tokens: Tensor = found[block]
        return tokens

    def block_names(self, network: nn.Module) -> tuple[str, ...]:
        return _own(network).block_names()

    def width(self, network: nn.Module) -> int:
        return _own(network).config.hidden_size

    def patch(self, network: nn.Module) -> tuple[int, int, int]:
        return _own(network).config.patch_size

    def conditioning(self, texts: Texts, guidance: float | None) -> Conditioning:
        return conditioning_of(texts, guidance)

    def check_text(self, network: nn.Module, text: Tensor, pooled: Tensor | None) -> None:
        config = _own(network).config
        self.check_widths((text.shape[-1], None if pooled is None else len(pooled)), (config.text_dim, config.pooled_dim))

    def embeds_guidance(self, network: nn.Module) -> bool:
        return _own(network).guidance_in is not None

    def load(self, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> HunyuanVideoDiT:
        return load_student(path, device, dtype)

    def export(self, state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        save_original(path, state, metadata)

    def original(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from state.items()

    def set_checkpointing(self, network: nn.Module, on: bool) -> None:
        _own(network).checkpointing = on


def _own(network: nn.Module) -> HunyuanVideoDiT:
    assert isinstance(network, HunyuanVideoDiT), f"{type(network).__name__} is no HunyuanVideoDiT"
    return network
