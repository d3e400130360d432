"""Training: the loop, exact checkpoints, tracking."""

from mmdiff.training.loop import train

__all__ = ["train"]
