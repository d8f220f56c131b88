"""How good a predictive distribution is, in the units of the data: :mod:`ritz.gp.scores` for arrays."""

from __future__ import annotations

import numpy as np
import torch

from ..gp import scores
from ..gp.scores import LEVELS


def rmse(y: np.ndarray, mean: np.ndarray) -> float:
    """Root mean squared error."""
    return float(scores.rmse(_tensor(mean, y), _tensor(y, y)))


def nll(y: np.ndarray, mean: np.ndarray, std: np.ndarray | float) -> float:
    """Mean negative log density of y under N(mean, std²), in nats a row."""
    return float(scores.nll(_tensor(mean, y), _tensor(std, y).square(), _tensor(y, y)))


def coverage(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> dict[str, list[float]]:
    """Share of targets inside the central interval of each nominal level; equal to the level where calibrated."""
    observed = scores.coverage(_tensor(mean, y), _tensor(std, y).square(), _tensor(y, y), LEVELS)
    return {"nominal": list(LEVELS), "observed": observed.tolist()}


def score(y: np.ndarray, mean: np.ndarray, std: np.ndarray | float) -> dict[str, float]:
    """RMSE and NLL."""
    return {"rmse": rmse(y, mean), "nll": nll(y, mean, std)}


def _tensor(values: np.ndarray | float, like: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(np.broadcast_to(values, like.shape), dtype=np.float64))
