"""HunyuanVideo's diffusion transformer for training, headless capture and multi-GPU, under its original tensor names."""

from .attention import KERNELS, attention
from .config import DiTConfig
from .model import Conditioning, HunyuanVideoDiT

__all__ = ["KERNELS", "Conditioning", "DiTConfig", "HunyuanVideoDiT", "attention"]
