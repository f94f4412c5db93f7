"""Any weight file of the network -> lazy tensors under original names, and back."""

from .config import Differences, NetworkConfig, expected_shapes, infer_config
from .layouts import PREFIXES, Layout, Place
from .quantised import FLOAT8, Scaled, quantise_fp8
from .reader import Checkpoint, holds_lora, load_student, open_checkpoint, save_original
from .recognition import LAYOUTS
from .safetensors_file import SafetensorsFile, stream_safetensors, write_safetensors
from .students import Student, find_student, student_metadata
from .wan import WanConfig

__all__ = [
    "FLOAT8",
    "LAYOUTS",
    "PREFIXES",
    "Checkpoint",
    "Differences",
    "Layout",
    "NetworkConfig",
    "Place",
    "SafetensorsFile",
    "Scaled",
    "Student",
    "WanConfig",
    "expected_shapes",
    "find_student",
    "holds_lora",
    "infer_config",
    "load_student",
    "open_checkpoint",
    "quantise_fp8",
    "save_original",
    "stream_safetensors",
    "student_metadata",
    "write_safetensors",
]
