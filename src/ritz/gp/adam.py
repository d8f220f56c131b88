"""Adam on a flat vector of hyper-parameters, with a step that decays, and a way back from breakdowns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError

BETA1, BETA2, EPS = 0.9, 0.999, 1e-12


@dataclass(frozen=True)
class Adam:
    """Adam, its step size falling from ``lr`` to ``final``·``lr`` along half a cosine.

    One evaluation a step. After a step into a value that is not finite it goes back to the best point seen, halves the
    step size and forgets its moments.

    Args:
        steps: number of steps; the schedule is stretched over them.
        lr: first step size, in raw parameters (about a relative change of each).
        final: last step size as a share of ``lr``; 1 keeps it constant.

    Reference: Kingma, Ba, Adam, 2015, Algorithm 1; Loshchilov, Hutter, SGDR, 2017, for the schedule.
    """

    steps: int = 30
    lr: float = 0.1
    final: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 0:
            raise OperandError(f"Adam(steps={self.steps!r}); expected a whole number, at least 0")
        if not 0 < self.lr < math.inf:
            raise OperandError(f"Adam(lr={self.lr!r}); expected a positive number")
        if not 0 <= self.final <= 1:
            raise OperandError(f"Adam(final={self.final!r}); expected a share between 0 and 1")

    def begin(self, x: Tensor, value: float, grad: Tensor, pairs: Sequence[Any] = ()) -> AdamState:
        """The state at a start x (p,) with its value and gradient; ``pairs``, a metric of L-BFGS, is of no use here."""
        zero = torch.zeros_like(x)
        return AdamState(x, value, grad, x, value, grad, zero, zero)

    def rate(self, count: int) -> float:
        """The step size of step ``count`` (from 0), before any halving."""
        done = min(count / max(1, self.steps - 1), 1.0)
        return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)

    def step(
        self, state: AdamState, objective: Callable[[Tensor], tuple[float, Tensor]]
    ) -> tuple[AdamState, str | None]:
        """The next state; Adam never asks to stop."""
        t, g = state.t + 1, state.grad
        first, second = BETA1 * state.first + (1 - BETA1) * g, BETA2 * state.second + (1 - BETA2) * g * g
        length = self.rate(state.count) * state.scale
        x = state.x - length * (first / (1 - BETA1**t)) / ((second / (1 - BETA2**t)).sqrt() + EPS)
        value, g = objective(x)
        state = replace(state, seen=value, count=state.count + 1)
        if not (math.isfinite(value) and bool(torch.isfinite(g).all())):
            zero = torch.zeros_like(x)
            state = replace(state, x=state.best_x, value=state.best, grad=state.best_grad, scale=state.scale / 2)
            return replace(state, first=zero, second=zero, t=0), None
        state = replace(state, x=x, value=value, grad=g, first=first, second=second, t=t)
        return (replace(state, best_x=x, best=value, best_grad=g) if value < state.best else state), None


@dataclass
class AdamState:
    """Where a run of Adam is: everything that its next step depends on, as plain tensors and numbers.

    Attributes:
        x, value, grad: the current point (p,), the objective and its gradient there.
        best_x, best, best_grad: the same of the best point.
        first, second, t: the moments, and how many gradients are in them.
        scale: product of the halvings.
        count: steps.
        seen: the value that the last step found, finite or not.
    """

    x: Tensor
    value: float
    grad: Tensor
    best_x: Tensor
    best: float
    best_grad: Tensor
    first: Tensor
    second: Tensor
    t: int = 0
    scale: float = 1.0
    count: int = 0
    seen: float = math.nan

    def plain(self) -> dict[str, Any]:
        """As a dictionary; ``AdamState(**plain)`` is the way back."""
        return dict(vars(self))
