"""SynVid: the teacher's denoising trajectories, captured, kept safe and read again."""

from .header import Header
from .manifest import Sample, SampleInfo
from .reader import Damage, SynVidReader
from .store import SynVidStore, sample_id
from .trajectory import Trajectory

__all__ = ["Damage", "Header", "Sample", "SampleInfo", "SynVidReader", "SynVidStore", "Trajectory", "sample_id"]
