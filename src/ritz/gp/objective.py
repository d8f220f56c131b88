"""Objectives for fitting, as values: functions of a process and its data that are to be made large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..result import Info, OnFailure

if TYPE_CHECKING:
    from .exact import ExactGP


@dataclass(frozen=True)
class MarginalLikelihood:
    """log p(y | X), the default: what the model says about all targets together.

    Args:
        on_failure: as in :meth:`~ritz.gp.ExactGP.log_marginal_likelihood`.
    """

    on_failure: OnFailure = "warn"

    def __call__(self, gp: ExactGP, X: Tensor, y: Tensor) -> tuple[Tensor, Info]:
        """The value, a scalar, and its report."""
        value, info = gp.log_marginal_likelihood(X, y, return_info=True, on_failure=self.on_failure)
        return value, info


@dataclass(frozen=True)
class LeaveOneOut:
    """Σ_i log p(y_i | all others), by Cholesky: up to 2000 points, or as many as ``solver=Direct()`` is given.

    Reference: Rasmussen, Williams, Gaussian processes for machine learning, 2006, section 5.4.2.
    """

    def __call__(self, gp: ExactGP, X: Tensor, y: Tensor) -> tuple[Tensor, Info]:
        """The value, a scalar, and its report."""
        value, info = gp.leave_one_out(X, y, return_info=True)
        return value, info
