"""scikit-learn's GaussianProcessRegressor in the race, for the small sets: Cholesky in float64, log parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
from _gp_data import NOISE_FLOOR, Split, softplus
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

PRIOR_MEAN = "zero (the mean of the standardised targets); it has no learned mean"


def kernel_of(theta: np.ndarray) -> Any:
    noise = float(softplus(theta[-2])) + NOISE_FLOOR
    base = Matern(length_scale=softplus(theta[:-3]), length_scale_bounds=(1e-5, 1e5), nu=1.5)
    return ConstantKernel(float(softplus(theta[-3])), (1e-5, 1e5)) * base + WhiteKernel(noise, (NOISE_FLOOR, 1e3))


def inverse_softplus(x: np.ndarray) -> np.ndarray:
    return x + np.log(-np.expm1(-x))


class Sklearn:
    """Adam on the same raw parameters, fed by its value and gradient; or its own L-BFGS (`own=True`)."""

    def __init__(self, split: Split, spec: dict, *, own: bool = False) -> None:
        self.X, self.y, self.own = split.X, split.y, own
        self.theta = np.zeros(split.X.shape[1] + 3)
        self.report: dict[str, Any] = {"mean": PRIOR_MEAN, "dtype": "float64"}
        self.model: GaussianProcessRegressor | None = None
        self.restart(spec["lr"])

    def restart(self, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.first, self.second = np.zeros_like(self.theta), np.zeros_like(self.theta)

    def set(self, theta: np.ndarray) -> None:
        self.theta = np.array(theta, dtype=np.float64)
        self.theta[-1] = 0.0
        self.model = None

    def get(self) -> np.ndarray:
        return self.theta.copy()

    def _model(self) -> GaussianProcessRegressor:
        """Fitted at the present parameters, without an optimiser."""
        gp = GaussianProcessRegressor(kernel_of(self.theta), alpha=1e-300, optimizer=None)
        return gp.fit(self.X, self.y)

    def value_and_gradient(self) -> tuple[float, np.ndarray]:
        """log p, and its gradient in the common raw parameters (the mean's is zero)."""
        if self.model is None:
            self.model = self._model()
        kernel = kernel_of(self.theta)
        value, grad = self.model.log_marginal_likelihood(kernel.theta, eval_gradient=True, clone_kernel=False)
        # Its order is log scale, log length-scales, log noise; d/d raw = d/d log x · (dx/d raw)/x
        order = np.concatenate([grad[1:-1], grad[:1], grad[-1:]])
        raw = self.theta[:-1]
        values = softplus(raw)
        values[-1] += NOISE_FLOOR
        slope = 1.0 / (1.0 + np.exp(-raw)) / values
        return float(value), np.append(order * slope, 0.0)

    def step(self) -> float:
        if self.own:
            return self._fit()
        value, g = self.value_and_gradient()
        g, self.t = -g / len(self.y), self.t + 1
        self.first = 0.9 * self.first + 0.1 * g
        self.second = 0.999 * self.second + 0.001 * g * g
        first, second = self.first / (1 - 0.9**self.t), self.second / (1 - 0.999**self.t)
        self.theta = self.theta - self.lr * first / (np.sqrt(second) + 1e-8)
        return -value / len(self.y)

    def _fit(self) -> float:
        """Its own L-BFGS from the present parameters, once."""
        gp = GaussianProcessRegressor(kernel_of(self.theta), alpha=1e-300).fit(self.X, self.y)
        theta = np.exp(gp.kernel_.theta)
        noise = max(theta[-1] - NOISE_FLOOR, 1e-12)
        self.theta = np.append(inverse_softplus(np.concatenate([theta[1:-1], theta[:1], [noise]])), 0.0)
        return -float(gp.log_marginal_likelihood_value_) / len(self.y)

    def solution(self) -> np.ndarray:
        return np.asarray(self._model().alpha_).ravel()

    def predict(self, Xs: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        model = self._model()
        mean = model.predict(Xs)
        _, std = model.predict(Xs[:first], return_std=True)  # its WhiteKernel's noise is part of the variance
        return mean, np.square(std)
