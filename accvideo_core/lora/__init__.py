"""LoRA files of every common format: read onto original modules, merged into checkpoints, extracted from two of them."""

from .adapters import LoraModule, LoraPart
from .formats import Lora, describe, read_lora

__all__ = ["Lora", "LoraModule", "LoraPart", "describe", "read_lora"]
