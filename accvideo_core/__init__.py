"""AccVideo: few-step video generation by distilling a teacher on its own denoising trajectories."""

__version__ = "0.1.0"
