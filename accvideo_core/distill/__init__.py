"""Distillation of a teacher on its own denoising trajectories."""

from .losses import segment_velocity, trajectory_loss

__all__ = ["segment_velocity", "trajectory_loss"]
