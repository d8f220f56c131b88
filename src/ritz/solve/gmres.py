"""GMRES for systems that are not Hermitian, restarted, many right-hand sides sharing every product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite
from ..result import Status
from .settings import Iterative
from .system import (
    ROUNDING,
    Kernel,
    Outcome,
    Pass,
    Product,
    Scalars,
    System,
    check_scalars,
    divide,
    drive,
    norms,
    take,
)

if TYPE_CHECKING:
    from ..operators import LinearOperator

# A cycle that leaves more than this of ‖r‖ gains nothing: restarts of the same length will not either.
GAIN = 0.9999


@dataclass(frozen=True)
class GMRES(Iterative):
    """Generalised minimal residuals, for any square operator; the backward solve needs its adjoint product.

    Each column stops when its *recomputed* residual has ‖b − A x‖ ≤ max(rtol·‖b‖, atol), SciPy's meaning. A
    preconditioner stands on the right, so that residuals are those of the system, and may be any invertible map.

    Args:
        rtol: relative tolerance; None is 1e-6 in float64 and 1e-4 in float32.
        atol: absolute tolerance.
        max_steps: iterations per column; None is 10 n, at least 100 and at most 10 000.
        restart: steps after which the space is given up and begun anew from the residual. Short spaces cost less memory
            and time a step, and may stagnate: a column whose cycle gains nothing ends as STAGNATED.

    Cost: one block product a step, of the columns that are not done, and one to check each column; at step j of a
    cycle 4 j inner products and updates of length n a column. Memory: ``restart`` + 3 vectors a column. Three
    synchronisations a step.
    Reference: Saad, Schultz, GMRES: a generalized minimal residual algorithm for nonsymmetric linear systems, 1986.
    """

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.restart, int) or self.restart < 1:
            raise OperandError(f"GMRES(restart={self.restart!r}): expected a whole number of steps, at least 1")

    def bind(self, A: LinearOperator, precondition: Product | None) -> Kernel:
        """The solver of unit-norm blocks."""
        limit = self.limit(A.shape[0])
        length = min(self.restart, A.shape[0])

        def iterate(system: System, R: Tensor, target: Scalars, max_steps: int) -> Pass:
            return cycles(system, R, target, max_steps, length)

        def kernel(
            product: Product, B: Tensor, X0: Tensor | None, target: Scalars, shift: Tensor | None, adjoint: bool
        ) -> Outcome:
            return drive(iterate, System(product, precondition, shift), B, X0, target, limit, monotone=True)

        return kernel


@np.errstate(all="ignore")
def cycles(system: System, R: Tensor, target: Scalars, max_steps: int, restart: int) -> Pass:
    """Cycles of ``restart`` steps from the residuals R, until ‖r‖ ≤ target or a cycle gains nothing."""
    result = Pass(R)
    columns, step, X = np.arange(R.shape[1]), 0, torch.zeros_like(R)
    while True:
        before, cycle = norms(R), _Cycle(R, min(restart, max_steps - step))
        for _ in range(cycle.limit):
            cycle.extend(system)
            step += 1
            check_scalars(cycle.residual, step)
            leave = (cycle.residual <= target) | cycle.exhausted
            if leave.any():
                gone, keep = leave.nonzero()[0], (~leave).nonzero()[0]
                reasons = [Status.CONVERGED if r <= t else Status.STAGNATED
                           for r, t in zip(cycle.residual[gone], target[gone], strict=True)]  # fmt: skip
                result.leave(columns[gone], take(X, gone) + cycle.take(gone).update(system), step, reasons)
                if not keep.size:
                    return result
                system, columns, target, before = system.select(keep), columns[keep], target[keep], before[keep]
                X, R, cycle = take(X, keep), take(R, keep), cycle.take(keep)
        correction = cycle.update(system)
        X, R = X + correction, R - system.product(correction)
        leave = (norms(R) > GAIN * before) | (step >= max_steps)
        if leave.any():
            gone, keep = leave.nonzero()[0], (~leave).nonzero()[0]
            reason = Status.MAX_STEPS if step >= max_steps else Status.STAGNATED
            result.leave(columns[gone], take(X, gone), step, [reason] * len(gone))
            if not keep.size:
                return result
            system, columns, target = system.select(keep), columns[keep], target[keep]
            X, R = take(X, keep), take(R, keep)


class _Cycle:
    """Arnoldi's recurrence A P⁻¹ V = V H for every column of R, with H made upper triangular as it grows.

    Attributes:
        limit: steps that there is room for.
        residual: ‖r‖ of the best correction so far, (k,).
        exhausted: whether the space has nothing new, (k,): the residual is zero then, or A singular.
    """

    def __init__(self, R: Tensor, limit: int) -> None:
        n, k = R.shape
        kind = np.complex128 if R.is_complex() else np.float64
        self.limit, self.steps = limit, 0
        self.residual, self.exhausted = norms(R), np.zeros(k, dtype=bool)
        self._V = R.new_zeros(k, limit + 1, n)
        self._V[:, 0] = (R / torch.as_tensor(self.residual, dtype=R.dtype, device=R.device)).mT
        self._upper, self._right = np.zeros((k, limit, limit), dtype=kind), np.zeros((k, limit + 1), dtype=kind)
        self._cosines, self._sines = np.zeros((k, limit)), np.zeros((k, limit), dtype=kind)
        self._right[:, 0] = self.residual
        self._scale, self._history = np.zeros(k), np.zeros((k, limit))

    def take(self, columns: Scalars) -> _Cycle:
        """The cycle of some columns only."""
        part = object.__new__(_Cycle)
        part.limit, part.steps = self.limit, self.steps
        part._V = self._V[torch.as_tensor(columns, device=self._V.device)]
        for name in ("residual", "exhausted", "_upper", "_right", "_cosines", "_sines", "_scale", "_history"):
            setattr(part, name, getattr(self, name)[columns])
        return part

    def extend(self, system: System) -> None:
        """One product."""
        j, V = self.steps, self._V
        tol = ROUNDING * torch.finfo(V.dtype).eps
        v = V[:, j].mT
        if system.precondition is not None:
            v = system.precondition(v)
            check_finite(v, "the preconditioner's product")
        W = system.product(v)
        size, w, basis = norms(W), W.mT.unsqueeze(2), V[:, : j + 1]
        h = basis.conj() @ w
        w = w - basis.mT @ h
        more = basis.conj() @ w  # Gram–Schmidt twice
        w = (w - basis.mT @ more).squeeze(2)
        below = norms(w.mT)
        new = below > tol * size
        below = np.where(new, below, 0.0)
        V[:, j + 1] = w * torch.as_tensor(divide(np.ones_like(below), below), dtype=V.dtype, device=V.device)[:, None]
        self._rotate(j, np.array((h + more).squeeze(2).tolist(), dtype=self._upper.dtype), below, tol)
        self.exhausted = self.exhausted | ~new
        self.steps += 1

    def _rotate(self, j: int, h: Scalars, below: Scalars, tol: float) -> None:
        """The rotations so far on the new column of H, and one [c s; −s̄ c] more that takes ``below`` away."""
        c, s = self._cosines, self._sines
        for i in range(j):
            h[:, i], h[:, i + 1] = (
                c[:, i] * h[:, i] + s[:, i] * h[:, i + 1],
                c[:, i] * h[:, i + 1] - (s[:, i].conj() * h[:, i]),
            )
        size = abs(h[:, j])
        length = np.hypot(size, below)
        self._scale = np.maximum(self._scale, length)
        singular = length <= tol * self._scale  # nothing that this direction could take away from the residual
        phase = np.where(size > 0, h[:, j] / np.where(size > 0, size, 1.0), 1.0)
        c[:, j] = np.where(singular, 1.0, divide(size, length))
        s[:, j] = np.where(singular, 0.0, phase * divide(below, length))
        h[:, j] = np.where(singular, 1.0, phase * length)
        self._upper[:, : j + 1, j] = h
        left = self._right[:, j].copy()
        self._right[:, j] = np.where(singular, 0.0, c[:, j] * left)
        self._right[:, j + 1] = -s[:, j].conj() * left
        self.residual = self._history[:, j] = np.where(singular, abs(left), abs(self._right[:, j + 1]))

    def update(self, system: System) -> Tensor:
        """The correction (n, k) of smallest residual."""
        y = np.stack([self._coefficients(i) for i in range(len(self.residual))])
        weights = torch.as_tensor(y[:, :, None], dtype=self._V.dtype, device=self._V.device)
        X = (self._V[:, : self.steps].mT @ weights).squeeze(2).mT
        return X.contiguous() if system.precondition is None else system.precondition(X)

    def _coefficients(self, i: int) -> Scalars:
        """Of the vectors of column i; of as many as rounding allows where A is singular, and y grows out of bounds."""
        tol = ROUNDING * torch.finfo(self._V.dtype).eps * self._scale[i]
        best, least = np.zeros(self.steps, dtype=self._upper.dtype), np.inf
        for d in range(self.steps, 0, -1):
            if self._history[i, d - 1] >= least:  # it only grows as vectors are left out
                break
            y = np.linalg.solve(self._upper[i, :d, :d], self._right[i, :d])
            rounding = tol * np.linalg.norm(y)
            if self._history[i, d - 1] + rounding < least:
                best[:], least = 0.0, self._history[i, d - 1] + rounding
                best[:d] = y
            if rounding <= 1e-3 * self._history[i, d - 1] or rounding <= tol:
                break
        return best
