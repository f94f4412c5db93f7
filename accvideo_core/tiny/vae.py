"""A small video autoencoder with HunyuanVideo's proportions: 4 x 8 x 8 compression, 16 channels, causal in time.

Frame 0 is a latent frame of its own, then every four frames make one; latent frame t depends on frames 0..4t only, in
both directions, so one frame encodes alone. The encoder is not learned: its channels are brightness and two colour
contrasts under Gaussian windows, with their derivatives in x, y and t. Such latents change smoothly as an object moves,
which is what a denoiser finds easy; a learned encoder packs as much as it can into them and is hard to denoise. The
decoder is convolutional and is trained to undo the encoder through noise.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_shuffle, silu

from ..errors import InvalidValueError

CHANNELS = 16
LATENT_SCALE = 0.476986  # model space = VAE latent * LATENT_SCALE, as HunyuanVideo's


def to_pixels(frames: Tensor) -> NDArray[np.uint8]:
    """Decoded frames (B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8."""
    scaled = (frames.float().clamp(-1, 1) + 1) * 127.5
    array: NDArray[np.uint8] = rearrange(scaled.round().to(torch.uint8), "b c t h w -> b t h w c").cpu().numpy()
    return array


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), 3 x 3, over single frames (B*T, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(silu(self.conv1(silu(x))))


class CausalTime(nn.Module):
    """x + mix of the latent frames t-2, t-1, t at each place; before frame 0 stands frame 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3 * width, width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        past = x.unflatten(0, (-1, frames))
        past = torch.cat([past[:, :1], past[:, :1], past], 1)
        window = torch.cat([past[:, i : i + frames] for i in range(3)], 2).flatten(0, 1)
        return x + self.out(silu(self.mix(silu(window))))


def gaussian_derivatives(window: int = 16, deviation: float = 3.2) -> Tensor:
    """(16, 12, window, window): the encoder's filters over four frames of RGB (frame major), each of unit norm.

    Channels 0..8: brightness under a Gaussian, then its derivatives x, y, t, xx, yy, xy, xt, yt. 9..12: blue against red
    and its x, y, t. 13..15: green against red and blue and its x, y.
    """
    at = (torch.arange(window, dtype=torch.float64) - (window - 1) / 2) / deviation
    even = torch.exp(-at.square() / 2)
    space = {0: even, 1: -at * even, 2: (at.square() - 1) * even}
    time = {0: torch.ones(4, dtype=torch.float64), 1: torch.linspace(-1, 1, 4, dtype=torch.float64)}
    colours = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, 2.0, -1.0]], dtype=torch.float64)
    orders = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 0), (0, 2, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1)]  # x, y, t
    filters = [
        torch.einsum("t,c,y,x->tcyx", time[t], colour, space[y], space[x])
        for colour, count in zip(colours, (9, 4, 3), strict=True)
        for x, y, t in orders[:count]
    ]
    bank = torch.stack(filters).flatten(1, 2)
    return (bank / bank.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).half().float()  # as the file holds them


class TinyVAE(nn.Module):
    """Frames in [-1, 1] <-> VAE latents (model space = VAE latent * LATENT_SCALE)."""

    encoder = ("filters", "mean", "std")  # the tensors that make latents

    filters: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 64, inner: int = 128) -> None:
        super().__init__()
        self.register_buffer("filters", gaussian_derivatives())
        self.register_buffer("mean", torch.zeros(CHANNELS))  # of the filtered frames, channel by channel
        self.register_buffer("std", torch.ones(CHANNELS))
        self.dec_in = nn.Conv2d(CHANNELS, inner, 3, padding=1)
        self.dec_mid = nn.ModuleList(Residual(inner) for _ in range(5))
        self.dec_time = nn.ModuleList(CausalTime(inner) for _ in range(5))
        self.dec_up = nn.Conv2d(inner, 4 * width, 1)
        self.dec_res = nn.ModuleList(Residual(width) for _ in range(2))
        self.dec_fine = nn.Conv2d(width, 4 * 24, 1)
        self.dec_last = Residual(24)
        self.dec_out = nn.Conv2d(24, 12 * 4, 3, padding=1)

    def encode(self, frames: Tensor) -> Tensor:
        """(B, 3, 4n+1, H, W) in [-1, 1], H and W multiples of 8 -> VAE latent (B, 16, n+1, H/8, W/8)."""
        raw = self.encode_raw(frames)
        return (raw - self.mean[:, None, None, None]) / self.std[:, None, None, None] / LATENT_SCALE

    def decode(self, latent: Tensor) -> Tensor:
        """VAE latent (B, 16, n+1, h, w) -> frames (B, 3, 4n+1, 8h, 8w), clamped to [-1, 1]."""
        return self.decode_unit(latent * LATENT_SCALE).clamp(-1, 1)

    def encode_raw(self, frames: Tensor) -> Tensor:
        """The filtered frames, before the channels' mean and deviation are taken out."""
        if frames.ndim != 5 or frames.shape[1] != 3:
            raise InvalidValueError(f"frames must be (B, 3, T, H, W), got {tuple(frames.shape)}")
        b, _, t, h, w = frames.shape
        if t % 4 != 1 or h % 8 or w % 8:
            raise InvalidValueError(
                f"{t} frames of {h} x {w}: frames must be 4n+1 (1, 5, 9, 13, 17, ...), height and width multiples of 8"
            )
        x = torch.cat([frames[:, :, :1].expand(-1, -1, 3, -1, -1), frames], 2)
        n = x.shape[2] // 4
        x = rearrange(x, "b c (n four) h w -> (b n) (four c) h w", four=4)
        edge = (self.filters.shape[-1] - 8) // 2
        x = conv2d(pad(x, (edge,) * 4, mode="replicate"), self.filters, stride=8)
        return x.unflatten(0, (b, n)).transpose(1, 2)

    def decode_unit(self, latent: Tensor) -> Tensor:
        """Model-space latent (B, 16, n+1, h, w) -> frames (B, 3, 4n+1, 8h, 8w), not clamped."""
        b, _, n, _, _ = latent.shape
        x = self.dec_in(latent.transpose(1, 2).flatten(0, 1))
        for block, time in zip(self.dec_mid, self.dec_time, strict=True):
            x = time(block(x), n)
        x = pixel_shuffle(self.dec_up(x), 2)
        for block in self.dec_res:
            x = block(x)
        x = self.dec_last(pixel_shuffle(self.dec_fine(x), 2))
        x = pixel_shuffle(self.dec_out(silu(x)), 2)  # (B*n, 12, 8h, 8w)
        return rearrange(x, "(b n) (four c) h w -> b c (n four) h w", b=b, four=4)[:, :, 3:]
