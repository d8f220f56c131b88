"""``solve``: x = A⁻¹ b, differentiable in b, in the shifts, and in everything that makes A's product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..methods import Auto
from ..numerics import as_block, check_finite, unwrap
from ..operators import Diagonal, Identity, LinearOperator, aslinearoperator
from ..operators.base import check_square
from ..pairing import Cotangents, Pair, Run
from ..result import Info, OnFailure, report
from .auto import choose
from .cg import CG
from .direct import Direct
from .gmres import GMRES
from .minres import MINRES
from .multishift import solve_shifted
from .preconditioners import as_product
from .products import adjoint_of, adjoint_preconditioner, plain
from .system import Kernel, Outcome, Product, Scalars, inner, solve_columns, worst

Solver = CG | MINRES | GMRES | Direct


def solve(
    A: Any,
    b: Tensor,
    *,
    method: Any = Auto(),
    preconditioner: Any = None,
    x0: Tensor | None = None,
    shifts: Any = None,
    backward: Any = None,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Tensor | tuple[Tensor, Info]:
    """Solve A x = b, or (A + σ_i I) x_i = b for many shifts at once.

    A column is done when its recomputed residual has ‖b − A x‖ ≤ max(rtol·‖b‖, atol). Right-hand sides are scaled to
    unit norm first and zero ones answered with zero, so that 1e-30 and 1e30 work alike.

    Args:
        A: square operator (n, n), or anything that ``aslinearoperator`` takes.
        b: right-hand side (n,), or a block (n, k); the dtype and device of A.
        method: ``CG()``, ``MINRES()``, ``GMRES()``, ``Direct()``, or ``Auto()``, which is decided by
            :func:`ritz.solve.choose`. With CG or MINRES the caller promises that A is Hermitian where A does not say.
        preconditioner: ``Jacobi()``, ``RandomlyPivotedCholesky(rank)``, an object with ``solve(X)``, or a callable
            X -> P⁻¹ X; Hermitian positive definite. For GMRES any invertible linear map, whose adjoint preconditions
            the backward solve where autograd can give it. Not with shifts, nor with Direct.
        x0: first guess, shape of b (Direct does not need it). Not with shifts.
        shifts: real tensor (s,); CG then needs the products of one run for all of them (and s·k to check), Direct one
            eigendecomposition; MINRES and GMRES run s·k columns.
        backward: method of the backward solve; None is the forward's with the relative tolerance it aimed for.
        return_info: whether to return (x, info).
        on_failure: "warn", "raise" or "ignore" when a column misses its tolerance, also in backward.

    Returns:
        x of b's shape; with shifts (s, n) or (s, n, k). With ``return_info`` also an :class:`~ritz.result.Info`:
        ``residual`` is the recomputed ‖b − A x‖/‖b‖ per column, (k,) or (s, k); ``details`` has the ``steps`` and
        ``status`` of every column; ``backward`` is the report of the last backward pass. A column that failed is
        finite, the last iterate that did not make matters worse, with its true residual in the report.

    Raises:
        OperandError: for operands that do not fit together, or a method that does not fit A.
        DomainError: from Direct, for a singular or not positive definite matrix.
        NonFiniteError: for NaN or Inf in b, x0, shifts or in a product.
        ConvergenceError: with ``on_failure="raise"``.

    Cost: see the method. Backward: one solve of the same kind with A's adjoint, and one pairing of width k (s·k).
    Gradient: λ = A⁻ᴴ x̄ gives b̄ = λ, Ā through the pairing ⟨−λ, dA x⟩, and σ̄_i = −Re λ_iᴴ x_i. First order. The
        preconditioner and x0 are constants: the solution does not depend on them. A block of shifts has a different
        cotangent for every shift, so its backward solve runs s·k columns, each with its own shift.

    Example:
        >>> import torch
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> solve(A, torch.tensor([1.0, 2.0]))
        tensor([0.0909, 0.6364])
    """
    A = aslinearoperator(A)
    check_square(A, "solve")
    block = as_block(b, A.shape[0], "b", dtype=A.dtype, device=A.device)
    first = None if x0 is None else _first_guess(x0, b, A)
    sigma = None if shifts is None else _shift_tensor(shifts, A)
    if sigma is not None and (preconditioner is not None or x0 is not None):
        raise OperandError("shifts= excludes preconditioner= and x0=: the shared run needs A + σI as it is, from zero")
    if on_failure not in ("warn", "raise", "ignore"):
        raise OperandError(f"on_failure={on_failure!r} is not known; give 'warn', 'raise' or 'ignore'")
    method = _resolve(method, A, preconditioner is not None)
    _check_method(method, A, sigma is not None, preconditioner)
    back = None if backward is None else _resolve(backward, A, preconditioner is not None)
    if back is not None:
        _check_method(back, A, sigma is not None, None)
    if A.hermitian is None and any(isinstance(m, (CG, MINRES)) for m in (method, back)):
        A = A.declare(hermitian=True)

    with Run(A, *((b,) if sigma is None else (b, sigma))) as run:
        check_finite(b, "b")
        B, shift, count = unwrap(block).detach(), None, block.shape[1]
        if sigma is not None:
            check_finite(sigma, "shifts")
            shift = unwrap(sigma).detach().to(torch.float64).repeat_interleave(count)
            B = B.repeat(1, sigma.numel())
        precondition = None if preconditioner is None else plain(as_product(preconditioner, A))
        kernel = _bind(method, run, precondition, sigma, shared=True)
        rtol, atol = method.rtol or 0.0, method.atol
        out, target = solve_columns(kernel, plain(run.matmat), B, first, rtol=rtol, atol=atol, shift=shift)
        products = run.num_matvecs + _dense_products(method, A)
    info = _info(method, out, products, None if sigma is None else (sigma.numel(), count))
    what = f"solve by {method} at n={A.shape[0]} in {A.dtype}"
    report(info, what=what, target=_at_worst(out, target), on_failure=on_failure)

    def fold(X: Tensor) -> Tensor:
        """Columns (n, s·k) as the user sees them."""
        if sigma is not None:
            X = X.reshape(X.shape[0], sigma.numel(), count).permute(1, 0, 2)
        return X.squeeze(-1) if b.ndim == 1 else X

    def unfold(x: Tensor) -> Tensor:
        """The way back."""
        x = x.unsqueeze(-1) if b.ndim == 1 else x
        return x if sigma is None else x.permute(1, 0, 2).reshape(x.shape[1], sigma.numel() * count)

    X = out.X
    x = fold(X) if sigma is None else fold(X).contiguous()
    if not run.wants_gradient():
        return (x, info) if return_info else x

    aim = back if back is not None else _backward_method(method, target)
    sided = isinstance(aim, GMRES) and precondition is not None
    reverse = kernel if back is None and not sided and (sigma is None or not isinstance(method, CG)) else None

    def rule(x_bar: Tensor | None) -> Cotangents:
        none: list[Tensor | None] = [None] if sigma is None else [None, None]
        if x_bar is None:
            return Cotangents([None], none)
        check_finite(x_bar, "the cotangent of solve's result")
        before = run.num_matvecs
        G, product, rtol = unfold(unwrap(x_bar)), plain(adjoint_of(run)), aim.rtol or 0.0
        other = adjoint_preconditioner(precondition, G) if sided and precondition is not None else precondition
        solver = reverse or _bind(aim, run, other, sigma, shared=False)
        adjoint, target = solve_columns(solver, product, G, None, rtol=rtol, atol=aim.atol, shift=shift, adjoint=True)
        products = run.num_matvecs - before + (_dense_products(aim, A) if reverse is None else 0)
        info.backward = _info(aim, adjoint, products, None if sigma is None else (sigma.numel(), count))
        text = f"backward of solve by {aim} at n={A.shape[0]} in {A.dtype}"
        report(info.backward, what=text, target=_at_worst(adjoint, target), on_failure=on_failure)
        Lam = adjoint.X
        if sigma is None:
            return Cotangents([Pair(-Lam)], [Lam])
        sigma_bar = -torch.as_tensor(inner(Lam, X), device=X.device).reshape(sigma.numel(), count).sum(1)
        return Cotangents([Pair(-Lam)], [Lam.reshape(A.shape[0], sigma.numel(), count).sum(1), sigma_bar])

    (x,) = run.attach([x], rule, [X], name="solve")
    return (x, info) if return_info else x


def _resolve(method: Any, A: LinearOperator, preconditioned: bool) -> Solver:
    """The method that runs, with its defaults filled in."""
    if isinstance(method, Auto):
        method = choose(A, preconditioned=preconditioned)
    if not isinstance(method, (CG, MINRES, GMRES, Direct)):
        raise OperandError(f"method is {method!r}; expected Auto(), CG(), MINRES(), GMRES() or Direct()")
    return method.resolve(A)


def _check_method(method: Solver, A: LinearOperator, shifted: bool, preconditioner: Any) -> None:
    """Raise where what is known of A excludes the method."""
    name = type(method).__name__
    if isinstance(method, Direct):
        if preconditioner is not None:
            raise OperandError("Direct() takes no preconditioner; drop it, or use method=CG() or MINRES()")
        return
    if isinstance(method, GMRES):
        return
    if A.hermitian is False:
        raise OperandError(
            f"{name} needs a Hermitian operator; this one is known not to be (a matrix is compared with its adjoint "
            "exactly): declare it by ritz.aslinearoperator(A, hermitian=True), or psd=True, if it is Hermitian up to "
            "rounding, and use method=GMRES() or Direct() if it is not"
        )
    if isinstance(method, CG) and A.psd is False and not shifted:
        raise OperandError("CG needs a positive definite operator; this one has psd=False: use MINRES() or Direct()")


def _bind(method: Solver, run: Run, precondition: Product | None, sigma: Tensor | None, *, shared: bool) -> Kernel:
    """The method as a solver of unit-norm blocks; CG shares one run between all shifts if ``shared``."""
    if isinstance(method, Direct):
        return method.bind(run.bound, sigma is not None)
    if sigma is None or not shared or not isinstance(method, CG):
        return method.bind(run.bound, precondition)
    limit, values = method.limit(run.A.shape[0]), unwrap(sigma).detach().to(torch.float64)

    def kernel(
        product: Product, B: Tensor, X0: Tensor | None, target: Scalars, shift: Tensor | None, adjoint: bool
    ) -> Outcome:
        k = B.shape[1] // values.numel()
        return solve_shifted(product, B[:, :k], values, target[:k], limit)

    return kernel


def _backward_method(method: Solver, target: Scalars) -> Solver:
    """The forward's method for the backward solve: an absolute tolerance has no meaning for a cotangent's scale."""
    if isinstance(method, Direct) or method.atol == 0:
        return method
    aimed = target[target < 1]
    rtol = float(aimed.min()) if aimed.size else method.rtol
    return replace(method, rtol=rtol or method.rtol, atol=0.0)


def _info(method: Solver, out: Outcome, products: int, shape: tuple[int, int] | None) -> Info:
    """The report; ``shape`` is (s, k) with shifts."""
    details: dict[str, object] = {"steps": tuple(out.steps), "status": tuple(out.status), **out.details}
    residual = torch.from_numpy(out.residual if shape is None else out.residual.reshape(shape))
    depth = max(out.steps, default=0)
    return Info(method, products, depth, residual, status=worst(out.status), details=details)


def _at_worst(out: Outcome, target: Scalars) -> float:
    """The target of the column with the largest residual, for the warning's text."""
    return float(target[out.residual.argmax()]) if target.size else 0.0


