from mmdiff.schedulers.mt_diffusion import SOLVERS, MTDiffusionScheduler

__all__ = ["SOLVERS", "MTDiffusionScheduler"]
