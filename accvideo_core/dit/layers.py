"""The parts of HunyuanVideo's transformer. Every Linear, LayerNorm and RMSNorm is taken from the injected `ops`.

Shapes: B batch, N tokens, L text length, D width, d head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from .attention import attention

if TYPE_CHECKING:  # needs torch.distributed, which not every build of torch has
    from .sequence import Split


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, dim) float32 sinusoids, [cos, sin], computed in float32 whatever the dtype of t."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(
    grid: Sequence[int], dims: Sequence[int], theta: float, device: torch.device | str | None = None, text_tokens: int = 0
) -> Tensor:
    """(N + text_tokens, d/2, 2) float32, cos and sin of 3-D rotary embeddings: first the tokens of a (T, H, W) grid, W
    running fastest, then text, which does not rotate (1, 0), so that blocks rotate the joint sequence in one go."""
    axes = []
    for axis, (size, dim) in enumerate(zip(grid, dims, strict=True)):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        angles = torch.arange(size, dtype=torch.float64, device="cpu")[:, None] * frequencies[None]
        table = torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)
        # Only a row per position of the axis is computed and moved; the grid is spread out on the device.
        shape = [size if i == axis else 1 for i in range(3)]
        axes.append(table.view(*shape, dim // 2, 2).expand(*grid, -1, -1))
    image = torch.cat(axes, dim=3).flatten(0, 2)
    still = image.new_tensor((1.0, 0.0)).expand(text_tokens, image.shape[1], 2)
    return torch.cat((image, still))


def in_place() -> bool:
    """Whether a block may write results over what they are made of: nothing is to be differentiated, and no compiler is at work,
    which plans memory itself. It halves a block's activations and saves passes over them."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Interleaved pairs of x (B, heads, N, d) turned by rope (N, d/2, 2), in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic and leaves complex numbers alone
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # one pass instead of six
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2)


def apply_rope(x: Tensor, rope: Tensor, norm: nn.Module | None = None) -> Tensor:
    """norm(x) turned by rope as in `rotated`, in the dtype of x; in x itself where that may be, a few heads at a time, so that
    what lies between is small and, on a CPU, in its cache."""
    if not in_place() or x.numel() < 2**17:  # so few are made anew faster than they are copied back
        return rotated(x if norm is None else norm(x), rope).to(x.dtype)
    most = 2**18 if x.device.type == "cpu" else 2**26  # elements
    for part in x.split(max(1, most // max(1, x[:, :1].numel())), 1):
        part.copy_(rotated(part if norm is None else norm(part), rope))
    return x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) * (1 + scale) + shift, with shift and scale (B, D); x is a norm's result, which nobody else needs."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None], out=_over(x, shift))


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update * gate, with gate (B, D); update is a layer's result, which nobody else needs."""
    return torch.addcmul(x, update, gate[:, None], out=_over(update, x))


def _over(result: Tensor, other: Tensor) -> Tensor | None:
    """The tensor to write over, None for a new one."""
    return result if in_place() and result.dtype == other.dtype else None


def gelu_tanh(x: Tensor) -> Tensor:
    """tanh-GELU of a layer's result, which nobody else needs."""
    return torch.ops.aten.gelu_(x, approximate="tanh") if in_place() else gelu(x, approximate="tanh")


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3*D), rows q then k then v -> three (B, heads, N, d)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class Stream(NamedTuple):
    """What of a run of tokens is to be attended: q, k, v (B, heads, N, d), and what norms q and k."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: nn.Module
    k_norm: nn.Module


def rotary_attention(
    streams: list[Stream], rope: Tensor, key_lengths: Sequence[int] | None, kernel: str, split: Split | None
) -> Tensor:
    """Streams of tokens, one behind the other, normed, turned by rope and attended together: (B, N, heads*d). The list is
    emptied, so that a stream's memory is free as soon as they are joined. With `split`, the first one's tokens are this
    process's, and rope and key lengths those of the whole sequence."""
    if split is None:
        lengths = [stream.q.shape[2] for stream in streams]
        tables = rope.split(lengths)
        turned = [(apply_rope(s.q, t, s.q_norm), apply_rope(s.k, t, s.k_norm), s.v) for s, t in zip(streams, tables, strict=True)]
    else:
        turned = [(s.q_norm(s.q), s.k_norm(s.k), s.v) for s in streams]
    streams.clear()
    q, k, v = turned[0] if len(turned) == 1 else (torch.cat(same, 2) for same in zip(*turned, strict=True))
    turned.clear()
    if split is not None:
        q, k, v = split.to_heads(q, k, v)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    attended = attention(q, k, v, key_lengths, kernel, over=in_place())
    return attended if split is None else split.to_tokens(attended)


