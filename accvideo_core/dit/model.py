"""HunyuanVideo's transformer (Tencent, arXiv 2412.03603), exact, under its original parameter names.

ComfyUI builds its own copy for inference; this one trains, captures headless and shards. Tests prove the two equal.
Shapes: B batch, C channels, T latent frames, H W latent height and width, N image tokens, L text length, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..devices import autocast_now
from ..errors import InvalidValueError
from .attention import Call, settle
from .config import DiTConfig
from .layers import (
    DoubleStreamBlock,
    FinalLayer,
    MLPEmbedder,
    PatchEmbed,
    SingleStreamBlock,
    TokenRefiner,
    VectorEmbedder,
    rope_table,
)

if TYPE_CHECKING:  # needs torch.distributed, which not every build of torch has
    from torch.distributed import ProcessGroup

    from .sequence import Split


@dataclass(frozen=True)
class Conditioning:
    """What the network is told besides the latent.

    text (B, L, text_dim), pooled (B, P), guidance (B,) in plain scale (6.0) or None for a network without it,
    text_mask (B, L) bool, True at valid tokens, which come first; None when every token is valid.
    """

    text: Tensor
    pooled: Tensor
    guidance: Tensor | None = None
    text_mask: Tensor | None = None

    def to(self, device: torch.device | str | None = None) -> Conditioning:
        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            text=self.text.to(device),
            pooled=self.pooled.to(device),
            guidance=move(self.guidance),
            text_mask=move(self.text_mask),
        )

    def rows(self, index: Any) -> Conditioning:
        """The rows that `index` (a slice, a list or a tensor) selects."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[index]

        return Conditioning(self.text[index], self.pooled[index], pick(self.guidance), pick(self.text_mask))


