"""SynVid: the teacher's denoising trajectories, captured, kept safe and read again."""

from .header import Header
from .manifest import Sample, SampleInfo
from .store import Damage, SynVidStore, sample_id
from .trajectory import Trajectory

__all__ = ["Damage", "Header", "Sample", "SampleInfo", "SynVidStore", "Trajectory", "sample_id"]
