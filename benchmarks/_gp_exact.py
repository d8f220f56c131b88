"""The referee: exact Gaussian-process formulas in plain float64 torch, sharing no code with any contestant.

It finds the hyper-parameters at which steps are timed, measures true residuals, and turns everybody's final
hyper-parameters into predictions by the same exact formulas, so that scores differ by training alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from _gp_data import NOISE_FLOOR, Split, scores, start
from torch import Tensor

ROWS_AT_ONCE = 256
SCORE_UP_TO = 20000  # training rows: a float64 factor of 3.2 GB


def unpack(theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positive = torch.nn.functional.softplus(theta[:-1])
    return positive[:-2], positive[-2], positive[-1] + NOISE_FLOOR, theta[-1]


def kernel(theta: Tensor, X: Tensor, Z: Tensor) -> Tensor:
    """Matérn 3/2 with ARD, from differences (not from a matrix product), without the noise."""
    lengthscales, scale, _, _ = unpack(theta)
    r = torch.cdist(X / lengthscales, Z / lengthscales, compute_mode="donot_use_mm_for_euclid_dist")
    a = math.sqrt(3.0) * r
    return scale * (1 + a) * torch.exp(-a)


def log_likelihood(theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    _, _, noise, mean = unpack(theta)
    K = kernel(theta, X, X) + noise * torch.eye(len(y), dtype=X.dtype)
    L = torch.linalg.cholesky(K)
    white = torch.linalg.solve_triangular(L, (y - mean).unsqueeze(1), upper=False)
    return -0.5 * white.square().sum() - L.diagonal().log().sum() - 0.5 * len(y) * math.log(2 * math.pi)


def value_and_gradient(theta: np.ndarray, X: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    value = log_likelihood(t, torch.from_numpy(X), torch.from_numpy(y))
    (grad,) = torch.autograd.grad(value, t)
    return float(value.detach()), grad.numpy()


def trained_state(split: Split, rows: int, steps: int, lr: float) -> np.ndarray:
    """Hyper-parameters after Adam by Cholesky on the first `rows` training rows: where steps are timed."""
    theta = torch.tensor(start(split.X.shape[1]), dtype=torch.float64, requires_grad=True)
    X, y = torch.from_numpy(split.X[:rows]), torch.from_numpy(split.y[:rows])
    adam = torch.optim.Adam([theta], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        loss = -log_likelihood(theta, X, y) / len(y)
        loss.backward()
        adam.step()
    return theta.detach().numpy()


@torch.no_grad()
def residual(theta: np.ndarray, X: np.ndarray, y: np.ndarray, x: np.ndarray) -> float:
    """‖K̂x − (y − m)‖ / ‖y − m‖, the product in float64 by blocks of rows."""
    t, P, v = (torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in (theta, X, x))
    _, _, noise, mean = unpack(t)
    r = torch.from_numpy(y) - mean
    rest = torch.empty_like(r)
    for a in range(0, len(r), ROWS_AT_ONCE):
        b = slice(a, a + ROWS_AT_ONCE)
        rest[b] = kernel(t, P[b], P) @ v + noise * v[b] - r[b]
    return float(rest.norm() / r.norm())


@torch.no_grad()
def predictor(theta: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Exact predictive mean and variance (of a new observation) at the test points, standardised units."""
    t = torch.tensor(theta, dtype=torch.float64)
    X, y, Xs = (torch.from_numpy(a) for a in (split.X, split.y, split.Xs))
    _, scale, noise, mean = unpack(t)
    n = len(y)
    K = torch.empty(n, n, dtype=torch.float64)
    for a in range(0, n, ROWS_AT_ONCE):
        K[a : a + ROWS_AT_ONCE] = kernel(t, X[a : a + ROWS_AT_ONCE], X)
    K.diagonal().add_(noise)
    L, failed = K.mT, torch.zeros((), dtype=torch.int32)  # LAPACK works in place on columns
    torch.linalg.cholesky_ex(L, out=(L, failed))
    if int(failed):
        raise ArithmeticError(f"Cholesky in float64 failed at pivot {int(failed)} of {n}")
    alpha = torch.cholesky_solve((y - mean).unsqueeze(1), L)
    means, variances = [], []
    for P in Xs.split(1024):
        C = kernel(t, X, P)
        means.append(mean + (C.mT @ alpha).squeeze(1))
        white = torch.linalg.solve_triangular(L, C, upper=False)
        variances.append((scale - white.square().sum(0)).clamp_min(0.0) + noise)
    return torch.cat(means).numpy(), torch.cat(variances).numpy()


def score(theta: np.ndarray, split: Split, first: int) -> dict[str, Any]:
    """Scores on all test rows, and NLL on the first few, which contestants also predict by their own means."""
    mean, variance = predictor(theta, split)
    return scores(split, mean, variance) | {"nll_first": scores(split, mean[:first], variance[:first])["nll"]}
