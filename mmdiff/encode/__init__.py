"""`mmdiff encode`: what a training would make of each row again and again, written once as shards."""

from mmdiff.encode.encoder import Request
from mmdiff.encode.run import run

__all__ = ["Request", "run"]
