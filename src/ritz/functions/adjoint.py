"""Rule A: the exact derivative of the computed quantity, by the adjoint recurrence of the decomposition.

The small matrix' cotangent comes from the divided differences of f (never from differentiated eigenvectors), the rest
from ``krylov``: one adjoint product a step, one pairing of the whole basis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import BreakdownError
from ..krylov.arnoldi import adjoint_arnoldi
from ..krylov.lanczos import LanczosState, adjoint_lanczos
from ..methods import Arnoldi, Lanczos
from ..pairing import Cotangents, Pair, Run
from ..result import Info, Status
from . import frechet
from .scalar import ScalarFunction
from .space import GeneralSpace, HermitianSpace, Space, combine, decompose
from .terms import Term, form_input_gradients, shifted, term_cotangents

Attached = tuple[Callable[..., Cotangents], list[Tensor]]


def forms_by_adjoint(run: Run, space: HermitianSpace, terms: Sequence[Term], method: Lanczos, info: Info) -> Attached:
    """Rule A for quadratic forms, on the leading k* columns.

    Beyond convergence the recurrence differentiates rounding noise (with repeated eigenvalues no β is small, and the
    error grows without bound). A form's value does not change any more from the depth k* on where the coefficients
    of f(A)v have fallen below rounding; the adjoint starts there. Where a small β (a cluster of eigenvalues) would
    magnify rounding by ‖A‖/β, it starts before that β once less than this is lost.
    """
    state = _truncate(space, terms)
    short = decompose(state)
    m = space.ritz.shape[0]

    def rule(*cotangents: Tensor | None) -> Cotangents:
        weights = term_cotangents(terms, cotangents, m)
        X = frechet.symmetric_core(short, weights)
        value = torch.zeros_like(short.ritz[:, 0])
        for f, g in weights:
            value = value + g * _masked_sum(f(short.ritz), short.first.square())
        real = state.alpha.dtype
        norm = state.norm.double()
        norm_bar = torch.where(norm > 0, 2 * value / torch.where(norm > 0, norm, 1.0), torch.zeros_like(norm))
        before = run.num_matvecs
        Lam, V_bar = adjoint_lanczos(
            run.adjoint(m),
            state,
            Q_bar=None,
            alpha_bar=X.diagonal(dim1=1, dim2=2).to(real),
            beta_bar=(2 * X.diagonal(1, dim1=1, dim2=2)).to(real),
            residual_bar=None,
            norm_bar=norm_bar.to(real),
            reorthogonalize=method.reorthogonalize,
        )
        info.backward = Info(method, run.num_matvecs - before, int(state.depth.max()), status=Status.FIXED)
        shift_bars = form_input_gradients(space, terms, cotangents)[1:]
        return Cotangents([Pair(Lam)], [V_bar, *shift_bars])

    return rule, [state.Q]


def _masked_sum(a: Tensor, weights: Tensor) -> Tensor:
    return torch.where(weights == 0, torch.zeros_like(weights), a * weights).sum(1)


def _truncate(space: HermitianSpace, terms: Sequence[Term]) -> LanczosState:
    state = space.state
    k = state.Q.shape[1]
    needed = torch.ones_like(state.depth)
    size = (state.alpha.abs() + state.beta).amax(1, keepdim=True)
    # Rounding of a step past β_j, magnified; infinite at breakdown.
    noise = torch.finfo(state.alpha.dtype).eps * (size / state.beta).clamp(min=1)
    for term in terms:
        for f in shifted(term):
            c = space.small(f)
            tail = c.abs().square().flip(1).cumsum(1).flip(1).sqrt()
            live = 1 + (tail[:, 1:] > noise[:, :-1] * tail[:, :1]).long().cumprod(1).sum(1)
            needed[term.columns] = torch.maximum(needed[term.columns], live[term.columns])
    depth = torch.minimum(state.depth, needed)
    if bool((depth == state.depth).all()):
        return state
    past = torch.arange(k, device=depth.device) >= depth.unsqueeze(1)
    cut = (depth < state.depth).unsqueeze(1)
    ends = torch.arange(k, device=depth.device) >= depth.unsqueeze(1) - 1
    return dataclasses.replace(
        state,
        Q=state.Q.masked_fill(past.unsqueeze(2), 0),
        alpha=torch.where(past, state.alpha[:, :1], state.alpha),
        beta=torch.where(ends & cut, torch.zeros_like(state.beta), state.beta),
        residual=state.residual.masked_fill(cut, 0),
        depth=depth,
    )


def multiply_by_adjoint(
    run: Run, space: Space, functions: Sequence[ScalarFunction], times: Tensor | None, info: Info
) -> Attached:
    """Rule A for f(A)v. Raises BreakdownError where the Krylov space is exhausted: there k steps do not know it."""
    k = space.basis.shape[1]
    n = space.basis.shape[2]
    ended = (torch.linalg.vector_norm(space.state.residual, dim=1) == 0) & (space.state.depth < n)
    if bool(ended.any()):
        raise BreakdownError(
            f"the Krylov space is exhausted at depth {int(space.state.depth[ended].min())} of {k} (n = {n}): the "
            "derivative of f(A)v cannot be had from these steps by gradient=Adjoint(); use gradient=ritz.Frechet()"
        )
    basis, m, norm, method = space.basis, space.basis.shape[0], space.state.norm, info.method
    coefficients = [space.small(f) for f in functions]

    def rule(*cotangents: Tensor | None) -> Cotangents:
        Q_bar = torch.zeros_like(basis)
        norm_bar = torch.zeros_like(norm, dtype=torch.float64)
        small_bar = torch.zeros(m, k, k, dtype=_small_dtype(space), device=basis.device)
        time_bars = []
        for f, c, G in zip(functions, coefficients, cotangents, strict=True):
            if G is None:
                time_bars.append(torch.zeros((), device=basis.device))
                continue
            if times is not None:
                time_bars.append((combine(basis, space.small(f.in_time())).conj() * G).sum())
            rows = G.mT.unsqueeze(1)  # (m, 1, n)
            product = c.conj().to(_with(c, basis)).unsqueeze(2) * rows
            Q_bar += product if basis.is_complex() else product.real
            c_bar = (basis.conj().to(_with(G, basis)) @ rows.mT).squeeze(2)  # Qᴴ ȳ
            dot = (c.conj() * c_bar.to(_double(c_bar))).sum(1).real
            norm_bar += torch.where(norm > 0, dot / norm.double().clamp(min=1e-300), torch.zeros_like(dot))
            small_bar += _small_cotangent(space, f, c_bar.to(_double(c_bar)))
        before = run.num_matvecs
        Lam, V_bar = _recurrence(run, space, method, Q_bar, small_bar, norm_bar)
        info.backward = Info(method, run.num_matvecs - before, k, status=Status.FIXED)
        rest: list[Tensor | None] = []
        if times is not None:
            stacked = torch.stack([t.to(torch.complex128) for t in time_bars])
            rest = [(stacked if times.is_complex() else stacked.real).to(times.dtype)]
        return Cotangents([Pair(Lam)], [V_bar, *rest])

    return rule, [basis]


def _with(x: Tensor, basis: Tensor) -> torch.dtype:
    """The basis' dtype, complex if x is."""
    return basis.dtype.to_complex() if x.is_complex() and not basis.is_complex() else basis.dtype


