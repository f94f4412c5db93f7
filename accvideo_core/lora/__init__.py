"""LoRA files of every common format: read onto original modules, merged into checkpoints, extracted from two of them."""

from .adapters import LoraModule, LoraPart
from .blocks import Blocks, parse_blocks
from .extract import ExtractReport, extract_lora
from .formats import Lora, describe, read_lora
from .merge import LoraUse, MergeReport, merge_lora, parse_lora_use

__all__ = [
    "Blocks",
    "ExtractReport",
    "Lora",
    "LoraModule",
    "LoraPart",
    "LoraUse",
    "MergeReport",
    "describe",
    "extract_lora",
    "merge_lora",
    "parse_blocks",
    "parse_lora_use",
    "read_lora",
]
