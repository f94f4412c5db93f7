"""GPU memory of the workflows, computed before anyone measured it: the tables of docs/workflows.md.

    python docs/memory.py

weights   parameters times the bytes they are kept in; Linear weights alone are quantised
sampling  what ComfyUI keeps free while it samples. Its rule, the same in 0.3.64 and 0.33.0: latent places x bytes of a value x
          0.01 MiB x a factor of the architecture, and 1.2 GiB beside. What of the weights then does not fit lies in RAM and is
          copied to the card in every step.
counted   the largest sum of the tensors that exist at one time while this project's network runs once in bf16, without weights;
          counted on PyTorch's meta device, which computes no values. To see what the rule leaves over.
decoding  the same count for the HunyuanVideo VAE's decoder on one tile.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.checkpoint import WanConfig, expected_shapes
from accvideo_core.dit import Conditioning, DiTConfig, HunyuanVideoDiT
from accvideo_core.dit.attention import KERNELS

MIB, GIB = 2**20, 2**30
HUNYUAN = DiTConfig.hunyuan_video()
WAN_T2V = WanConfig(5120, 40, 40, 13824, 4096, 16, 16)
WAN_I2V = WanConfig(5120, 40, 40, 13824, 4096, 36, 16, image_dim=1280)
FACTORS = {HUNYUAN: 1.8, WAN_T2V: 5120 / 2222, WAN_I2V: 5120 / 2222}
# Bytes of a Linear's weight. Q4_K_S holds some matrices in more than 4.5 bits; 4.83 is its file of 7.74 GB.
KEPT = {"bf16": 2.0, "fp8": 1.0, "GGUF Q8_0": 34 / 32, "GGUF Q4_K_S": 4.83 / 8}
BESIDE = 1.2 * GIB  # ComfyUI's least free memory of 0.8 GiB and 0.4 GiB for other programs
TEXT = 256  # tokens
# GB, as `counted_decoding` finds them: (pixels, frames) of a tile
DECODING = {(256, 32): 4.4, (256, 64): 9.1, (512, 64): 36.2}
ENCODERS = {"HunyuanVideo": 9.3e9, "Wan": 6.7e9}  # bytes of the text encoders' files: fp8 Llama 3 with CLIP-L, fp8 UMT5


def weight_bytes(config: DiTConfig | WanConfig, kept: str) -> float:
    """Of the whole network."""
    shapes = expected_shapes(config)
    linear = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight"))
    return linear * KEPT[kept] + (sum(map(math.prod, shapes.values())) - linear) * 2


def latent_shape(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """(T, H, W) of the latent of a video."""
    return (frames - 1) // 4 + 1, height // 8, width // 8


def sampling_bytes(config: DiTConfig | WanConfig, video: tuple[int, int, int]) -> float:
    """What ComfyUI keeps free for a (width, height, frames), by its rule."""
    return math.prod(latent_shape(*video)) * 2 * 0.01 * FACTORS[config] * MIB + BESIDE


class _Live(TorchDispatchMode):
    """Adds up the tensors that exist after each operation."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {tensor.untyped_storage()._cdata for tensor in network.state_dict().values()}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.weights:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@contextlib.contextmanager
def _attention_without_scores() -> Iterator[None]:
    """As the fused kernels: nothing but the result is stored."""
    functions, kernel = torch.nn.functional, KERNELS["sdpa"]
    original = functions.scaled_dot_product_attention
    functions.scaled_dot_product_attention = lambda query, *_, **__: torch.empty_like(query)
    KERNELS["sdpa"] = replace(kernel, run=functions.scaled_dot_product_attention)
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, KERNELS["sdpa"] = original, kernel


def counted_bytes(network: torch.nn.Module, *inputs: Any) -> int:
    """The largest sum of tensors, weights and inputs left out, while a network on the meta device runs once."""
    with torch.no_grad(), _attention_without_scores(), _Live(network) as live:
        network(*inputs)
    return live.peak


def counted_sampling(video: tuple[int, int, int]) -> int:
    """Of one call of the HunyuanVideo network in bf16."""
    network = HunyuanVideoDiT(HUNYUAN, device="meta").bfloat16()
    latent = torch.empty(1, 16, *latent_shape(*video), device="meta", dtype=torch.bfloat16)
    text = torch.empty(1, TEXT, HUNYUAN.text_dim, device="meta", dtype=torch.bfloat16)
    pooled = torch.empty(1, 768, device="meta", dtype=torch.bfloat16)
    one = torch.ones(1, device="meta")
    return counted_bytes(network, latent, one, Conditioning(text, pooled, one))


