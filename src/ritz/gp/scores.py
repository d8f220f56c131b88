"""How good Gaussian predictions are: errors, log densities, and whether intervals contain as much as they say.

All are functions of tensors: predictive mean (n,), predictive variance (n,) or scalar, of *new observations* (noise
included), and targets y (n,). Everything is computed in float64, in the units of the targets, and returned as float64
tensors without a gradient. Several outputs (n, p) are scored together, with a variance (n, p) or one (n,) that they
share, as ``predict`` gives it; score columns to have them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite

LEVELS = (*(round(0.05 * i, 2) for i in range(1, 20)), 0.99)


class Calibration(NamedTuple):
    """A calibration table; every field (k,).

    Attributes:
        levels: nominal coverage of the central intervals.
        coverage: share of the targets inside.
        standard_error: √(p(1 − p)/n), the scatter of the share for n independent targets at nominal p. Errors at points
            near each other are not independent; their scatter is larger.
    """

    levels: Tensor
    coverage: Tensor
    standard_error: Tensor

    @property
    def error(self) -> float:
        """Mean of |coverage − level| over the levels; 0 is perfect."""
        return float((self.coverage - self.levels).abs().mean())


def rmse(mean: Tensor, y: Tensor) -> Tensor:
    """Root mean squared error, a scalar; mean and y (n,)."""
    mean, y = _numbers(mean=mean, y=y)
    return (mean - y).square().mean().sqrt()


def smse(mean: Tensor, y: Tensor) -> Tensor:
    """Standardised mean squared error: over the variance of y, so that predicting the mean of y scores 1.

    Reference: Rasmussen, Williams, Gaussian processes for machine learning, 2006, section 2.5.
    """
    mean, y = _numbers(mean=mean, y=y)
    return (mean - y).square().mean() / y.var(correction=0)


def nll(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Mean of −log N(y; mean, variance) in nats a target, a scalar.

    Raises:
        OperandError: shapes that do not fit; a variance that is not positive.
    """
    mean, variance, y = _numbers(mean=mean, variance=variance, y=y)
    return (0.5 * (y - mean).square() / variance + 0.5 * variance.log()).mean() + 0.5 * math.log(2 * math.pi)


def msll(mean: Tensor, variance: Tensor, y: Tensor, y_train: Tensor) -> Tensor:
    """Mean standardised log loss: :func:`nll` less that of N(mean y_train, variance of y_train); negative is good.

    Reference: Rasmussen, Williams, 2006, section 2.5.
    """
    (train,) = _numbers(y=y_train)
    trivial = train.mean().expand(y.shape)
    return nll(mean, variance, y) - nll(trivial, train.var(correction=0), y)


def coverage(mean: Tensor, variance: Tensor, y: Tensor, levels: Sequence[float] | Tensor = LEVELS) -> Tensor:
    """Share of targets inside the central interval of each nominal level, (k,); equal to the levels where calibrated.

    Args:
        levels: probabilities between 0 and 1, (k,).
    """
    mean, variance, y = _numbers(mean=mean, variance=variance, y=y)
    p = torch.as_tensor(levels, dtype=torch.float64, device=y.device).reshape(-1)
    if not bool(((p > 0) & (p < 1)).all()):
        raise OperandError(f"levels is {levels}; expected probabilities between 0 and 1, both excluded")
    width = torch.special.ndtri(0.5 + p / 2)
    distance = ((y - mean).abs() / variance.sqrt()).reshape(-1).sort().values
    return torch.searchsorted(distance, width, right=True).double() / distance.shape[0]


def calibration(mean: Tensor, variance: Tensor, y: Tensor, levels: Sequence[float] | Tensor = LEVELS) -> Calibration:
    """Nominal and empirical coverage of central intervals, with the scatter that chance would cause."""
    observed = coverage(mean, variance, y, levels)
    p = torch.as_tensor(levels, dtype=torch.float64, device=observed.device).reshape(-1)
    return Calibration(p, observed, (p * (1 - p) / y.numel()).sqrt())


def _numbers(**tensors: Any) -> list[Tensor]:
    """Detached float64 tensors of one shape, finite, not empty; variances positive, scalar and shared ones spread."""
    y = tensors["y"]
    out = []
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise OperandError(f"{name} is a {type(t).__name__}; expected a tensor (n,)")
        t = t.detach().double()
        if name == "variance" and t.ndim == 0:
            t = t.expand(y.shape)
        elif name == "variance" and y.ndim == 2 and t.shape == y.shape[:1]:
            t = t.unsqueeze(1).expand(y.shape)
        if t.shape != y.shape or t.numel() == 0:
            raise OperandError(f"{name} has shape {tuple(t.shape)} and y {tuple(y.shape)}; expected equal ones, n >= 1")
        check_finite(t, name)
        if name == "variance" and not bool((t > 0).all()):
            raise OperandError(
                f"variance has {int((t <= 0).sum())} entries that are not positive, the smallest {float(t.min()):.3g}; "
                "score predictions of new observations: predict(Xs, noise=True)"
            )
        out.append(t)
    return out
