"""Any weight file of the network -> lazy tensors under original names, and back."""

from .config import Differences, expected_shapes, infer_config
from .layouts import LAYOUTS, PREFIXES, Layout
from .reader import Checkpoint, load_student, open_checkpoint, save_original
from .safetensors_file import SafetensorsFile, write_safetensors

__all__ = [
    "LAYOUTS",
    "PREFIXES",
    "Checkpoint",
    "Differences",
    "Layout",
    "SafetensorsFile",
    "expected_shapes",
    "infer_config",
    "load_student",
    "open_checkpoint",
    "save_original",
    "write_safetensors",
]
