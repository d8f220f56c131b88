"""The Gaussian process behind the commands: made from a specification, fitted in two phases, asked for predictions."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .console import Phase
from .failure import CommandError
from .recipe import KERNELS, Recipe


def default_dtype(n: int) -> str:
    """float64 where it is cheap, float32 above 5000 rows."""
    return "float64" if n <= 5000 else "float32"


@dataclass(frozen=True)
class Spec:
    """What has to be known to build an untrained model: kernel by name, one length-scale an input or one, dtype."""

    kernel: str
    ard: bool
    dtype: str

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS or self.dtype not in ("float32", "float64"):
            raise CommandError(f"unknown kernel {self.kernel!r} or dtype {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch names it."""
        return torch.float32 if self.dtype == "float32" else torch.float64

    def tensor(self, values: np.ndarray) -> Tensor:
        """Numbers in the model's dtype."""
        return torch.from_numpy(values).to(self.torch_dtype)

    def to_json(self) -> dict[str, Any]:
        """As plain data; ``Spec(**data)`` is the way back."""
        return asdict(self)


class Clock:
    """A budget in seconds that starts now; None never ends."""

    def __init__(self, budget: float | None):
        self._end = None if budget is None else time.perf_counter() + budget

    @property
    def left(self) -> float | None:
        """Seconds left, not below 0."""
        return None if self._end is None else max(self._end - time.perf_counter(), 0.0)


def build(spec: Spec, dimensions: int) -> Any:
    """An untrained ``ritz.gp.ExactGP``."""
    from ritz import gp, kernels

    ard = dimensions if spec.ard else None
    nu = KERNELS[spec.kernel]
    base = kernels.RBF(ard) if nu is None else kernels.Matern(nu, ard)
    return gp.ExactGP(kernels.Scale(base), noise=0.1)


def fit_subset(gp: Any, X: Tensor, y: Tensor, recipe: Recipe, phase: Phase, clock: Clock) -> None:
    """First phase: L-BFGS on the exact evidence of a subset."""
    optimizer = torch.optim.LBFGS(gp.parameters(), max_iter=1, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(gp, X, y)
        loss.backward()
        return loss

    for _ in range(recipe.subset_steps):
        if clock.left == 0:
            phase.stopped = "time is up"
            return
        phase.step(optimizer.step(closure).item())


def fit_all(gp: Any, X: Tensor, y: Tensor, recipe: Recipe, seed: int, phase: Phase, clock: Clock) -> None:
    """Second phase: Adam on the evidence of all points."""
    optimizer = torch.optim.Adam(gp.parameters(), lr=recipe.lr)
    for _ in range(recipe.steps):
        if clock.left == 0:
            phase.stopped = "time is up"
            return
        optimizer.zero_grad()
        loss = _loss(gp, X, y)
        loss.backward()
        optimizer.step()
        phase.step(loss.item())


def _loss(gp: Any, X: Tensor, y: Tensor) -> Tensor:
    return -gp.log_marginal_likelihood(X, y) / len(X)


def predict(gp: Any, X: Tensor, y: Tensor, X_new: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of new observations (noise included), as float64 arrays."""
    with torch.no_grad():
        mean, variance = gp.condition(X, y).predict(X_new)
        variance = variance.clamp(min=0) + gp.noise.to(variance.dtype)
    return mean.double().numpy(), variance.double().sqrt().numpy()
