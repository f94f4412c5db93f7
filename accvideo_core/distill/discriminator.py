"""The adversarial side (paper, Eqs. 7 and 8): the frozen teacher sees a key latent at its own noise level, small heads judge what
it saw. D_k(latent) = H_k(features of the teacher at (latent, sigma[k])).

Shapes: B batch, N image tokens in order of (t, h, w), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ..errors import InvalidValueError

Heads = Literal["per-key", "one"]
Kind = Literal["2d", "3d"]
_GROUP = 16  # channels that a group norm takes together


class Head(nn.Module):
    """A convolutional judge of one key's features: a logit for every token.

    Token features differ in scale by orders of magnitude between channels and blocks, so each token is normalised first.
    A 2-D head sees each frame alone, as the paper's; a 3-D one also the frames beside it.
    """

    def __init__(self, width: int, channels: int, depth: int, kind: Kind) -> None:
        super().__init__()
        self.flat = kind == "2d"
        conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if self.flat else nn.Conv3d
        groups = max(1, channels // _GROUP)
        layers: list[nn.Module] = [conv(width, channels, 1)]
        for _ in range(depth):
            layers += [nn.GroupNorm(groups, channels), nn.SiLU(), conv(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(groups, channels), nn.SiLU(), conv(channels, 1, 1))

    def forward(self, features: Tensor, grid: Sequence[int]) -> Tensor:
        """features (B, N, D) on a grid of (t, h, w) tokens -> logits (B, t, h, w), float32 unless the features are float64."""
        t, h, w = grid
        if features.shape[1] != t * h * w:
            raise InvalidValueError(f"{features.shape[1]} tokens do not make a grid of {t} x {h} x {w}; give the network's grid")
        tokens = layer_norm(features.to(next(self.parameters()).dtype), features.shape[-1:])
        if self.flat:
            return rearrange(
                self.layers(rearrange(tokens, "b (t h w) d -> (b t) d h w", t=t, h=h, w=w)), "(b t) 1 h w -> b t h w", t=t
            )
        return rearrange(self.layers(rearrange(tokens, "b (t h w) d -> b d t h w", t=t, h=h, w=w)), "b 1 t h w -> b t h w")


class Discriminator(nn.Module):
    """The heads H_0 .. H_{m-1}, one for each key but the noise, or one for all.

    width     D of the features
    keys      m
    channels  of a head, depth its 3 x 3 (x 3) convolutions: with 256 and 2 it has 2.0 M parameters at D = 3072
    seed      of the initial weights
    """

    def __init__(
        self,
        width: int,
        keys: int,
        heads: Heads = "per-key",
        kind: Kind = "2d",
        channels: int = 256,
        depth: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(width, keys, channels) < 1 or depth < 0 or (channels > _GROUP and channels % _GROUP):
            raise InvalidValueError(
                f"heads of {channels} channels and depth {depth} for {keys} keys of width {width}; channels must be below "
                f"{_GROUP} or a multiple of it, all at least 1, depth at least 0"
            )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(Head(width, channels, depth, kind) for _ in range(keys if heads == "per-key" else 1))

    def forward(self, features: Tensor, key: int, grid: Sequence[int]) -> Tensor:
        """Logits (B, t, h, w) of a key's features (B, N, D)."""
        logits: Tensor = self.heads[key if len(self.heads) > 1 else 0](features, grid)
        return logits
