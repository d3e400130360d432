from mmdiff.schedulers.adopt import as_ours
from mmdiff.schedulers.base import MTScheduler
from mmdiff.schedulers.mt_diffusion import MTDiffusionScheduler
from mmdiff.schedulers.mt_flow_match import MTFlowMatchScheduler, resolution_shift
from mmdiff.schedulers.solvers import FLOW_SOLVERS, SOLVERS

SCHEDULERS = {"diffusion": MTDiffusionScheduler, "flow_match": MTFlowMatchScheduler}  # scheduler.kind

__all__ = [
    "FLOW_SOLVERS",
    "SCHEDULERS",
    "SOLVERS",
    "MTDiffusionScheduler",
    "MTFlowMatchScheduler",
    "MTScheduler",
    "as_ours",
    "resolution_shift",
]
