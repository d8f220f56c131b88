"""The Gaussian process behind the commands: made from a specification, fitted in two stages, asked for predictions."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gp import ExactGP, Fit, vanilla_priors
from ..gp.fit import fit
from ..gp.posterior import DOUBLE_UP_TO, FACTOR_UP_TO
from ..kernels import RBF, Matern, Scale
from ..methods import Lanczos
from ..stochastic.probes import Hutchinson
from .console import Phase
from .failure import CommandError
from .recipe import KERNELS, Recipe

TYPICAL_PRODUCTS = 25  # with a kept matrix, that a step of the second stage takes as long as
SUBSET_SHARE = 0.35  # of the time for training that the first stage may take


def default_dtype(n: int) -> str:
    """float64 where it costs little, float32 beyond."""
    return "float64" if n <= DOUBLE_UP_TO else "float32"


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
    """When each stage has to end, so that everything is done after ``budget`` seconds; a budget of None never ends.

    Args:
        budget: seconds from now.
        reserve: of these, what scoring will take. Training gets at least a third of the budget all the same: hyper-
            parameters that nobody fitted are worse than an answer that comes late.
    """

    def __init__(self, budget: float | None, reserve: float):
        self._start = time.perf_counter()
        self._length = math.inf if budget is None else max(budget - reserve, budget / 3)

    def end(self, share: float = 1.0) -> float:
        """The moment at which ``share`` of the time for training is over."""
        return self._start + share * self._length


def build(spec: Spec, dimensions: int) -> ExactGP:
    """An untrained model with weak priors, which a fit adds to the likelihood.

    Length-scales start at the median of their prior: from length-scales of 1 all points look far apart in many
    dimensions.
    """
    ard, nu = dimensions if spec.ard else None, KERNELS[spec.kernel]
    start = math.exp(math.sqrt(2) + 0.5 * math.log(dimensions))
    base = RBF(ard, lengthscale=start) if nu is None else Matern(nu, ard, lengthscale=start)
    floor = 1e-6 if spec.dtype == "float64" else 1e-4
    return ExactGP(Scale(base), noise=0.1, noise_floor=floor, priors=vanilla_priors(dimensions))


def fit_subset(gp: ExactGP, X: Tensor, y: Tensor, recipe: Recipe, phase: Phase, clock: Clock) -> Fit:
    """First stage: L-BFGS on a subset X (m, d), by Cholesky. Its report has the curvature for the second stage."""
    end = clock.end(SUBSET_SHARE if recipe.steps else 1.0)
    report = fit(gp, X, y, subset=len(X), subset_steps=recipe.subset_steps, steps=0, callback=_follow(phase, end))
    _check(gp, report.stopped.get("subset", ""), phase)
    return report


def fit_all(
    gp: ExactGP, X: Tensor, y: Tensor, recipe: Recipe, seed: int, phase: Phase, clock: Clock, earlier: Fit | None
) -> None:
    """Second stage: L-BFGS, or Adam, on all rows X (n, d), by products; the best step seen is kept."""
    depth = Lanczos(recipe.depth) if recipe.depth else Lanczos(rtol=1e-2)
    gp.logdet = (Hutchinson(recipe.probes, seed=seed), depth)
    threads = torch.get_num_threads()
    try:
        if math.isfinite(clock.end()) and time.perf_counter() + _step_seconds(gp, X, recipe.probes + 1) > clock.end():
            phase.stopped = "no time for a step"
            return
        options: dict[str, Any] = {"steps": recipe.steps, "lr": recipe.lr, "earlier": earlier}
        report = fit(gp, X, y, subset=None, **options, callback=_follow(phase, clock.end()))
    finally:
        torch.set_num_threads(threads)
    _check(gp, report.stopped.get("all", ""), phase)


def _follow(phase: Phase, end: float) -> Any:
    """A callback that records every step, and stops where the next one would end too late."""

    def step(count: int, loss: float, info: Any) -> bool:
        phase.step(loss)
        longest = max(np.diff([0.0, *phase.seconds])[-3:])  # of the latest steps
        late = bool(time.perf_counter() + longest > end)
        if late:
            phase.stopped = "time is up"
        return late

    return step


def _check(gp: ExactGP, reason: str, phase: Phase) -> None:
    if reason == "start is not finite":
        raise CommandError(
            "the covariance breaks down at the starting values (float64, or another kernel, may help): --dtype float64"
        )
    if reason in ("gradient", "progress", "line search"):
        phase.stopped = "converged"


def lengthscales(gp: Any, names: list[str]) -> dict[str, float]:
    """Length-scales by the name of the input, in its standard deviations; under "all inputs" where they share one."""
    values = gp.kernel.base_kernel.lengthscale.detach().double().flatten().tolist()
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {"all inputs": values[0]}


def predict(gp: ExactGP, X: Tensor, y: Tensor, X_new: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of new observations (noise included), as float64 arrays."""
    with torch.no_grad():
        mean, variance = gp.condition(X, y).predict(X_new, noise=True)
    return mean.double().numpy(), variance.double().sqrt().numpy()


def prediction_seconds(n: int, rows: int) -> float:
    """How long :func:`predict` may take here, judged by a small Cholesky factorisation (the best of three)."""
    size, best = 2000, math.inf
    K = torch.eye(size)
    for _ in range(3):
        began = time.perf_counter()
        torch.linalg.cholesky(K)
        best = min(best, time.perf_counter() - began)
    work = n**3 / 3 + n * n * rows if n <= FACTOR_UP_TO else 80 * n * n * rows
    return 1.3 * work * best / (size**3 / 3) + 2.0


def _step_seconds(gp: ExactGP, X: Tensor, columns: int) -> float:
    """How long one step of the second stage may take here, judged by two block products (the first makes the matrix).

    Leaves the number of threads at one where that is faster: on a machine with other work to do, threads that wait for
    each other at every tile can be ten times slower than a single one.
    """
    V = torch.ones(len(X), columns, dtype=X.dtype)
    many, seconds = torch.get_num_threads(), {}
    with torch.no_grad():
        for threads in sorted({1, many}):
            torch.set_num_threads(threads)
            began = time.perf_counter()
            A = gp.covariance(X)
            A @ V
            made = time.perf_counter()
            A @ V
            seconds[threads] = made - began + TYPICAL_PRODUCTS * (time.perf_counter() - made)
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return seconds[best]
