"""``eigsh``: extremal eigenpairs of a Hermitian operator, differentiable in what makes its product."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite
from ..operators import LinearOperator, aslinearoperator
from ..operators.base import check_square
from ..pairing import Cotangents, Pair, Run
from ..result import Info, OnFailure, Status, report
from ..solve import MINRES
from ..solve.system import solve_columns
from .thick_restart import thick_restart

MOST_BYTES = 8 << 30  # of the basis


class EigenPairs(NamedTuple):
    """Eigenvalues (k,), real, best first, and orthonormal eigenvectors (n, k)."""

    values: Tensor
    vectors: Tensor


def eigsh(
    A: Any,
    k: int = 6,
    *,
    which: str = "LA",
    rtol: float | None = None,
    block: int = 1,
    basis: int | None = None,
    max_matvecs: int | None = None,
    v0: Tensor | None = None,
    seed: int = 0,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """The k extremal eigenpairs of a Hermitian operator, by thick-restart Lanczos.

    Args:
        A: Hermitian operator (n, n), or what ``aslinearoperator`` takes.
        k: number of pairs, at most n.
        which: "LA" largest, "SA" smallest, "LM" largest magnitude. For the smallest of a positive definite operator
            whose largest are far away, ask for "LA" of the operator that solves with it.
        rtol: residual ‖A v − λ v‖ relative to the largest |λ| that was seen; None: 1e-9 in float64, 1e-5 in float32.
        block: columns that go through the product together: more than one where a block product costs little more than
            a single one, or where eigenvalues are repeated: a block finds as many copies at once.
        basis: vectors that are kept in memory; default max(2k, k + 20) + 2 block.
        max_matvecs: columns that go through the product at most; default 100 k + 1000.
        v0: start (n,) or (n, block); default random from ``seed``.

    Returns:
        :class:`EigenPairs`, in the order of ``which``; with ``return_info`` also an :class:`~ritz.result.Info` with
        ``residual`` (k,), relative as above, and ``details["restarts"]``.

    Raises:
        OperandError: a non-Hermitian operator, k beyond n, an unknown ``which``.
        ConvergenceError: with ``on_failure="raise"``; otherwise a pair that missed rtol is reported.

    Gradient: first order. λ̄ costs one pairing of width k and no product. A cotangent of the vectors costs one MINRES
        solve of (A − λ_i) on the complement for every i. Eigenvectors of (nearly) repeated eigenvalues have no
        derivative of their own; the part within such a group is left out, which is right for whatever depends on the
        eigenspace alone. Signs (phases) are arbitrary, and the derivative along them is zero.

    A converged answer is checked from a random direction (30 columns), since a Krylov space does not see further copies
    of a repeated eigenvalue; where it changes, the iteration goes on.

    Cost: products, and O(n·basis) a product for the orthogonalisation. Reference: Wu, Simon, "Thick-restart Lanczos
        method for large symmetric eigenvalue problems" (2000).

    Example:
        >>> import torch, ritz
        >>> values, vectors = ritz.eigsh(torch.diag(torch.arange(1.0, 7.0)), 2)
        >>> values
        tensor([6.0, 5.0])
    """
    A = aslinearoperator(A)
    check_square(A, "eigsh")
    n = A.shape[0]
    if A.hermitian is False:
        raise OperandError("eigsh needs a Hermitian operator; this one is known not to be: declare hermitian=True if "
                           "it is one up to rounding")  # fmt: skip
    if which not in ("LA", "SA", "LM"):
        raise OperandError(f"which={which!r}; expected 'LA', 'SA' or 'LM'")
    if not isinstance(k, int) or not 1 <= k <= n:
        raise OperandError(f"k={k!r}; expected a number of pairs from 1 to n = {n}")
    if not isinstance(block, int) or not 1 <= block <= n:
        raise OperandError(f"block={block!r}; expected a number of columns from 1 to n = {n}")
    if A.hermitian is None:
        A = A.declare(hermitian=True)
    single = A.dtype in (torch.float32, torch.complex64)
    rtol = (1e-5 if single else 1e-9) if rtol is None else rtol
    size = max(2 * k, k + 20) + 2 * block if basis is None else max(basis, k + 2 * block)
    limit = 100 * k + 1000 if max_matvecs is None else max_matvecs
    room, kept = MOST_BYTES // (n * A.dtype.itemsize), min(size, n)
    if kept > room:
        most = max(0, min(room // 2 - block, room - 2 * block - 20))
        instead = f"k up to {most} fits"
        if basis is not None and k + 2 * block <= room:
            instead = f"basis={room} fits"
        raise OperandError(
            f"{k} eigenpairs keep {kept} vectors of length {n}, {kept * n * A.dtype.itemsize / 2**30:.1f} GiB (limit "
            f"{MOST_BYTES / 2**30:.0f} GiB); {instead}"
        )
    with Run(A) as run:
        start = _start(A, v0, block, seed)
        found = thick_restart(run.matmat, start, k, which, min(size, n), rtol, limit)
        check_finite(found.values, "an eigenvalue")
        products = run.num_matvecs
    scale = found.scale or 1.0
    status = Status.CONVERGED if found.converged else Status.MAX_STEPS
    info = Info(f"thick-restart Lanczos, basis {min(size, n)}", products, min(size, n), found.residuals / scale,
                status=status, details={"restarts": found.restarts})  # fmt: skip
    report(info, what=f"eigsh(k={k}, which={which!r}) at n={n}", target=rtol, on_failure=on_failure)
    values, V = found.values.real if found.values.is_complex() else found.values, found.vectors

    def rule(values_bar: Tensor | None, V_bar: Tensor | None) -> Cotangents:
        left = torch.zeros_like(V)
        if values_bar is not None:
            left = left + V * values_bar.to(V.dtype)
        if V_bar is not None:
            left = left + _vector_part(run, values.detach(), V, V_bar, rtol)
        return Cotangents([Pair(left)], [])

    if not run.wants_gradient():
        pairs = EigenPairs(values, V)
    else:
        pairs = EigenPairs(*run.attach([values, V], rule, [V], name="eigsh"))
    return (pairs, info) if return_info else pairs


def _start(A: LinearOperator, v0: Tensor | None, block: int, seed: int) -> Tensor:
    n = A.shape[0]
    if v0 is None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(n, block, generator=generator, dtype=torch.float64)
        if A.dtype.is_complex:
            start = torch.complex(start, torch.randn(n, block, generator=generator, dtype=torch.float64))
        return start.to(A.device, A.dtype)
    start = v0.reshape(n, -1) if v0.numel() == n else v0
    if start.shape != (n, block) or start.dtype != A.dtype:
        raise OperandError(f"v0 has shape {tuple(v0.shape)} and {v0.dtype}; expected ({n},) or ({n}, block={block}), "
                           f"{A.dtype}")  # fmt: skip
    check_finite(start, "v0")
    return start.detach()


def _vector_part(run: Run, values: Tensor, V: Tensor, V_bar: Tensor, rtol: float) -> Tensor:
    """Λ with ⟨V̄, dV⟩ = Re⟨Λ, dA V⟩: v_i' = Σ_j v_j (v_jᴴ dA v_i)/(λ_i − λ_j) over all other eigenvectors.

    Those that were found are summed; the others are (λ_i − A)⁻¹ on the complement of V.
    """
    gap = values.unsqueeze(0) - values.unsqueeze(1)  # [j, i] = λ_i − λ_j
    same = gap.abs() <= 100 * max(rtol, torch.finfo(values.dtype).eps) * values.abs().max()
    inside = torch.where(same, torch.zeros_like(gap), 1.0 / torch.where(same, torch.ones_like(gap), gap))
    inner = V.mH @ V_bar
    out = V @ (inside.to(V.dtype) * inner)
    rest = V_bar - V @ inner

    def product(X: Tensor) -> Tensor:
        """A on the complement of V, which contains the solutions."""
        AX = run.bound._matmat(X)
        return AX - V @ (V.mH @ AX)

    solver = MINRES(rtol=max(rtol, 1e-10)).resolve(run.bound)
    shift = -values.to(torch.float64)  # (A − λ_i) w_i = −rest_i, a system of its own for every column
    solved, _ = solve_columns(
        solver.bind(run.bound, None), product, -rest, None, rtol=solver.rtol or 0.0, atol=0.0, shift=shift
    )
    return out + solved.X - V @ (V.mH @ solved.X)