def _double(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def _small_dtype(space: Space) -> torch.dtype:
    return torch.float64 if isinstance(space, HermitianSpace) else space.H.dtype


def _small_cotangent(space: Space, f: ScalarFunction, c_bar: Tensor) -> Tensor:
    """Cotangent of the small matrix from that of c = ‖v‖ f(T) e₁."""
    if isinstance(space, HermitianSpace):
        U = space.vectors
        w, weight = space.ritz, space.first.unsqueeze(1).expand_as(U)
        ratio = frechet.slopes(f, w.unsqueeze(2), w.unsqueeze(1), weight).conj()
        left = (U.mT.to(c_bar.dtype) @ c_bar.unsqueeze(2)) * ratio * space.first.unsqueeze(1)
        return U @ (left.real if left.is_complex() else left) @ U.mT
    assert isinstance(space, GeneralSpace)
    H = space.H
    E = torch.zeros(H.shape, dtype=torch.promote_types(H.dtype, c_bar.dtype), device=H.device)
    E[:, :, 0] = c_bar.conj() * space.state.norm.to(H.dtype).unsqueeze(1)
    transposed = H.mT.contiguous().to(E.dtype)
    X = f.between(transposed, transposed, E).conj().resolve_conj()  # f̄ at Hᴴ, written through f
    return X if H.is_complex() else X.real


def _recurrence(
    run: Run, space: Space, method: object, Q_bar: Tensor, small_bar: Tensor, norm_bar: Tensor
) -> tuple[Tensor, Tensor]:
    assert isinstance(method, (Lanczos, Arnoldi))
    product = run.adjoint(space.basis.shape[0])
    real = space.state.norm.dtype
    if isinstance(space, HermitianSpace):
        beta_bar = small_bar.diagonal(1, dim1=1, dim2=2) + small_bar.diagonal(-1, dim1=1, dim2=2)
        return adjoint_lanczos(
            product,
            space.state,
            Q_bar=Q_bar,
            alpha_bar=small_bar.diagonal(dim1=1, dim2=2).to(real),
            beta_bar=beta_bar.to(real),
            residual_bar=None,
            norm_bar=norm_bar.to(real),
            reorthogonalize=method.reorthogonalize,
        )
    return adjoint_arnoldi(
        product,
        space.state,
        Q_bar=Q_bar,
        H_bar=small_bar.to(space.state.H.dtype),
        residual_bar=None,
        norm_bar=norm_bar.to(real),
        reorthogonalize=method.reorthogonalize,
    )
