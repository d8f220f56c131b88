"""How good a predictive distribution is, in the units of the data."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

LEVELS = [round(0.05 * i, 2) for i in range(1, 20)] + [0.99]


def rmse(y: np.ndarray, mean: np.ndarray) -> float:
    """Root mean squared error."""
    return float(np.sqrt(np.mean((y - mean) ** 2)))


def nll(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    """Mean negative log density of y under N(mean, std²), in nats a row."""
    return float(np.mean(0.5 * ((y - mean) / std) ** 2 + np.log(std)) + 0.5 * math.log(2 * math.pi))


def coverage(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> dict[str, list[float]]:
    """Share of targets inside the central interval of each nominal level; equal to the level where calibrated."""
    distance = np.abs(y - mean) / std
    observed = [float(np.mean(distance <= NormalDist().inv_cdf(0.5 + level / 2))) for level in LEVELS]
    return {"nominal": LEVELS, "observed": observed}


def score(y: np.ndarray, mean: np.ndarray, std: np.ndarray | float) -> dict[str, float]:
    """RMSE and NLL."""
    return {"rmse": rmse(y, mean), "nll": nll(y, mean, np.broadcast_to(std, y.shape))}
