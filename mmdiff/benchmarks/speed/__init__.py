"""`mmdiff benchmark speed`: what the framework costs; `mmdiff.benchmarks.speed.run` is the command."""

from mmdiff.benchmarks.speed.run import Request, run

__all__ = ["Request", "run"]
