"""Norms of an operator from products with random probes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators.convert import aslinearoperator
from .probes import Hutchinson, mean_and_error


def frobenius_norm(
    A: Any, *, estimator: Hutchinson = Hutchinson(), generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """‖A‖_F of an operator (n, m) and its standard error, from ‖A z‖² over random probes; differentiable."""
    A = aslinearoperator(A)
    Z = estimator.probes(A.shape[1], A.dtype, A.device, generator)
    Y = A @ Z
    value, error = mean_and_error(Y.abs().square().sum(0), estimator.is_exact(A.shape[1]))
    root = value.sqrt()
    return root, 0.5 * error / root.detach().clamp(min=torch.finfo(root.dtype).tiny)
