"""Pieces of a solution, one per step, and the solution as a function of time."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions.inputs import as_times
from ..numerics import in_transform, unwrap
from ..operators import LinearOperator
from ..pairing import _Refuse
from .system import System


@dataclass
class Piece:
    """y(t + θh) = y + Σ_j θ^j φ_j(θhJ) w_j for 0 ≤ θ ≤ 1.

    Attributes:
        start, end: as numbers; h = end − start is what the step was made with, a constant for the derivative.
        t: the start as a tensor of no dimension, which moves with the initial time.
        y: at the start; None where ``vectors`` has it as w_0.
        vectors: [w_0, w_1, …], None for zero.
        value: y at the end.
        release: drops what was recorded for the products of J; the next one makes it anew.
    """

    start: float
    end: float
    t: Tensor
    y: Tensor | None
    J: LinearOperator
    vectors: Sequence[Tensor | None]
    value: Tensor
    release: Callable[[], None] = lambda: None

    def at(self, system: System, times: Tensor) -> Tensor:
        """The solution at times within the step, (len(times), n), by one Krylov space; differentiable in the times."""
        h = self.end - self.start
        grown = system.phi_grid(self.J, h, self.vectors, (times - self.t) / h)
        self.release()
        return grown if self.y is None else self.y + grown


class _AtTime(torch.autograd.Function):
    """y, with the derivative y' with respect to the time that it belongs to."""

    @staticmethod
    def forward(y: Tensor, rate: Tensor, time: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, rate, time = ctx.saved_tensors
        g_time = (rate.detach().conj() * g).sum().real.to(time.dtype) if ctx.needs_input_grad[2] else None
        if g_time is not None and torch.is_grad_enabled():
            g_time = _Refuse.apply("the time of odeint", unwrap(g_time.detach()), y, rate, time, g)
        return g, None, g_time


def at_time(system: System, y: Tensor, time: Tensor, clock: Tensor, end: float) -> Tensor:
    """The end of a step as the solution at an output time that coincides with it.

    Args:
        time: the output time; the step ends there, at the number ``end``.
        clock: the end of the step as a tensor that moves with the initial time.
    """
    moves = torch.is_grad_enabled() and (time.requires_grad or clock.requires_grad or in_transform())
    if not moves:
        return y
    return _AtTime.apply(y, system.rate(clock, y), time - clock)


class DenseOutput:
    """The solution between the first and the last time: ``solution(s)``, from ``odeint(..., dense=True)``.

    Between the ends of steps it is the method's continuous extension: φ-functions of the same operator on the same
    vectors, so that a stiff or oscillating linear part is as exact there as at the ends. Order: 4 for EXPRB43 and
    ETDRK4, 5 for EXPRB53, 2 for Rosenbrock–Euler, 1 for exponential Euler; exact for linear systems.

    Attributes:
        start, end: the first and the last time that it covers.
        steps: the ends of the steps.
    """

    def __init__(self, system: System, pieces: Sequence[Piece], unravel: Callable[[Tensor], Any]) -> None:
        self._system, self._pieces, self._unravel = system, list(pieces), unravel
        self.start, self.end = self._pieces[0].start, self._pieces[-1].end
        self.steps = [p.end for p in self._pieces]
        self._sign = 1.0 if self.end > self.start else -1.0

    def __call__(self, s: float | Tensor) -> Any:
        """The solution at a time, or at a 1-D tensor of times in any order.

        Args:
            s: number or tensor of no dimension; or (k,), which becomes the leading axis of the result.

        Returns:
            The state's shape (k in front), in tuples where the state is one.

        Raises:
            OperandError: a time outside of [start, end]: nothing is extrapolated.

        Cost: one Krylov space for every step that a time falls into.
        Gradient: first order in s and in everything that the solution depends on.
        """
        times = as_times(s, self._pieces[0].J)
        if times.is_complex():
            raise OperandError("s is complex; expected real times")
        grid = times.reshape(-1).double()
        numbers = grid.detach().tolist()
        grid = grid.to(self._pieces[0].t.device)
        slack = 1e-12 * max(abs(self.start), abs(self.end))
        ends = [self._sign * e for e in self.steps[:-1]]
        members: dict[int, list[int]] = {}
        for i, number in enumerate(numbers):
            if not min(self.start, self.end) - slack <= number <= max(self.start, self.end) + slack:
                raise OperandError(
                    f"the solution was asked for at {number:.17g}; it covers {self.start:.17g} to {self.end:.17g}, and "
                    "is not extrapolated"
                )
            members.setdefault(bisect.bisect_left(ends, self._sign * number), []).append(i)
        rows: dict[int, Tensor] = {}
        for p, indices in members.items():
            rows |= dict(zip(indices, self._pieces[p].at(self._system, grid[indices]), strict=True))
        if times.ndim == 0:
            return self._unravel(rows[0])
        return stacked([self._unravel(rows[i]) for i in range(len(numbers))])

    def __repr__(self) -> str:
        return f"DenseOutput({self.start:.6g} to {self.end:.6g}, {len(self._pieces)} steps)"


def stacked(states: Sequence[Any]) -> Any:
    """States of one structure with a leading axis."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.stack(list(states))
    if isinstance(first, dict):
        return {key: stacked([s[key] for s in states]) for key in first}
    parts = [stacked([s[i] for s in states]) for i in range(len(first))]
    if isinstance(first, tuple):
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return parts
