"""LoRA files of every common format: read onto original modules, merged into checkpoints, extracted from two of them."""

from .adapters import LoraModule, LoraPart
from .blocks import Blocks, parse_blocks
from .formats import Lora, describe, read_lora

__all__ = ["Blocks", "Lora", "LoraModule", "LoraPart", "describe", "parse_blocks", "read_lora"]
