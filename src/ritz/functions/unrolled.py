"""The reference rule: plain autograd through every step, any order of differentiation, memory of the whole loop.

The loops here are written for autograd (no in-place steps), not for speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods import Arnoldi, Lanczos
from ..numerics import full_precision
from ..operators.base import LinearOperator
from ..result import Info, Status
from .scalar import Exp, ScalarFunction
from .terms import Term

DEFAULT_DEPTH = 50  # an unrolled depth is fixed: autograd through a data-dependent one would mean little


def unrolled_factorization(A: LinearOperator, v: Tensor, method: Lanczos | Arnoldi) -> tuple[Tensor, Tensor, Tensor]:
    """Basis (n, k), small matrix (k, k) and ‖v‖ of one starting vector, recorded by autograd.

    Lanczos and Arnoldi coincide under full orthogonalisation; for Lanczos the Hermitian part of H is T. The loop ends
    early where the Krylov space is exhausted.
    """
    depth = min(method.num_matvecs or min(method.max_matvecs, DEFAULT_DEPTH), v.shape[0])
    norm = torch.linalg.vector_norm(v)
    if float(norm.detach()) == 0:  # f(A)0 = 0, but its derivative in v would need a direction: refuse the division
        return v.unsqueeze(1), torch.eye(1, dtype=v.dtype, device=v.device), norm
    basis = [v / norm]
    columns: list[Tensor] = []
    size = 0.0
    for j in range(depth):
        w = (A._matmat(basis[j].unsqueeze(1))).squeeze(1)
        h = torch.zeros(j + 1, dtype=v.dtype, device=v.device)
        window = basis if method.reorthogonalize or isinstance(method, Arnoldi) else basis[max(0, j - 1) :]
        for _ in range(2 if method.reorthogonalize else 1):
            Q = torch.stack(window, dim=1)
            c = Q.mH @ w
            w = w - Q @ c
            h = h + torch.cat([h.new_zeros(j + 1 - c.shape[0]), c])
        beta = torch.linalg.vector_norm(w)
        size = max(size, float(torch.linalg.vector_norm(h.detach())) + float(beta.detach()))
        last = j + 1 == depth or float(beta.detach()) <= 10 * torch.finfo(v.dtype).eps * size
        columns.append(
            torch.cat(
                [h, h.new_zeros(depth - j - 1)]
                if last
                else [h, beta.to(h.dtype).reshape(1), h.new_zeros(depth - j - 2)]
            )
        )
        if last:
            break
        basis.append(w / beta)
    k = len(basis)
    H = torch.stack(columns, dim=1)[:k, :k]
    if isinstance(method, Lanczos):
        sub = H.diagonal(-1).real
        H = torch.diag_embed(H.diagonal().real) + torch.diag_embed(sub, 1) + torch.diag_embed(sub, -1)
    return torch.stack(basis, dim=1), H, norm


def _first_column(f: ScalarFunction, H: Tensor, method: Lanczos | Arnoldi, time: Tensor | None) -> Tensor:
    """f(H) e₁, recorded: through eigenvalues for a Hermitian H, through the dense function otherwise; in doubles."""
    H = H.to(torch.complex128 if H.is_complex() else torch.float64)
    if isinstance(method, Lanczos):
        w, U = torch.linalg.eigh(H)
        f.check_domain(w.detach())
        fw = torch.exp(time * w) if time is not None else f(w)
        weights = fw * U[0].conj()
        return U.to(weights.dtype) @ weights
    if time is not None:
        return torch.linalg.matrix_exp(time * H.to(torch.promote_types(H.dtype, time.dtype)))[:, 0]
    return f.matrix(H.unsqueeze(0))[0, :, 0]


def _narrow(c: Tensor, V: Tensor) -> Tensor:
    """Back from doubles to the precision of the vectors; complex where c or V is."""
    return c.to(V.dtype.to_complex() if c.is_complex() else V.dtype)


@full_precision()
def unrolled_multiply(
    functions: Sequence[ScalarFunction], A: LinearOperator, V: Tensor, times: Tensor | None, method: Lanczos | Arnoldi
) -> tuple[list[Tensor], Info]:
    """f_p(A) V by recorded loops, column by column."""
    outs: list[list[Tensor]] = [[] for _ in functions]
    depth, products = 0, 0
    for v in V.unbind(1):
        Q, H, norm = unrolled_factorization(A, v, method)
        depth, products = max(depth, H.shape[0]), products + H.shape[0]
        for p, f in enumerate(functions):
            time = times[p] if times is not None and isinstance(f, Exp) else None
            c = _narrow(norm * _first_column(f, H, method, time), V)
            outs[p].append(Q.to(c.dtype) @ c)
    values = [torch.stack(columns, dim=1) for columns in outs]
    return values, Info(method, products, depth, status=Status.FIXED)


@full_precision()
def unrolled_forms(A: LinearOperator, V: Tensor, terms: Sequence[Term], method: Lanczos) -> tuple[list[Tensor], Info]:
    """Quadratic forms by recorded loops."""
    values: list[Tensor] = []
    depth, products = 0, 0
    for term in terms:
        rows = []
        for v in V[:, term.columns].unbind(1):
            _, H, norm = unrolled_factorization(A, v, method)
            depth, products = max(depth, H.shape[0]), products + H.shape[0]
            shifts = term.shifts if term.shifts is not None else torch.zeros(1, dtype=H.dtype, device=H.device)
            eye = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
            forms = [norm**2 * _first_column(term.f, H + s.to(H.dtype) * eye, method, None)[0] for s in shifts]
            rows.append(_narrow(torch.stack(forms), V.real))
        value = torch.stack(rows, dim=1)
        values.append(value if term.shifts is not None else value[0])
    return values, Info(method, products, depth, status=Status.FIXED)