def _dense_products(method: Solver, A: LinearOperator) -> int:
    """Products that a dense form of an operator known only by its product takes."""
    by_products = type(A).to_dense is LinearOperator.to_dense and not isinstance(A, (Diagonal, Identity))
    return A.shape[1] if isinstance(method, Direct) and by_products else 0


def _first_guess(x0: Tensor, b: Tensor, A: LinearOperator) -> Tensor:
    guess = as_block(x0, A.shape[0], "x0", dtype=A.dtype, device=A.device)
    if x0.shape != b.shape:
        raise OperandError(f"x0 has shape {tuple(x0.shape)}; expected that of b, {tuple(b.shape)}")
    check_finite(x0, "x0")
    return unwrap(guess).detach()


def _shift_tensor(shifts: Any, A: LinearOperator) -> Tensor:
    sigma = shifts if isinstance(shifts, Tensor) else torch.as_tensor(shifts, dtype=torch.float64)
    if sigma.ndim != 1 or sigma.numel() == 0 or not sigma.is_floating_point():
        raise OperandError(
            f"shifts has shape {tuple(sigma.shape)} and dtype {sigma.dtype}; expected a real floating-point tensor "
            "(s,) with s >= 1 (one shift sigma: solve with A.shift(sigma))"
        )
    return sigma.to(A.device)
