"""SynVid: the teacher's denoising trajectories, captured, kept safe and read again."""

from .dataset import Batch, Draw, Segment, SynVidDataset, SynVidSampler
from .header import Header
from .manifest import Sample, SampleInfo
from .reader import Damage, SynVidReader
from .store import SynVidStore, sample_id
from .trajectory import Trajectory

__all__ = [
    "Batch",
    "Damage",
    "Draw",
    "Header",
    "Sample",
    "SampleInfo",
    "Segment",
    "SynVidDataset",
    "SynVidReader",
    "SynVidSampler",
    "SynVidStore",
    "Trajectory",
    "sample_id",
]
