"""Several functions of one operator on several vectors, summed: y_p = Σ_j f_pj(A) v_j from one block Krylov run.

What φ-functions of a Hermitian operator and the pair (cos t√A, sinc t√A) have in common. Rule F: one space from the
vectors in the forward pass, one from the cotangents of the y_p in backward, all blocks X_pj compressed together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..krylov.arnoldi import ArnoldiState
from ..methods import Arnoldi, Frechet, Lanczos
from ..numerics import check_finite
from ..operators.base import LinearOperator
from ..pairing import Cotangents, Pair, Run
from ..result import Info, OnFailure, report
from . import frechet
from .composed import Part
from .scalar import ScalarFunction
from .space import GeneralSpace, HermitianSpace, Space, build, check_psd, combine, info_of, smallest

Table = Sequence[Sequence[ScalarFunction | None]]


def table_multiply(
    table: Table,
    A: LinearOperator,
    V: Tensor,
    t: Tensor,
    *,
    method: Lanczos | Arnoldi,
    gradient: Frechet,
    on_failure: OnFailure,
    what: str,
    quiet: bool = False,
) -> tuple[list[Tensor], Info]:
    """y_p = Σ_j table[p][j](A) v_j for V (n, J, m): J vectors in each of m independent problems; y_p is (n, m).

    ``t`` (no dimension) is the time that the functions were made with; None in the table is zero. Gradients reach A's
    tensors, V and t (through ``in_time`` of the functions). ``quiet``: the caller reports on the forward pass.
    """
    n, J, m = V.shape
    check_finite(V, "the vectors")
    functions = list(dict.fromkeys(f for row in table for f in row if f is not None))
    with Run(A, V, t) as run:
        columns = V.detach().transpose(1, 2).reshape(n, m * J)  # by problem: bases of one problem lie side by side
        space, error, status = build(run.matmat, columns, method, functions, psd=A.psd)
        space.check_domain(functions)
        values = [_row(space, row) for row in table]
        info = info_of(method, space, error, status, run.num_matvecs)
        report(info, what=what, target=method.tolerance(V.dtype), on_failure="ignore" if quiet else on_failure)
        check_psd(A, space, info, on_failure)
        if not m or not run.wants_gradient():
            return values, info
        rule = _rule(run, space, table, m, t, method, gradient, info, on_failure, what)
    block = space.basis.reshape(m, J * space.basis.shape[1], n)
    return list(run.attach(values, rule, [block], name=what)), info


def select(space: Space, rows: slice) -> Space:
    """The sub-batch of a space."""
    if rows.indices(space.basis.shape[0]) == (0, space.basis.shape[0], 1):
        return space
    fields = {f.name: getattr(space.state, f.name)[rows] for f in dataclasses.fields(space.state)}
    if isinstance(space, HermitianSpace):
        return HermitianSpace(type(space.state)(**fields), space.ritz[rows], space.vectors[rows])
    return GeneralSpace(ArnoldiState(**fields), space.H[rows])


def conjugate_small(space: Space, f: ScalarFunction) -> Tensor:
    """‖g‖ f̄(H) e₁ in the space of (Aᴴ, g): the cotangent of v is f(A)ᴴ g = f̄(Aᴴ) g."""
    if isinstance(space, HermitianSpace):
        return space.small(f).conj().resolve_conj()  # its vectors are real
    conj = space.H.conj().resolve_conj()
    return space.state.norm.to(conj.dtype).unsqueeze(1) * f.matrix(conj)[:, :, 0].conj()


def real_parts(
    functions: Sequence[ScalarFunction], cotangents: Sequence[Tensor | None], complex_basis: bool
) -> list[tuple[ScalarFunction, Tensor]]:
    """(function, cotangent block) pairs that live in the field of A.

    A real A with complex values: Re⟨g, df v⟩ = ⟨Re g, d(Re f) v⟩ + ⟨Im g, d(Im f) v⟩, two real cotangents.
    """
    parts: list[tuple[ScalarFunction, Tensor]] = []
    for f, g in zip(functions, cotangents, strict=True):
        if g is None:
            continue
        if g.is_complex() and not complex_basis:
            parts += [(Part(f, False), g.real.contiguous()), (Part(f, True), g.imag.contiguous())]
        else:
            parts.append((f, g))
    return parts


def _row(space: Space, row: Sequence[ScalarFunction | None]) -> Tensor:
    """Σ_j f_j(A) v_j, (n, m)."""
    total: Tensor | None = None
    for j, f in enumerate(row):
        if f is not None:
            some = select(space, slice(j, None, len(row)))
            y = combine(some.basis, some.small(f))
            total = y if total is None else total + y
    assert total is not None
    return total


def _rule(
    run: Run,
    space: Space,
    table: Table,
    m: int,
    t: Tensor,
    method: Lanczos | Arnoldi,
    gradient: Frechet,
    info: Info,
    on_failure: OnFailure,
    what: str,
) -> Callable[..., Cotangents]:
    backward = gradient.method or method
    slopes = [[None if f is None else f.in_time() for f in row] for row in table]
    basis = space.basis
    J, k = basis.shape[0] // m, basis.shape[1]

    def rule(*cotangents: Tensor | None) -> Cotangents:
        live = [(p, g) for p, g in enumerate(cotangents) if g is not None and bool((g != 0).any())]
        if not live:
            return Cotangents([None], [None, None])
        t_bar = _time_gradient(space, slopes, t, live) if run.needs_input(1) else None
        P = len(live)
        G = torch.stack([g for _, g in live], 2).reshape(-1, m * P)
        functions = list(dict.fromkeys(f for p, _ in live for f in table[p] if f is not None))
        before = run.num_matvecs
        left, error, status = build(run.adjoint(m * P), G, backward, functions, k, psd=run.A.psd)
        info.backward = info_of(backward, left, error, status, run.num_matvecs - before)
        report(info.backward, what=f"backward of {what}", target=backward.tolerance(G.dtype), on_failure=on_failure)
        ku = left.basis.shape[1]
        X = torch.zeros(m, P * ku, J * k, dtype=torch.float64, device=G.device)
        V_bar = torch.zeros(basis.shape[2], J, m, dtype=basis.dtype, device=G.device) if run.needs_input(0) else None
        index = torch.arange(m, device=G.device) * J
        for i, (p, _) in enumerate(live):
            some = select(left, slice(i, None, P))
            for j, f in enumerate(table[p]):
                if f is None:
                    continue
                if V_bar is not None:
                    V_bar[:, j] += combine(some.basis, conjugate_small(some, f))
                if run.needs_operator():
                    part = frechet.core(some, space, f, index + j)
                    X = X.to(part.dtype)
                    X[:, i * ku : (i + 1) * ku, j * k : (j + 1) * k] = part
        if not run.needs_operator():
            return Cotangents([None], [V_bar, t_bar])
        low = frechet.compress(X, gradient.tolerance(basis.dtype, smallest(error)))
        Lam = low.left.to(basis.dtype).mT @ left.basis.reshape(m, P * ku, -1)
        return Cotangents([Pair(Lam, low.right)], [V_bar, t_bar])

    return rule


def _time_gradient(space: Space, slopes: Table, t: Tensor, live: list[tuple[int, Tensor]]) -> Tensor:
    """t̄ = Σ_p ⟨∂y_p/∂t, g_p⟩."""
    total = torch.zeros((), dtype=t.dtype, device=t.device)
    for p, g in live:
        slope = _row(space, slopes[p])
        dot = (slope.conj() * g).sum()
        total = total + (dot if t.is_complex() else dot.real).to(t.dtype)
    return total
