"""Task interference: the gradients of the loss's terms on the shared parameters, their norms and cosines.

A negative cosine says that a step for one term undoes the other (Yu et al., 2020, arXiv 2001.06782).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn


def interference(parts: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """{"norm/A": ‖g_A‖, "cosine/A:B": g_A · g_B / (‖g_A‖ ‖g_B‖)} of all terms that reach the parameters, and all pairs.

    The graph stays for the step's own backward pass, no gradient is accumulated and no process waits for another. It
    costs a backward pass per term, and as many copies of the gradient. L3 counts with L1. A term without any gradient
    in this batch has norm 0 and cosine 0 with all others.

    Args:
        parts: the weighted terms with their graphs, as of `mmdiff.objective.ObjectiveOutput`.
        parameters: shared by the terms.
    """
    trained = [p for p in parameters if p.requires_grad]
    merged = {name: part for name, part in parts.items() if name != "l3"}
    merged["l1"] = parts["l1"] + parts["l3"]
    gradients = {}
    for name, part in merged.items():
        if part.requires_grad:
            raw = torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True)
            if any(gradient is not None for gradient in raw):
                pieces = (p.new_zeros(p.shape) if g is None else g for p, g in zip(trained, raw, strict=True))
                gradients[name] = torch.cat([piece.flatten().float() for piece in pieces])
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    measured = {f"norm/{name}": norm for name, norm in norms.items()}
    for a, b in combinations(sorted(gradients), 2):
        product = (norms[a] * norms[b]).clamp(min=torch.finfo(torch.float32).tiny)
        measured[f"cosine/{a}:{b}"] = gradients[a].dot(gradients[b]) / product
    return measured
