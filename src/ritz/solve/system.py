"""What every iterative solver shares: scalar products, the shifted product, and the loop around an iteration.

An *iteration* (:mod:`cg`, :mod:`minres`) works on unit-norm residuals with recurrences and may deceive itself. The
loop around it, :func:`drive`, believes only b − A x: a column that claims to have converged is checked with one more
product, and sent back from its recomputed residual where the claim was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import DomainError, NonFiniteError, OperandError
from ..result import Status

Product = Callable[[Tensor], Tensor]

# One float64 number per column, on the host: a step needs some twenty operations on them, each several times cheaper
# there than as a torch operation (on a GPU: two synchronisations against twenty launches).
Scalars = np.ndarray

# A column that was sent back aims at half its target, and must halve its recomputed residual, or it has stagnated.
HALVED = 0.5

# Rounding of a product and a scalar product relative to the largest Rayleigh quotient seen, in units of eps.
ROUNDING = 10.0

_SEVERITY = (Status.CONVERGED, Status.MAX_STEPS, Status.STAGNATED, Status.NOT_POSITIVE)


@dataclass(frozen=True)
class System:
    """What an iteration needs to know of A + σ_j I, one column at a time.

    Attributes:
        matmat: A X.
        precondition: P⁻¹ X, or None.
        shift: σ (k,), real, or None for zeros.
        base: ‖x‖ of the guess that the iteration corrects, (k,) or 0: rounding of b − A x grows with it.
    """

    matmat: Product
    precondition: Product | None = None
    shift: Tensor | None = None
    base: Scalars | float = 0.0

    def product(self, X: Tensor) -> Tensor:
        """(A + σ_j I) x_j for every column j."""
        Y = self.matmat(X)
        return Y if self.shift is None else Y + X * self.shift.to(X.dtype)

    def select(self, columns: Sequence[int] | Scalars) -> System:
        """The system of some columns only."""
        shift = None if self.shift is None else take(self.shift, columns)
        return replace(self, shift=shift, base=self.base if isinstance(self.base, float) else self.base[columns])


@dataclass
class Outcome:
    """Solutions with what is known of each column.

    Attributes:
        X: (n, k).
        residual: recomputed ‖b − A x‖ / ‖b‖, (k,).
        steps: iterations of every column.
        status: stop reason of every column.
        details: further entries of ``Info.details``.
    """

    X: Tensor
    residual: Scalars
    steps: list[int]
    status: list[Status]
    details: dict[str, object] = field(default_factory=dict)


class Pass:
    """Results of one uninterrupted iteration, filled in column by column as they leave the block.

    Attributes:
        X: corrections (n, k).
        steps: iterations of every column.
        stop: why the column left; CONVERGED is its own claim and is checked by :func:`drive`.
    """

    def __init__(self, like: Tensor) -> None:
        self.X = torch.zeros_like(like)
        self.steps = [0] * like.shape[1]
        self.stop = [Status.MAX_STEPS] * like.shape[1]

    def leave(self, columns: Scalars, X: Tensor, step: int, stop: Sequence[Status]) -> None:
        """Store the finished ``columns`` (indices into the block that the pass began with)."""
        self.X[:, torch.as_tensor(columns, device=X.device)] = X
        for j, reason in zip(columns.tolist(), stop, strict=True):
            self.steps[j], self.stop[j] = step, reason


class Iteration(Protocol):
    """One uninterrupted iteration from residuals ``R`` (which it may overwrite) down to norms ``target`` (k,)."""

    def __call__(self, system: System, R: Tensor, target: Scalars, max_steps: int) -> Pass: ...


class Kernel(Protocol):
    """A method bound to an operator: unit-norm right-hand sides in, checked solutions out."""

    def __call__(
        self, product: Product, B: Tensor, X0: Tensor | None, target: Scalars, shift: Tensor | None, adjoint: bool
    ) -> Outcome: ...


def inner(X: Tensor, Y: Tensor) -> Scalars:
    """Re x_jᴴ y_j of every column, accumulated in float64, (k,); one synchronisation."""
    if X.is_complex():
        X, Y = torch.view_as_real(X.resolve_conj()), torch.view_as_real(Y.resolve_conj())
        return np.array((X.double() * Y).sum((0, 2)).tolist())
    if X.shape[1] == 1 and X.dtype == torch.float64:
        return np.array([torch.dot(X.squeeze(1), Y.squeeze(1)).item()])
    return np.array((X.double() * Y).sum(0).tolist())  # in float64 before it is squared: 1e-25 is a number in float32


def norms(X: Tensor) -> Scalars:
    """‖x_j‖ of every column, accumulated in float64, (k,)."""
    return np.sqrt(inner(X, X))


def add(X: Tensor, V: Tensor, a: Scalars, *, scale: Scalars | None = None) -> Tensor:
    """x_j ← scale_j x_j + a_j v_j in place."""
    if a.size == 1:  # no tensor for the coefficient
        if scale is not None:
            X.mul_(float(scale[0]))
        return X.add_(V, alpha=float(a[0]))
    if scale is not None:
        X.mul_(row(scale, X))
    return X.addcmul_(V, row(a, X))


def row(a: Scalars, like: Tensor) -> Tensor:
    """Host numbers as a tensor that multiplies columns."""
    return torch.as_tensor(a, dtype=like.dtype, device=like.device)


def divide(a: Scalars, b: Scalars) -> Scalars:
    """a / b, and 0 where b is 0."""
    return np.where(b == 0, 0.0, a / np.where(b == 0, 1.0, b))


def take(X: Tensor, columns: Sequence[int] | Scalars) -> Tensor:
    """Some columns of a block, as a copy."""
    return X.index_select(-1, torch.as_tensor(columns, dtype=torch.long, device=X.device))


def check_scalars(x: Scalars, step: int) -> None:
    """Raise where a product returned NaN or Inf."""
    if not np.isfinite(x).all():
        raise NonFiniteError(
            f"the product with A returned NaN or Inf (or overflowed) in step {step} of the solve; expected finite "
            "numbers: check the operator's data, and its product with a random vector"
        )


def check_preconditioner(energy: Scalars, norm: Scalars) -> None:
    """Raise where rᴴ P⁻¹ r is not positive although r is not zero."""
    bad = ~(energy > 0) & (norm > 0)
    if bad.any():
        j = int(bad.argmax())
        raise DomainError(
            f"the preconditioner is not positive definite: rᴴ P⁻¹ r = {energy[j]:.3g} for a residual of norm "
            f"{norm[j]:.3g}; expected a positive number: use a positive definite preconditioner, or none"
        )


def drive(
    iterate: Iteration,
    system: System,
    B: Tensor,
    X: Tensor | None,
    target: Scalars,
    max_steps: int,
    *,
    monotone: bool = False,
    spent: Sequence[int] | None = None,
) -> Outcome:
    """Iterate until every column's recomputed residual is at its target, has stagnated, or its steps are used up.

    Args:
        iterate: the iteration.
        system: product, preconditioner and shifts.
        B: right-hand sides of unit norm (n, k).
        X: first guess (n, k), or None for zero.
        target: norms of b − A x to reach, (k,).
        max_steps: iterations that a column may spend altogether.
        monotone: whether the iteration lowers ‖r‖ at every step, so that a larger one means that it broke down.
        spent: iterations already spent on every column.
    """
    k = B.shape[1]
    R = B.clone() if X is None else B - system.product(X)
    X = torch.zeros_like(B) if X is None else X.clone()
    residual = norms(R)
    check_scalars(residual, 0)
    steps = list(spent) if spent is not None else [0] * k
    status = [Status.CONVERGED if good else Status.MAX_STEPS for good in residual <= target]
    todo = [j for j in range(k) if status[j] is not Status.CONVERGED and steps[j] < max_steps]
    aim = target
    while todo:
        part = replace(system.select(todo), base=norms(take(X, todo)))
        done = iterate(part, take(R, todo), aim[todo], max_steps - max(steps[j] for j in todo))
        trial = take(X, todo) + done.X
        R_new = take(B, todo) - part.product(trial)
        now, before = norms(R_new), residual[todo]
        check_scalars(now, max(done.steps))
        again, kept = [], []
        for i, j in enumerate(todo):
            steps[j] += done.steps[i]
            # Unfinished steps of CG are kept: they lower the error's energy norm, not always ‖r‖.
            if now[i] <= before[i] or (done.stop[i] is Status.MAX_STEPS and not monotone):
                kept.append(i)
                residual[j] = now[i]
            if residual[j] <= target[j]:
                status[j] = Status.CONVERGED
            elif done.stop[i] in (Status.MAX_STEPS, Status.NOT_POSITIVE):
                status[j] = done.stop[i]
            elif now[i] > HALVED * before[i]:
                status[j] = Status.STAGNATED
            elif steps[j] < max_steps:
                again.append(j)
        places = torch.tensor([todo[i] for i in kept], dtype=torch.long, device=B.device)
        X[:, places], R[:, places] = take(trial, kept), take(R_new, kept)
        todo, aim = again, HALVED * target
    return Outcome(X, residual, steps, status)


def solve_columns(
    kernel: Kernel,
    product: Product,
    B: Tensor,
    X0: Tensor | None,
    *,
    rtol: float,
    atol: float,
    shift: Tensor | None = None,
    adjoint: bool = False,
) -> tuple[Outcome, Scalars]:
    """Normalise the right-hand sides, leave out those that are zero, solve, and scale back.

    Returns:
        The outcome for all columns, and the relative target max(rtol, atol/‖b‖) of each, (k,).
    """
    k = B.shape[1]
    target = np.full(k, rtol)
    out = Outcome(torch.zeros_like(B), np.zeros(k), [0] * k, [Status.CONVERGED] * k)
    largest = B.abs().amax(0) if B.shape[0] else torch.zeros(k, device=B.device)
    live = (largest > 0).nonzero().squeeze(1)
    if live.numel() == 0:
        return out, target
    # In two divisions: the squares of entries of 1e-30 underflow in float32, and ‖b‖ itself may overflow.
    first = largest[live]
    U = B[:, live] / first
    length = norms(U)
    second = row(length, first)
    where = np.array(live.tolist())
    with np.errstate(over="ignore", under="ignore"):
        target[where] = np.maximum(rtol, atol / np.array(first.double().tolist()) / length)
    start = None if X0 is None else X0[:, live] / first / second
    part = kernel(product, U / second, start, target[where], None if shift is None else shift[live], adjoint)
    out.X[:, live] = (part.X * second) * first
    out.residual[where] = part.residual
    for i, j in enumerate(where.tolist()):
        out.steps[j], out.status[j] = part.steps[i], part.status[i]
    out.details = part.details
    return out, target


def worst(status: Sequence[Status]) -> Status:
    """The most serious of several stop reasons."""
    return max(status, key=_SEVERITY.index, default=Status.CONVERGED)


def default_rtol(dtype: torch.dtype) -> float:
    """1e-6 for float64 and complex128, 1e-4 for everything shorter."""
    return 1e-6 if dtype in (torch.float64, torch.complex128) else 1e-4


def default_steps(n: int) -> int:
    """10 n, at least 100 and at most 10 000."""
    return min(max(10 * n, 100), 10_000)


def check_settings(name: str, rtol: float | None, atol: float, max_steps: int | None) -> None:
    """Raise for tolerances and limits that make no sense."""
    if rtol is not None and not 0 <= rtol < 1:
        raise OperandError(f"{name}(rtol={rtol!r}): expected 0 <= rtol < 1, or None for 1e-6 / 1e-4 by dtype")
    if not 0 <= atol < float("inf"):
        raise OperandError(f"{name}(atol={atol!r}): expected a finite number >= 0")
    if max_steps is not None and max_steps < 1:
        raise OperandError(f"{name}(max_steps={max_steps!r}): expected at least 1, or None for 10 n in 100 … 10 000")
