from mmdiff.schedulers.mt_diffusion import MTDiffusionScheduler
from mmdiff.schedulers.solvers import SOLVERS

__all__ = ["SOLVERS", "MTDiffusionScheduler"]