def counted_decoding(tile: int, frames: int) -> int:
    """Of the HunyuanVideo VAE's decoder in bf16 on a tile of so many pixels and frames."""
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo().bfloat16().eval()
    latent = torch.empty(1, 16, *latent_shape(tile, tile, frames), device="meta", dtype=torch.bfloat16)
    return counted_bytes(vae.decoder, latent)


@dataclass(frozen=True)
class Setting:
    """A row of the table by card: a video (width, height, frames) and how it is made; tile: VAEDecodeTiled's (pixels, frames)."""

    card: int  # GB as cards are sold, of 2**30 bytes
    family: str
    config: DiTConfig | WanConfig
    kept: str
    video: tuple[int, int, int]
    tile: tuple[int, int]

    @property
    def on_card(self) -> float:
        """Bytes of weights that stay on the card beside what ComfyUI keeps free."""
        room = self.card * GIB - sampling_bytes(self.config, self.video)
        return min(max(room, 0.0), weight_bytes(self.config, self.kept))

    @property
    def streamed(self) -> float:
        """Bytes of weights that lie in RAM and are copied in every step."""
        return weight_bytes(self.config, self.kept) - self.on_card


SMALL, MEDIUM, HIGH = (640, 368, 61), (960, 544, 93), (1280, 720, 129)
SETTINGS = (
    Setting(8, "HunyuanVideo", HUNYUAN, "GGUF Q4_K_S", SMALL, (256, 32)),
    Setting(8, "Wan", WAN_T2V, "GGUF Q4_K_S", (640, 368, 49), (256, 32)),
    Setting(12, "HunyuanVideo", HUNYUAN, "GGUF Q4_K_S", (960, 544, 61), (256, 32)),
    Setting(12, "Wan", WAN_T2V, "fp8", (832, 480, 49), (256, 32)),
    Setting(16, "HunyuanVideo", HUNYUAN, "fp8", MEDIUM, (256, 64)),
    Setting(16, "Wan", WAN_T2V, "fp8", (832, 480, 81), (256, 64)),
    Setting(24, "HunyuanVideo", HUNYUAN, "fp8", MEDIUM, (256, 64)),
    Setting(24, "HunyuanVideo", HUNYUAN, "fp8", HIGH, (256, 64)),
    Setting(24, "Wan", WAN_T2V, "fp8", (832, 480, 81), (256, 64)),
    Setting(48, "HunyuanVideo", HUNYUAN, "bf16", HIGH, (512, 64)),
    Setting(48, "Wan", WAN_T2V, "bf16", (832, 480, 81), (512, 64)),
    Setting(80, "HunyuanVideo", HUNYUAN, "bf16", HIGH, (512, 64)),
    Setting(80, "Wan", WAN_T2V, "bf16", (832, 480, 81), (512, 64)),
)


def cards() -> str:
    """Markdown: settings by card."""
    lines = [
        "| card | model | weights | video | kept free for sampling | weights on the card | from RAM in each step | RAM "
        "| decode tile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for it in SETTINGS:
        width, height, frames = it.video
        ram = weight_bytes(it.config, it.kept) + ENCODERS[it.family]
        figures = (sampling_bytes(it.config, it.video), it.on_card, it.streamed, ram)
        lines.append(
            f"| {it.card} GB | {it.family} | {it.kept} | {width} x {height} x {frames} | "
            + " | ".join(f"{figure / 1e9:.1f}" for figure in figures)
            + f" | {it.tile[0]} px, {it.tile[1]} frames |"
        )
    return "\n".join(lines)


def counts() -> str:
    """Markdown: ComfyUI's rule beside what is counted, and decoding by tile."""
    lines = ["| HunyuanVideo | ComfyUI keeps free | counted |", "|---|---|---|"]
    for video in (SMALL, MEDIUM, HIGH):
        kept = (sampling_bytes(HUNYUAN, video) - BESIDE) / 1e9
        lines.append(f"| sampling {' x '.join(map(str, video))} | {kept:.1f} | {counted_sampling(video) / 1e9:.1f} |")
    tiles = dict.fromkeys(it.tile for it in SETTINGS)
    lines += [
        f"| decoding a tile of {px} px, {frames} frames | | {counted_decoding(px, frames) / 1e9:.1f} |" for px, frames in tiles
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(cards(), counts(), sep="\n\n")