class MLPEmbedder(nn.Module):
    """Timestep and guidance embedder: Linear, SiLU, Linear over 256 sinusoids."""

    def __init__(self, in_dim: int, dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(ops.Linear(in_dim, dim, **kw), nn.SiLU(), ops.Linear(dim, dim, **kw))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_embedding(t).to(dtype))


class VectorEmbedder(nn.Module):
    """Pooled text: Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.in_layer = ops.Linear(in_dim, dim, **kw)
        self.out_layer = ops.Linear(dim, dim, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(silu(self.in_layer(x)))


class TextProjection(nn.Module):
    """Mean text token for the refiner: Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(in_dim, dim, **kw)
        self.linear_2 = ops.Linear(dim, dim, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(silu(self.linear_1(x)))


class MLP(nn.Module):
    """fc1, activation, fc2: tanh-GELU in the blocks, SiLU in the refiner."""

    def __init__(self, dim: int, inner: int, ops: Any, act: str = "gelu", **kw: Any) -> None:
        super().__init__()
        self.fc1 = ops.Linear(dim, inner, **kw)
        self.fc2 = ops.Linear(inner, dim, **kw)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(silu(x) if self.act == "silu" else gelu_tanh(x))


class Modulation(nn.Module):
    """SiLU and Linear from the conditioning vector (B, D) to `parts` vectors (B, D): shift, scale, gate, ..."""

    def __init__(self, dim: int, parts: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.linear = ops.Linear(dim, parts * dim, **kw)
        self.parts = parts

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(silu(vec)).chunk(self.parts, dim=-1)


class PatchEmbed(nn.Module):
    """(B, C, T, H, W) -> (B, N, D): a strided convolution, tokens in (t, h, w) order."""

    def __init__(self, patch: tuple[int, int, int], in_channels: int, dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.proj = ops.Conv3d(in_channels, dim, kernel_size=patch, stride=patch, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class RefinerBlock(nn.Module):
    """Self-attention over text tokens, gated by (timestep + mean text); no QK-norm, no RoPE."""

    def __init__(self, dim: int, heads: int, inner: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = ops.LayerNorm(dim, eps=1e-6, **kw)
        self.self_attn_qkv = ops.Linear(dim, 3 * dim, **kw)
        self.self_attn_proj = ops.Linear(dim, dim, **kw)
        self.norm2 = ops.LayerNorm(dim, eps=1e-6, **kw)
        self.mlp = MLP(dim, inner, ops, act="silu", **kw)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(dim, 2 * dim, **kw))

    def forward(self, x: Tensor, c: Tensor, lengths: Sequence[int] | None, kernel: str) -> Tensor:
        gate_attn, gate_mlp = self.adaLN_modulation(c).chunk(2, dim=-1)
        q, k, v = split_heads(self.self_attn_qkv(self.norm1(x)), self.heads)
        x = gated(x, self.self_attn_proj(attention(q, k, v, lengths, kernel)), gate_attn)
        return gated(x, self.mlp(self.norm2(x)), gate_mlp)


class IndividualTokenRefiner(nn.Module):
    def __init__(self, dim: int, heads: int, inner: int, depth: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(dim, heads, inner, ops, **kw) for _ in range(depth))

    def forward(self, x: Tensor, c: Tensor, lengths: Sequence[int] | None, kernel: str) -> Tensor:
        for block in self.blocks:
            x = block(x, c, lengths, kernel)
        return x


class TokenRefiner(nn.Module):
    """Text tokens (B, L, text_dim) -> (B, L, D), aware of the timestep and of the mean of the valid tokens."""

    def __init__(self, text_dim: int, dim: int, heads: int, inner: int, depth: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.input_embedder = ops.Linear(text_dim, dim, **kw)
        self.t_embedder = MLPEmbedder(256, dim, ops, **kw)
        self.c_embedder = TextProjection(text_dim, dim, ops, **kw)
        self.individual_token_refiner = IndividualTokenRefiner(dim, heads, inner, depth, ops, **kw)

    def forward(self, text: Tensor, t: Tensor, lengths: Sequence[int] | None, kernel: str) -> Tensor:
        if lengths is None:
            mean = text.float().mean(dim=1)
        else:
            count = torch.tensor(lengths, device=text.device)
            valid = torch.arange(text.shape[1], device=text.device)[None, :] < count[:, None]
            # where, not multiply: a NaN or inf in the padding must not reach the sum
            mean = torch.where(valid[..., None], text.float(), 0.0).sum(dim=1) / count[:, None]
            text = torch.where(valid[..., None], text, 0.0)
        c = self.t_embedder(t, text.dtype) + self.c_embedder(mean.to(text.dtype))
        return self.individual_token_refiner(self.input_embedder(text), c, lengths, kernel)


class DoubleStreamBlock(nn.Module):
    """Image and text keep their own weights and attend jointly, image first."""

    # Made by name below, one of each a stream; declared here because a type checker cannot follow add_module.
    img_mod: nn.Module
    img_norm1: nn.Module
    img_attn_qkv: nn.Module
    img_attn_q_norm: nn.Module
    img_attn_k_norm: nn.Module
    img_attn_proj: nn.Module
    img_norm2: nn.Module
    img_mlp: nn.Module
    txt_mod: nn.Module
    txt_norm1: nn.Module
    txt_attn_qkv: nn.Module
    txt_attn_q_norm: nn.Module
    txt_attn_k_norm: nn.Module
    txt_attn_proj: nn.Module
    txt_norm2: nn.Module
    txt_mlp: nn.Module

    def __init__(self, dim: int, heads: int, inner: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.heads = heads
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(dim, 6, ops, **kw))
            self.add_module(f"{stream}_norm1", ops.LayerNorm(dim, elementwise_affine=False, eps=1e-6, **kw))
            self.add_module(f"{stream}_attn_qkv", ops.Linear(dim, 3 * dim, **kw))
            self.add_module(f"{stream}_attn_q_norm", ops.RMSNorm(dim // heads, eps=1e-6, **kw))
            self.add_module(f"{stream}_attn_k_norm", ops.RMSNorm(dim // heads, eps=1e-6, **kw))
            self.add_module(f"{stream}_attn_proj", ops.Linear(dim, dim, **kw))
            self.add_module(f"{stream}_norm2", ops.LayerNorm(dim, elementwise_affine=False, eps=1e-6, **kw))
            self.add_module(f"{stream}_mlp", MLP(dim, inner, ops, **kw))

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        rope: Tensor,
        key_lengths: Sequence[int] | None,
        kernel: str,
        split: Split | None = None,
    ) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        streams = [
            Stream(
                *split_heads(self.img_attn_qkv(modulate(self.img_norm1(img), img_shift1, img_scale1)), self.heads),
                self.img_attn_q_norm,
                self.img_attn_k_norm,
            ),
            Stream(
                *split_heads(self.txt_attn_qkv(modulate(self.txt_norm1(txt), txt_shift1, txt_scale1)), self.heads),
                self.txt_attn_q_norm,
                self.txt_attn_k_norm,
            ),
        ]
        attended = rotary_attention(streams, rope, key_lengths, kernel, split)
        img_attended, txt_attended = attended[:, : img.shape[1]], attended[:, img.shape[1] :]

        img = gated(img, self.img_attn_proj(img_attended), img_gate1)
        img = gated(img, self.img_mlp(modulate(self.img_norm2(img), img_shift2, img_scale2)), img_gate2)
        txt = gated(txt, self.txt_attn_proj(txt_attended), txt_gate1)
        txt = gated(txt, self.txt_mlp(modulate(self.txt_norm2(txt), txt_shift2, txt_scale2)), txt_gate2)
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel over the joint sequence, image first."""

    def __init__(self, dim: int, heads: int, inner: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.heads, self.dim, self.inner = heads, dim, inner
        self.linear1 = ops.Linear(dim, 3 * dim + inner, **kw)
        self.linear2 = ops.Linear(dim + inner, dim, **kw)
        self.q_norm = ops.RMSNorm(dim // heads, eps=1e-6, **kw)
        self.k_norm = ops.RMSNorm(dim // heads, eps=1e-6, **kw)
        self.pre_norm = ops.LayerNorm(dim, elementwise_affine=False, eps=1e-6, **kw)
        self.modulation = Modulation(dim, 3, ops, **kw)

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        rope: Tensor,
        key_lengths: Sequence[int] | None,
        kernel: str,
        split: Split | None = None,
    ) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        made = self.linear1(modulate(self.pre_norm(x), shift, scale))
        qkv, hidden = made.split((3 * self.dim, self.inner), dim=-1)
        streams = [Stream(*split_heads(qkv, self.heads), self.q_norm, self.k_norm)]
        attended = rotary_attention(streams, rope, key_lengths, kernel, split)
        if in_place():  # v, beside the hidden layer, has been read: what was attended takes its place
            made[..., 2 * self.dim : 3 * self.dim] = attended
            del attended
            gelu_tanh(hidden)
            joined = made[..., 2 * self.dim :].flatten(0, 1)  # of two dimensions a layer takes any stride without a copy
        else:
            joined = torch.cat((attended, gelu_tanh(hidden)), -1)
        return gated(x, self.linear2(joined).view_as(x), gate)


class FinalLayer(nn.Module):
    """Modulated norm and projection of image tokens to patches: (B, N, D) -> (B, N, pt*ph*pw*C)."""

    def __init__(self, dim: int, out_dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.norm_final = ops.LayerNorm(dim, elementwise_affine=False, eps=1e-6, **kw)
        self.linear = ops.Linear(dim, out_dim, **kw)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(dim, 2 * dim, **kw))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
