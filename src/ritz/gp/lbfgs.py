"""L-BFGS for a handful of hyper-parameters, safe against NaN, infinities and exceptions of the objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Objective = Callable[[Tensor], tuple[float, Tensor]]
Report = Callable[[int, float], bool]

LINE_STEPS = 20
ARMIJO, WOLFE = 1e-4, 0.9


@dataclass
class Minimum:
    """What :func:`minimize` found.

    Attributes:
        x: the best point seen.
        value: the objective there.
        steps: accepted steps.
        evaluations: of the objective with its gradient.
        reason: why it stopped: "gradient", "progress", "steps", "line search" or "stopped".
    """

    x: Tensor
    value: float
    steps: int
    evaluations: int
    reason: str


def minimize(
    objective: Objective,
    x: Tensor,
    *,
    max_steps: int = 100,
    memory: int = 10,
    gtol: float = 1e-5,
    ftol: float = 1e-9,
    report: Report | None = None,
) -> Minimum:
    """Minimise a smooth function of a vector in float64.

    Args:
        objective: x (p,) -> (value, gradient); a value that is not finite means that x is out of bounds.
        x: start; the objective must be finite there.
        max_steps: accepted steps.
        memory: pairs of differences.
        gtol, ftol: stop where no gradient entry exceeds gtol, or where a step lowers the value by less than ftol
            relative to its size.
        report: called with (step, value) after every step; True stops.

    Returns:
        The best point; the start itself where nothing better was found.

    The line search bisects between a point that fails the sufficient decrease (or is not finite) and one that is still
    going down too steeply, so it needs neither derivatives at bad points nor a bracket that contains only good ones.
    Reference: Nocedal, Wright, Numerical Optimization, 2006, Algorithm 7.5; Lewis, Overton 2013 for the line search.
    """
    value, g = objective(x)
    evaluations, pairs = 1, list[tuple[Tensor, Tensor]]()
    reason, step = "steps", 0
    if not math.isfinite(value):
        return Minimum(x, value, 0, 1, "start is not finite")
    for step in range(1, max_steps + 1):
        if float(g.abs().max()) <= gtol:
            reason, step = "gradient", step - 1
            break
        direction = _direction(g, pairs)
        slope = float(direction @ g)
        if not slope < 0:  # rounding spoilt the pairs: start again from steepest descent
            pairs, direction = [], -g
            slope = float(direction @ g)
        first = 1.0 if pairs else min(1.0, 1.0 / float(g.norm()))
        found = _search(objective, x, value, slope, direction, first)
        evaluations += found[0]
        if found[1] is None:
            reason, step = "line search", step - 1
            break
        new, new_value, new_g = found[1]
        s, z = new - x, new_g - g
        if float(s @ z) > 1e-10 * float(s.norm() * z.norm()):
            pairs = [*pairs, (s, z)][-memory:]
        gain, x, value, g = value - new_value, new, new_value, new_g
        if report is not None and report(step, value):
            reason = "stopped"
            break
        if gain <= ftol * max(1.0, abs(value)):
            reason = "progress"
            break
    return Minimum(x, value, step, evaluations, reason)


def _direction(g: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The two-loop recursion."""
    d, alphas = -g, []
    for s, z in reversed(pairs):
        a = (s @ d) / (s @ z)
        alphas.append(a)
        d = d - a * z
    if pairs:
        s, z = pairs[-1]
        d = d * ((s @ z) / (z @ z))
    for (s, z), a in zip(pairs, reversed(alphas), strict=True):
        d = d + (a - (z @ d) / (s @ z)) * s
    return d


def _search(
    objective: Objective, x: Tensor, value: float, slope: float, d: Tensor, length: float
) -> tuple[int, tuple[Tensor, float, Tensor] | None]:
    """Evaluations spent, and a step of sufficient decrease, also of sufficient flattening if one is found in time."""
    low, high, best = 0.0, math.inf, None
    for count in range(1, LINE_STEPS + 1):
        new = x + length * d
        f, g = objective(new)
        finite = math.isfinite(f) and bool(torch.isfinite(g).all())
        if not finite or f > value + ARMIJO * length * slope:
            high = length
        else:
            if best is None or f < best[1]:
                best = (new, f, g)
            if float(g @ d) >= WOLFE * slope:
                return count, (new, f, g)
            low = length
        length = (low + high) / 2 if math.isfinite(high) else 2 * length
    return LINE_STEPS, best
