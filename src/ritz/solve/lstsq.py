"""``lstsq``: least squares by products, differentiable in b, the damping, and in everything that makes A's products."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import as_block, check_finite, unwrap
from ..operators import aslinearoperator
from ..pairing import Cotangents, Pair, Run
from ..result import Info, OnFailure, report
from .lsmr import LSMR, minimise
from .products import adjoint_of, plain
from .system import Outcome, Product, divide, norms, worst


def lstsq(
    A: Any,
    b: Tensor,
    *,
    method: LSMR = LSMR(),
    damp: float | Tensor = 0.0,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """The x of smallest ‖A x − b‖² + damp²‖x‖², and of those the one of smallest norm.

    Args:
        A: operator (m, n) with an adjoint product, or what ``aslinearoperator`` takes.
        b: (m,), or a block (m, k); the dtype and device of A.
        method: ``LSMR()``.
        damp: a number or tensor of no dimension, not negative.
        return_info: whether to return (x, info).
        on_failure: "warn", "raise" or "ignore" when a column misses its tolerance, also in backward.

    Returns:
        x (n,) or (n, k). With ``return_info`` also an :class:`~ritz.result.Info`: ``residual`` is the recomputed
        ‖Aᴴ(b − A x) − damp² x‖ / ‖Aᴴb‖ per column, ``details["residual_norm"]`` ‖b − A x‖ / ‖b‖.

    Raises:
        OperandError, NonFiniteError: operands that do not fit together, NaN or Inf.
        ConvergenceError: with ``on_failure="raise"``.

    Cost: see :class:`LSMR`. Backward: one or two problems of the same kind (one more in the forward pass where A has
        fewer rows than columns and there is no damping), and one pairing of width k with A and one with Aᴴ.
    Gradient: first order, for A of full rank or a positive damp. With u = A⁺ᴴ x̄ and w = A⁺ u (of the damped problem)
        b̄ = u and Ā is that of ⟨−u, dA x⟩ + ⟨w, dAᴴ (b − A x)⟩; without damping and with m < n the solution is the
        shortest one, which adds ⟨x̄ − Aᴴu, dAᴴ A⁺ᴴ x⟩.
    Reference: Golub, Pereyra, The differentiation of pseudo-inverses and nonlinear least squares problems, 1973; Roy,
        Hauberg, Krämer, Matrix-free least squares solvers: values, gradients, and what to do with them, 2025.

    Example:
        >>> import torch, ritz
        >>> ritz.lstsq(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 3.0, 5.0]))
        tensor([1.0000, 2.0000])
    """
    A = aslinearoperator(A)
    m, n = A.shape
    if not isinstance(method, LSMR):
        raise OperandError(f"method={method!r}; expected LSMR(...)")
    method = method.resolve(A)
    rtol, limit = method.rtol or 0.0, method.max_steps or 0
    block = as_block(b, m, "b", dtype=A.dtype, device=A.device)
    given = torch.as_tensor(damp, dtype=torch.float64 if not isinstance(damp, Tensor) else None)
    check_finite(given, "damp")
    if given.ndim or given.is_complex() or not float(given.detach()) >= 0:
        raise OperandError(f"damp={damp!r}; expected one real number >= 0")
    live = isinstance(damp, Tensor)
    with Run(A, *((b, damp) if live else (b,))) as run:
        check_finite(b, "b")
        B, size = unwrap(block).detach(), float(unwrap(given).detach())
        forward, backward = plain(run.matmat), plain(adjoint_of(run))
        problem = _Problem(forward, backward, A.shape, size)
        out, R = problem.solve(B, rtol, limit)
        X = out.X
        short, products = None, run.num_matvecs  # A⁺ᴴ x, for the derivative of the shortest solution
        if m < n and not size and run.wants_gradient():
            short, _, found = problem.adjoint(X, rtol, limit)
    info = _info(method, out, products)
    info.details |= out.details
    if short is not None:
        shortest = _info(method, found, run.num_matvecs - products)
        info.num_matvecs = run.num_matvecs
    what = f"lstsq by {method} at shape ({m}, {n}) in {A.dtype}"
    report(info, what=what, target=rtol, on_failure=on_failure)
    if short is not None:
        report(shortest, what=f"the part of its gradient that belongs to the shortest solution in {what}", target=rtol,
               on_failure=on_failure)  # fmt: skip
    x = X.squeeze(-1) if b.ndim == 1 else X
    if not run.wants_gradient():
        return (x, info) if return_info else x

    def rule(x_bar: Tensor | None) -> Cotangents:
        none = [None] * (3 if short is not None else 2), [None] * (2 if live else 1)
        if x_bar is None:
            return Cotangents(*none)
        check_finite(x_bar, "the cotangent of lstsq's result")
        G, before = unwrap(x_bar), run.num_matvecs
        G = G.unsqueeze(-1) if b.ndim == 1 else G
        u, rest, found = problem.adjoint(G, rtol, limit)
        if size:
            w = u[m:] / size
        elif m < n:
            w = torch.zeros_like(X)
        else:
            second, _ = problem.solve(u, rtol, limit)
            w, found = second.X, _both(found, second)
        info.backward = _info(method, found, run.num_matvecs - before)
        report(info.backward, what=f"backward of {what}", target=rtol, on_failure=on_failure)
        pairs: list[Pair | None] = [Pair(-u[:m]), Pair(w)]
        if short is not None:
            pairs.append(Pair(rest))
        b_bar = u[:m].squeeze(-1) if b.ndim == 1 else u[:m]
        damp_bar = [-2.0 * size * (w.conj() * X).sum().real.to(given.dtype).reshape(())] if live else []
        return Cotangents(pairs, [b_bar, *damp_bar])

    blocks, flags = [X, R[:m].contiguous()], [False, True]
    if short is not None:
        blocks, flags = [*blocks, short], [*flags, True]
    (x,) = run.attach([x], rule, blocks, adjoint=flags, name="lstsq")
    return (x, info) if return_info else x


class _Problem:
    """The problem with its damping as further rows: Ã = [A; damp·I], b̃ = [b; 0]."""

    def __init__(self, matmat: Product, rmatmat: Product, shape: tuple[int, int], damp: float) -> None:
        self._matmat, self._rmatmat, self._damp = matmat, rmatmat, damp
        self._m, self._n = shape

    def product(self, X: Tensor) -> Tensor:
        Y = self._matmat(X)
        return torch.cat([Y, self._damp * X]) if self._damp else Y

    def adjoint_product(self, U: Tensor) -> Tensor:
        if not self._damp:
            return self._rmatmat(U)
        return self._rmatmat(U[: self._m].contiguous()) + self._damp * U[self._m :]

    def solve(self, B: Tensor, rtol: float, limit: int) -> tuple[Outcome, Tensor]:
        """Minimiser and residuals b̃ − Ã x; right-hand sides are brought to size 1 first."""
        whole, scale = _scaled(B)
        if self._damp:
            whole = torch.cat([whole, whole.new_zeros(self._n, B.shape[1])])
        out, R = minimise(self.product, self.adjoint_product, whole, rtol, limit)
        out.X = out.X * scale
        ratio = divide(norms(R[: self._m]), norms(whole[: self._m]))
        out.details["residual_norm"] = torch.from_numpy(ratio)
        return out, R * scale

    def adjoint(self, G: Tensor, rtol: float, limit: int) -> tuple[Tensor, Tensor, Outcome]:
        """Ã⁺ᴴ g, what of g it does not reach, and the report."""
        G, scale = _scaled(G)
        out, rest = minimise(self.adjoint_product, self.product, G, rtol, limit)
        return out.X * scale, rest * scale, out


def _scaled(B: Tensor) -> tuple[Tensor, Tensor]:
    """Columns whose largest entry is 1, and what it was."""
    scale = B.abs().amax(0) if B.shape[0] else torch.ones(B.shape[1], device=B.device)
    scale = torch.where(scale > 0, scale, 1.0)
    return B / scale, scale


def _both(first: Outcome, second: Outcome) -> Outcome:
    """The report of two problems that were solved one after the other."""
    steps = [a + b for a, b in zip(first.steps, second.steps, strict=True)]
    status = [worst(pair) for pair in zip(first.status, second.status, strict=True)]
    return Outcome(second.X, np.maximum(first.residual, second.residual), steps, status)


def _info(method: LSMR, out: Outcome, products: int) -> Info:
    details: dict[str, object] = {"steps": tuple(out.steps), "status": tuple(out.status)}
    residual = torch.from_numpy(np.asarray(out.residual))
    return Info(method, products, max(out.steps, default=0), residual, status=worst(out.status), details=details)
