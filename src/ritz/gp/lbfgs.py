"""L-BFGS for a handful of hyper-parameters, safe against NaN, infinities and exceptions of the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError

Objective = Callable[[Tensor], tuple[float, Tensor]]
Report = Callable[[int, float], bool]
Pair = tuple[Tensor, Tensor]

ARMIJO, WOLFE = 1e-4, 0.9


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS with a line search that needs neither derivatives at bad points nor a bracket that holds only good ones.

    Made for objectives of which every evaluation is dear: a step costs one evaluation as a rule, and a step that
    promises less than ``ftol`` is not tried.

    Args:
        steps: accepted steps at most.
        memory: pairs of differences that make up the metric.
        gtol: stop where no gradient entry exceeds it.
        ftol: stop where a step lowers the value, or promises to, by less than this relative to max(1, |value|).
        noise: rounding error of the values: a step that raises the value by no more than this is taken where the
            gradients at its ends say that it goes down. None is 0, and in :func:`~ritz.gp.fit` what suits the dtype.
        line_steps: evaluations of one line search at most.

    The objective has to be a function: the same value at every call (fixed probes, a fixed preconditioner).
    Reference: Nocedal, Wright, Numerical Optimization, 2006, Algorithm 7.5; Lewis, Overton, Nonsmooth optimization via
    quasi-Newton methods, 2013, for the line search, here with interpolated lengths; Hager, Zhang, 2005, section 2, for
    trusting gradients where values have lost their digits.
    """

    steps: int = 50
    memory: int = 20
    gtol: float = 1e-5
    ftol: float = 1e-6
    noise: float | None = None
    line_steps: int = 8

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("memory", 0), ("line_steps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise OperandError(f"LBFGS({name}={value!r}); expected a whole number, at least {least}")
        for name in ("gtol", "ftol", "noise"):
            if not (getattr(self, name) or 0.0) >= 0:
                raise OperandError(f"LBFGS({name}={getattr(self, name)!r}); expected a number >= 0")

    def begin(self, x: Tensor, value: float, grad: Tensor, pairs: Sequence[Pair] = ()) -> LBFGSState:
        """The state at a start x (p,) with its value and gradient; ``pairs`` is curvature that is known already."""
        return LBFGSState(x, value, grad, list(pairs)[-self.memory :] if self.memory else [])

    def step(self, state: LBFGSState, objective: Objective) -> tuple[LBFGSState, str | None]:
        """The next state, and why to stop there: "gradient", "progress", "line search" or None."""
        x, value, g, pairs = state.x, state.value, state.grad, state.pairs
        if float(g.abs().max()) <= self.gtol:
            return state, "gradient"
        promised = self.ftol * max(1.0, abs(value))
        while True:
            direction = _direction(g, pairs)
            slope = float(direction @ g)
            if not slope < 0:  # rounding spoilt the pairs: start again from steepest descent
                pairs, direction = [], -g
                slope = float(direction @ g)
            elif pairs and -slope / 2 <= promised:  # the gain of the unit step in the metric of the pairs
                return state, "progress"
            first = 1.0 if pairs else min(1.0, 1.0 / float(g.norm()))
            found = _search(objective, x, value, slope, direction, first, self.noise or 0.0, self.line_steps)
            if found is not None:
                break
            if not pairs:
                return state, "line search"
            pairs = []  # a metric that leads nowhere is worse than none
        new, new_value, new_g = found
        s, z = new - x, new_g - g
        if float(s @ z) > 1e-10 * float(s.norm() * z.norm()):
            pairs = [*pairs, (s, z)][-self.memory :] if self.memory else []
        done = replace(state, x=new, value=new_value, seen=new_value, grad=new_g, pairs=pairs, count=state.count + 1)
        gain = value - new_value
        if self.noise:  # by the trapezoidal rule the gradients know it better
            gain = max(gain, -0.5 * float(s @ (g + new_g)))
        return done, "progress" if gain <= promised else None


@dataclass
class LBFGSState:
    """Where an L-BFGS run is: everything that its next step depends on, as plain tensors and numbers.

    Attributes:
        x, value, grad: the current point (p,), the objective and its gradient there.
        pairs: differences of points and of gradients, the latest last.
        count: accepted steps.
        seen: the value that the last step found.
    """

    x: Tensor
    value: float
    grad: Tensor
    pairs: list[Pair] = field(default_factory=list)
    count: int = 0
    seen: float = math.nan

    def plain(self) -> dict[str, Any]:
        """As a dictionary; ``LBFGSState(**plain)`` is the way back."""
        return dict(vars(self))


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
    memory: int = 20,
    gtol: float = 1e-5,
    ftol: float = 1e-9,
    report: Report | None = None,
) -> Minimum:
    """Minimise a smooth function of a vector in float64.

    Args:
        objective: x (p,) -> (value, gradient); a value that is not finite means that x is out of bounds.
        x: start; the objective must be finite there.
        max_steps, memory, gtol, ftol: as in :class:`LBFGS`.
        report: called with (step, value) after every step; True stops.

    Returns:
        The best point; the start itself where nothing better was found.
    """
    method, evaluations = LBFGS(max_steps, memory, gtol, ftol, line_steps=20), 0

    def counted(x: Tensor) -> tuple[float, Tensor]:
        nonlocal evaluations
        evaluations += 1
        return objective(x)

    value, g = counted(x)
    if not math.isfinite(value):
        return Minimum(x, value, 0, 1, "start is not finite")
    state, reason = method.begin(x, value, g), None
    while reason is None and state.count < max_steps:
        before = state.count
        state, reason = method.step(state, counted)
        if state.count > before and report is not None and report(state.count, state.value):
            reason = "stopped"
    return Minimum(state.x, state.value, state.count, evaluations, reason or "steps")


def _direction(g: Tensor, pairs: list[Pair]) -> Tensor:
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
    objective: Objective, x: Tensor, value: float, slope: float, d: Tensor, length: float, noise: float, limit: int
) -> tuple[Tensor, float, Tensor] | None:
    """A step of sufficient decrease, also of sufficient flattening if one is found in time."""
    low, high, best = 0.0, math.inf, None
    for _ in range(limit):
        new = x + length * d
        f, g = objective(new)
        finite = math.isfinite(f) and bool(torch.isfinite(g).all())
        along = float(g @ d) if finite else math.nan
        enough = ARMIJO * length * slope
        if finite and (f <= value + enough or (f <= value + noise and 0.5 * length * (slope + along) <= enough)):
            if best is None or f < best[1]:
                best = (new, f, g)
            if along >= WOLFE * slope:
                return new, f, g
            low = length
            length = (low + high) / 2 if math.isfinite(high) else 2 * length
        else:
            high, gap = length, length - low
            # Where nothing good is known but the start, the parabola through it says where the bottom may be.
            guess = 0.5 * slope * length**2 / (value + slope * length - f) if finite and low == 0 else low + gap / 2
            length = min(max(guess, low + 0.1 * gap), low + 0.5 * gap)
    return best
