"""Fitting hyper-parameters: L-BFGS on a random subset by Cholesky, then Adam on all points by products."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, RitzError
from ..result import Info
from . import lbfgs
from .exact import DENSE_UP_TO, ExactGP

Callback = Callable[[int, float, Any], Any]


@dataclass
class Fit:
    """What :func:`fit` did.

    Attributes:
        history: (stage, step, loss, seconds) per step, the loss being −log p(y)/n of the stage's points.
        loss: the best loss on the points of the last stage that ran, the one that the parameters belong to.
        stopped: why each stage ended.
        seconds: wall time.
        info: the :class:`~ritz.result.Info` of the last likelihood.
    """

    history: list[tuple[str, int, float, float]] = field(default_factory=list)
    loss: float = math.inf
    stopped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    info: Info | None = None


def fit(
    gp: ExactGP,
    X: Tensor,
    y: Tensor,
    *,
    subset: int | None = 1000,
    subset_steps: int = 50,
    steps: int = 30,
    lr: float = 0.05,
    max_seconds: float | None = None,
    callback: Callback | None = None,
    seed: int = 0,
) -> Fit:
    """Maximise the log marginal likelihood over the parameters of ``gp`` that require grad, in place.

    Stage "subset": L-BFGS on ``subset`` random points by Cholesky in float64 (all points where n ≤ 2000). Stage "all":
    Adam on all points, where the likelihood is iterative; its probes are fixed, so the best step seen is kept and put
    back at the end. A stage that makes the covariance break down, or a value that is not finite, is stepped back from,
    never into: the parameters are always those of the best value seen.

    Args:
        gp: the process; parameters are changed in place.
        X, y: points (n, d) and targets (n,).
        subset: points of the first stage; None or 0 leaves it out.
        subset_steps: its steps.
        steps: steps of the second stage; 0 leaves it out. It is not needed where the first one had all points.
        lr: step size of Adam, in the raw parameters (about a relative change of each).
        max_seconds: time after which no further step begins, counted over both stages.
        callback: called with (step, loss, info) after every step, counted through both stages; True stops the stage.
        seed: of the random subset.

    Returns:
        A :class:`Fit`.

    Cost: a first-stage evaluation is one Cholesky factorisation with its gradient, a second-stage step one likelihood.
    Deterministic for a given seed, as long as ``max_seconds`` does not decide.
    """
    X, y = gp._check(X, y)
    start, report, n = time.monotonic(), Fit(), X.shape[0]
    parameters: list[Tensor] = [p for p in gp.parameters() if p.requires_grad]
    if not parameters:
        return report
    loop = _Loop(report, start, max_seconds, callback)
    whole = n <= max(DENSE_UP_TO, subset or 0) and not isinstance(gp.method(n), tuple)
    if subset and subset_steps > 0:
        index = torch.arange(n) if whole else torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:subset]
        _by_lbfgs(gp, parameters, X[index.to(X.device)], y[index.to(X.device)], subset_steps, loop)
    if steps > 0 and not (whole and subset) and not loop.late():
        _by_adam(gp, parameters, X, y, steps, lr, loop)
    report.seconds = time.monotonic() - start
    return report


@dataclass
class _Loop:
    """What both stages share: the record, the clock and the caller's callback."""

    report: Fit
    start: float
    max_seconds: float | None
    callback: Callback | None
    count: int = 0

    def late(self) -> bool:
        return self.max_seconds is not None and time.monotonic() - self.start >= self.max_seconds

    def step(self, stage: str, loss: float, info: Info | None) -> bool:
        """Record a step; whether to stop."""
        self.count += 1
        self.report.history.append((stage, self.count, loss, time.monotonic() - self.start))
        self.report.info = info
        asked = self.callback is not None and bool(self.callback(self.count, loss, info))
        return asked or self.late()


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors])


@torch.no_grad()
def _write(parameters: list[Tensor], x: Tensor) -> None:
    position = 0
    for p in parameters:
        p.copy_(x[position : position + p.numel()].reshape(p.shape))
        position += p.numel()


def _evaluate(gp: ExactGP, parameters: list[Tensor], X: Tensor, y: Tensor, dense: bool) -> tuple[float, Tensor, Any]:
    """−log p/n, its gradient (p,) and the report; infinity where the covariance breaks down."""
    try:
        with torch.enable_grad():
            if dense:
                value, info = gp._dense(X, y)
            else:
                value, info = gp.log_marginal_likelihood(X, y, return_info=True, on_failure="ignore")
            loss = -value / X.shape[0]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    except (RitzError, torch.linalg.LinAlgError):
        return math.inf, torch.zeros(0), None
    full = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
    return float(loss.detach()), _flat(full), info


def _by_lbfgs(gp: ExactGP, parameters: list[Tensor], X: Tensor, y: Tensor, steps: int, loop: _Loop) -> None:
    latest: list[Any] = [None]

    def objective(x: Tensor) -> tuple[float, Tensor]:
        _write(parameters, x)
        value, g, latest[0] = _evaluate(gp, parameters, X.double(), y.double(), dense=True)
        return value, g

    start = _flat(parameters)
    found = lbfgs.minimize(
        objective, start, max_steps=steps, ftol=1e-7, report=lambda step, value: loop.step("subset", value, latest[0])
    )
    _write(parameters, found.x)
    loop.report.loss, loop.report.stopped["subset"] = found.value, found.reason


def _by_adam(
    gp: ExactGP, parameters: list[Tensor], X: Tensor, y: Tensor, steps: int, lr: float, loop: _Loop
) -> None:
    """Adam with its step halved, and its moments forgotten, after every step into a breakdown."""
    x = _flat(parameters)
    best, best_x, reason = math.inf, x, "steps"
    first, second, t = torch.zeros_like(x), torch.zeros_like(x), 0
    with warnings.catch_warnings():
        warnings.simplefilter("once", ConvergenceWarning)  # the same sentence at every step helps nobody
        for _ in range(steps + 1):  # the last one only looks at where the last step led
            _write(parameters, x)
            value, g, info = _evaluate(gp, parameters, X, y, dense=False)
            good = math.isfinite(value) and bool(torch.isfinite(g).all())
            if good and value < best:
                best, best_x = value, x
            if loop.step("all", value, info):
                reason = "stopped"
                break
            if not good:
                x, lr = best_x, lr / 2
                first, second, t = torch.zeros_like(x), torch.zeros_like(x), 0
                if not math.isfinite(best):
                    reason = "start is not finite"
                    break
                continue
            t += 1
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            x = x - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-12)
    _write(parameters, best_x)
    loop.report.loss, loop.report.stopped["all"] = best, reason
