"""Sizes of the network. Only `hunyuan_video()` and `tiny()` have weights; any other is for tests and experiments."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidValueError


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a HunyuanVideo transformer.

    hidden_size   D, width of both streams; head_dim = hidden_size / num_heads = sum(rope_dims)
    depth_double  blocks with separate image and text weights, followed by
    depth_single  blocks over the joint sequence
    text_dim      width of the text tokens, pooled_dim of the pooled text
    patch_size    latent (T, H, W) per token
    rope_dims     channels of a head that rotate with t, h and w
    """

    hidden_size: int
    num_heads: int
    depth_double: int
    depth_single: int
    text_dim: int
    pooled_dim: int = 768
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    mlp_ratio: float = 4.0
    refiner_depth: int = 2
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise InvalidValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if sum(self.rope_dims) != self.head_dim or any(d % 2 for d in self.rope_dims):
            raise InvalidValueError(f"rope_dims {self.rope_dims} must be even and sum to the head dimension {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def hunyuan_video(cls) -> DiTConfig:
        """The released text-to-video model: 856 tensors, 12 821 012 544 parameters."""
        return cls(hidden_size=3072, num_heads=24, depth_double=20, depth_single=40, text_dim=4096)

    @classmethod
    def tiny(cls) -> DiTConfig:
        """The bundled world's teacher and student: the same architecture with about 4 M parameters."""
        return cls(hidden_size=128, num_heads=1, depth_double=3, depth_single=6, text_dim=256)