class HunyuanVideoDiT(nn.Module):
    """Velocity of the flow at a noisy latent. Build on `device="meta"` to look at shapes without memory.

    ops          namespace of Linear, LayerNorm, RMSNorm and Conv3d (torch.nn, or a host's casting layers)
    checkpointing (attribute) recomputes each block in the backward pass to save memory
    attention_kernel (attribute) names the kernel of `dit.attention`, or "auto"; the few text tokens of the refiner always
                 attend by "sdpa"
    attention_ran (attribute) the kernel that the blocks' last call attended by, None before
    sequence_group (attribute) the processes, each with the same inputs, that share the tokens of a sample; None for one alone
    """

    def __init__(self, config: DiTConfig, ops: Any = nn, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.attention_kernel = "sdpa"
        self.attention_ran: str | None = None
        self.sequence_group: ProcessGroup | None = None
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        dim, heads, inner = config.hidden_size, config.num_heads, config.mlp_dim
        self.img_in = PatchEmbed(config.patch_size, config.in_channels, dim, ops, **kw)
        self.txt_in = TokenRefiner(config.text_dim, dim, heads, inner, config.refiner_depth, ops, **kw)
        self.time_in = MLPEmbedder(256, dim, ops, **kw)
        self.vector_in = VectorEmbedder(config.pooled_dim, dim, ops, **kw)
        self.guidance_in = MLPEmbedder(256, dim, ops, **kw) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(dim, heads, inner, ops, **kw) for _ in range(config.depth_double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(dim, heads, inner, ops, **kw) for _ in range(config.depth_single))
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size) * config.out_channels, ops, **kw)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> HunyuanVideoDiT:
        """Initialise for training from scratch: Xavier weights, zero biases, and zero modulation and output layers, so
        that every block starts as the identity (adaLN-Zero, as in DiT). Reproducible from a seed."""
        generator = None if seed is None else torch.Generator(next(self.parameters()).device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif "mod.linear" in name or "modulation" in name or name.startswith("final_layer"):
                parameter.zero_()
            elif "time_in" in name or "guidance_in" in name or "t_embedder" in name:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in: that of its patch embedding."""
        return self.img_in.proj.weight.dtype

    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks in the order they run, as `features` takes them."""
        return (
            *(f"double_blocks.{i}" for i in range(self.config.depth_double)),
            *(f"single_blocks.{i}" for i in range(self.config.depth_single)),
        )

    def forward(
        self, latent: Tensor, sigma: Tensor, conditioning: Conditioning, features: Sequence[str] = (), stop_early: bool = False
    ) -> Any:
        """Velocity (B, C, T, H, W) at `latent` (B, C, T, H, W) with noise levels `sigma` (B,) in [0, 1].

        features    block names; then the result is (velocity, {name: image tokens after that block (B, N, D)})
        stop_early  with features: end after the last block asked for and return None as the velocity
        The result has the latent's dtype. Raises InvalidValueError for sizes that do not divide into patches, unknown
        block names and masks whose valid tokens do not come first.
        """
        wanted = self._check(latent, features)
        grid = tuple(n // p for n, p in zip(latent.shape[2:], self.config.patch_size, strict=True))
        dtype = self.dtype

        text, lengths = trim_text(conditioning.text, conditioning.text_mask)
        t = sigma.float() * 1000.0
        vec = self.time_in(t, dtype) + self.vector_in(conditioning.pooled.to(dtype))
        if self.guidance_in is not None:
            if conditioning.guidance is None:
                raise InvalidValueError("this network embeds guidance; set Conditioning.guidance (6.0 for HunyuanVideo)")
            # 6 is 6016 in bfloat16, as in the pipelines the weights were trained in; to weights in float32 under autocast, too.
            guidance = conditioning.guidance.to(autocast_now(latent.device) or dtype)
            vec = vec + self.guidance_in(guidance * 1000.0, dtype)

        txt = self.txt_in(text.to(dtype), t, lengths, "sdpa")
        img = self.img_in(latent.to(dtype))
        n, split = img.shape[1], None
        if self.sequence_group is not None:
            from .sequence import Split

            split = Split.over(self.sequence_group, n, self.config.num_heads)
            img = split.cut(img)
        key_lengths = None if lengths is None else tuple(n + length for length in lengths)
        # Here, and not in the blocks: those may be compiled, and a kernel's test cannot be.
        tokens, head_dim = n + txt.shape[1], self.config.head_dim
        elements = len(latent) * tokens * self.config.hidden_size
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in chain((img, txt), self.parameters()))
        call = Call(latent.device, dtype, head_dim, tokens, tokens, elements, gradients=gradients)
        self.attention_ran = kernel = settle(self.attention_kernel, call, key_lengths)
        rope = rope_table(grid, self.config.rope_dims, self.config.rope_theta, latent.device, txt.shape[1])

        found: dict[str, Tensor] = {}
        for i, block in enumerate(self.double_blocks):
            img, txt = self._run(block, img, txt, vec, rope, key_lengths, kernel, split)
            if f"double_blocks.{i}" in wanted:
                found[f"double_blocks.{i}"] = joined(img, split)
            if stop_early and len(found) == len(wanted) > 0:
                return None, found
        own, x = img.shape[1], torch.cat((img, txt), 1)
        del img, txt  # a ninth of the memory that a single block needs
        for i, block in enumerate(self.single_blocks):
            x = self._run(block, x, vec, rope, key_lengths, kernel, split)
            if f"single_blocks.{i}" in wanted:
                found[f"single_blocks.{i}"] = joined(x[:, :own], split)
            if stop_early and len(found) == len(wanted) > 0:
                return None, found
        velocity = self._unpatch(joined(self.final_layer(x[:, :own], vec), split), grid).to(latent.dtype)
        return (velocity, found) if wanted else velocity

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _unpatch(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, N, C*pt*ph*pw), channel slowest -> (B, C, T, H, W)."""
        sizes = dict(zip(("t", "h", "w", "pt", "ph", "pw"), (*grid, *self.config.patch_size), strict=True))
        return rearrange(x, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", **sizes)

    def _check(self, latent: Tensor, features: Sequence[str]) -> frozenset[str]:
        c, patch = self.config, self.config.patch_size
        if latent.ndim != 5 or latent.shape[1] != c.in_channels:
            raise InvalidValueError(f"the latent must be (B, {c.in_channels}, T, H, W), got {tuple(latent.shape)}")
        if any(n % p for n, p in zip(latent.shape[2:], patch, strict=True)):
            raise InvalidValueError(
                f"latent frames, height and width {tuple(latent.shape[2:])} must be multiples of {patch}: "
                f"make the video's height and width multiples of {8 * patch[1]}"
            )
        if unknown := [name for name in features if name not in self.block_names()]:
            raise InvalidValueError(
                f"no block named {', '.join(unknown)}; blocks are double_blocks.0 to {self.block_names()[-1]}"
            )
        return frozenset(features)


def joined(x: Tensor, split: Split | None) -> Tensor:
    """All image tokens of a sample, from those of this process."""
    return x if split is None else split.join(x)


def trim_text(text: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...] | None]:
    """Cut the text to its longest valid row. Returns (text, valid tokens per row, or None when all rows are full)."""
    if mask is None:
        return text, None
    if mask.shape != text.shape[:2]:
        raise InvalidValueError(f"text_mask {tuple(mask.shape)} does not match text {tuple(text.shape[:2])}")
    valid = mask.bool().cpu()
    lengths = valid.sum(1)
    if not torch.equal(valid, torch.arange(valid.shape[1])[None, :] < lengths[:, None]):
        raise InvalidValueError("text_mask must mark the first tokens of each row as valid; pad the text on the right")
    if int(lengths.min()) < 1:
        raise InvalidValueError(f"row {int(lengths.argmin())} of text_mask has no valid token; every prompt needs at least one")
    longest = int(lengths.max())
    text = text[:, :longest]
    return text, None if int(lengths.min()) == longest else tuple(lengths.tolist())
