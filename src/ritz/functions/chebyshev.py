"""f(A)v by Chebyshev expansion, for a Hermitian A whose spectrum lies in a known [a, b]: no inner products, no basis.

f ≈ Σ c_i T_i on [a, b] gives f(A)v by the recurrence T_{i+1} = 2Â T_i − T_{i−1}, Â the operator moved to [−1, 1]. For a
polynomial p the divided difference is p[x, y] = Σ X_ij T_i(x) T_j(y), so ⟨u, dp(A) v⟩ = Σ X_ij ⟨T_i(Â)u, dA T_j(Â)v⟩:
X comes from f[x, y] at the nodes, has rank about 10, and both sides are summed while the recurrences run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import DomainError, OperandError
from ..krylov.lanczos import run_lanczos
from ..methods import GradientRule, Unrolled
from ..numerics import check_finite, full_precision
from ..operators.base import LinearOperator
from ..pairing import Cotangents, Pair, Run
from ..result import Info, OnFailure, Status, report
from .closures import refuse_closures
from .composed import Part
from .frechet import compress
from .scalar import ScalarFunction
from .space import decompose

Product = Callable[[Tensor], Tensor]

FIRST, CHUNK = 32, 16  # degrees that are tried first; vectors that are summed together
COMPRESSION = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 1e-7, torch.complex64: 1e-7}
LOOK = 16  # Lanczos steps that estimate bounds
GROWTH = 1.1  # ‖T_i(Â)v‖ ≤ ‖v‖ inside of the bounds; what exceeds it by this factor is outside


@dataclass(frozen=True)
class Chebyshev:
    """Method for :func:`ritz.funm_multiply` and :func:`ritz.expm_multiply` of Hermitian operators.

    Args:
        num_terms: degree + 1 of the polynomial; None takes as many as ``rtol`` needs.
        bounds: (a, b), which hold the whole spectrum of A. Widths that are too large cost products in proportion;
            bounds that leave eigenvalues out are noticed and refused, as the recurrence grows there. None estimates
            them by 16 Lanczos steps from a fixed random vector, the last residual's norm added at both ends (Zhou, Li
            2011); give them where they are known, or where f has a singularity near the spectrum.
        rtol: where the coefficients are cut, relative to the largest; None is 1e-10 (float64) or 1e-5 (float32).
        max_terms: limit of an adaptive degree.

    Cost: a product a term, forward and again in backward; memory of a few vectors, and two blocks of about 10 columns
        where gradients are wanted. The derivative is that of the polynomial.
    """

    num_terms: int | None = None
    bounds: tuple[float, float] | None = None
    rtol: float | None = None
    max_terms: int = 10_000

    def __post_init__(self) -> None:
        if self.num_terms is not None and self.num_terms < 1:
            raise OperandError(f"num_terms={self.num_terms}; expected at least 1, or None for an adaptive degree")
        if not isinstance(self.max_terms, int) or self.max_terms < 1:
            raise OperandError(f"max_terms={self.max_terms!r}; expected a whole number >= 1")
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise OperandError(f"rtol={self.rtol}; expected a number between 0 and 1")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise OperandError(
                f"bounds={self.bounds}; expected (a, b) with a < b that hold the spectrum of the operator"
            )

    def tolerance(self, dtype: torch.dtype) -> float:
        """``rtol``, or its default for a dtype."""
        if self.rtol is not None:
            return self.rtol
        return 1e-10 if dtype in (torch.float64, torch.complex128) else 1e-5


def chebyshev_multiply(
    functions: Sequence[ScalarFunction],
    A: LinearOperator,
    V: Tensor,
    times: Tensor | None,
    method: Chebyshev,
    gradient: GradientRule,
    on_failure: OnFailure,
) -> tuple[list[Tensor], Info]:
    """f_p(A) V; ``times`` are the differentiable t_p of f_p = exp(t_p ·)."""
    if isinstance(gradient, Unrolled):
        raise OperandError("Chebyshev(...) has the derivative of its polynomial only; use gradient=Frechet()")
    if A.hermitian is False:
        raise OperandError(f"Chebyshev(...) came with {A!r}; expected a Hermitian operator (Arnoldi() serves others)")
    check_finite(V, "B")
    refuse_closures(functions, A.device, method)
    A = A if A.hermitian else A.declare(hermitian=True)
    method, spent = _bounded(A, method)
    parts = _parts(functions, method, V)
    rtol, m = method.tolerance(V.dtype), V.shape[1]
    C, error = _coefficients([f for _, f in parts], method, rtol)
    degree = C.shape[1]
    with Run(A, *((V,) if times is None else (V, times))) as run:
        wanted = run.wants_gradient()
        cores = [compress(_core(f, method, degree).unsqueeze(0), COMPRESSION[V.dtype]) for _, f in parts if wanted]
        rights = [low.right[0].mH for low in cores]  # (r, K): the coefficients of W_r
        slopes = [] if times is None or not wanted else [_part(functions[p].in_time(), f) for p, f in parts]
        S = _coefficients(slopes, method, rtol, degree)[0] if slopes else C[:0]
        jobs = [(slice(0, m), torch.cat([C, S, *rights]))]
        (sums,) = _recurrence(run.matmat, V.detach(), jobs, method)
        values = _join(sums[: len(parts)], parts)
        status = Status.FIXED if method.num_terms else Status.CONVERGED if error <= rtol else Status.MAX_STEPS
        residual = torch.full((m,), error, dtype=torch.float64)
        info = Info(method, spent + run.num_matvecs, degree, residual, status=status)
        report(info, what="f(A)v", target=rtol, on_failure=on_failure)
        if not wanted:
            return values, info
        speeds, W = sums[len(parts) : len(parts) + len(S)], sums[len(parts) + len(S) :]
        lefts = [low.left[0].mH for low in cores]

    def rule(*cotangents: Tensor | None) -> Cotangents:
        live = [(q, g) for q, (p, f) in enumerate(parts) if (g := _own(cotangents[p], f, V)) is not None]
        time_bar = None if times is None else _time_gradients(times, _join(speeds, parts), cotangents)
        rest = () if times is None else (time_bar,)
        Lam = torch.zeros_like(W)
        V_bar = torch.zeros_like(V)
        if live:
            jobs = [
                (slice(i * m, (i + 1) * m), torch.cat([C[q : q + 1].conj(), lefts[q]])) for i, (q, _) in enumerate(live)
            ]
            before = run.num_matvecs
            found = _recurrence(run.adjoint(m * len(live)), torch.cat([g for _, g in live], 1), jobs, method)
            info.backward = Info(method, run.num_matvecs - before, degree, status=status)
            starts = [sum(len(x) for x in rights[:q]) for q in range(len(parts))]
            for (q, _), block in zip(live, found, strict=True):
                V_bar = V_bar + block[0]
                Lam[starts[q] : starts[q] + len(rights[q])] = block[1:]
        return Cotangents([Pair(_columns(Lam))], [V_bar, *rest])

    return list(run.attach(values, rule, [_columns(W)], name="f(A)v by Chebyshev")), info


def _bounded(A: LinearOperator, method: Chebyshev) -> tuple[Chebyshev, int]:
    """The method with bounds, and the products that were spent on them."""
    if method.bounds is not None:
        return method, 0
    n = A.shape[0]
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).to(A.device, A.dtype)
    with torch.no_grad(), full_precision():
        state = run_lanczos(A._matmat, start, min(LOOK, n))
    ritz, slack = decompose(state).ritz, float(state.beta[0, -1])
    rounding = 100 * torch.finfo(A.dtype).eps * max(float(ritz.abs().max()), torch.finfo(A.dtype).tiny)
    low, high = float(ritz.min()) - slack - rounding, float(ritz.max()) + slack + rounding
    return replace(method, bounds=(0.0 if A.psd and low < 0 < high else low, high)), int(state.depth)


Parts = list[tuple[int, ScalarFunction]]


def _parts(functions: Sequence[ScalarFunction], method: Chebyshev, V: Tensor) -> Parts:
    """Functions with values in the field of V, with the index of what they are a part of."""
    probe = _nodes(2, method)
    parts: Parts = []
    for p, f in enumerate(functions):
        if f(probe).is_complex() and not V.is_complex():
            parts += [(p, Part(f, False)), (p, Part(f, True))]
        else:
            parts.append((p, f))
    return parts


def _part(f: ScalarFunction, like: ScalarFunction) -> ScalarFunction:
    return Part(f, like.imaginary) if isinstance(like, Part) else f


def _join(sums: Tensor, parts: Parts) -> list[Tensor]:
    """Values of the functions from those of their parts."""
    values: dict[int, Tensor] = {}
    for y, (p, _) in zip(sums, parts, strict=True):
        values[p] = torch.complex(values[p], y) if p in values else y
    return list(values.values())


def _own(g: Tensor | None, f: ScalarFunction, V: Tensor) -> Tensor | None:
    """The cotangent of a part."""
    if g is None or V.is_complex() or not g.is_complex():
        return g
    return (g.imag if isinstance(f, Part) and f.imaginary else g.real).contiguous()


def _columns(sums: Tensor) -> Tensor:
    """(r, n, m) as a block (n, r·m)."""
    return sums.transpose(0, 1).reshape(sums.shape[1], -1)


def _nodes(size: int, method: Chebyshev) -> Tensor:
    assert method.bounds is not None
    a, b = method.bounds
    theta = math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return 0.5 * (a + b) + 0.5 * (b - a) * torch.cos(theta)


def _transform(size: int, terms: int) -> Tensor:
    """From values at the nodes to Chebyshev coefficients, (terms, size)."""
    theta = math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size
    D = 2 / size * torch.cos(torch.arange(terms, dtype=torch.float64).unsqueeze(1) * theta)
    D[0] *= 0.5
    return D


def _coefficients(
    functions: Sequence[ScalarFunction], method: Chebyshev, rtol: float, terms: int | None = None
) -> tuple[Tensor, float]:
    """Rows of coefficients (functions, terms), and the largest one that was cut, relative to the largest of its row."""
    terms = terms or method.num_terms
    size = FIRST if terms is None else 2 * terms + FIRST
    while True:
        x = _nodes(size, method)
        values = [f(x) for f in functions]
        if not all(bool(torch.isfinite(y.abs()).all()) for y in values):
            raise DomainError(f"f is not finite on the bounds {method.bounds}; expected bounds inside of its domain")
        wide = torch.complex128 if any(y.is_complex() for y in values) else torch.float64
        C = torch.stack([y.to(wide) for y in values]) @ _transform(size, size).mT.to(wide)
        tail = C.abs().flip(1).cummax(1).values.flip(1) / C.abs().amax(1, keepdim=True).clamp(min=1e-300)
        worst = tail.amax(0)
        if terms is not None:
            return C[:, :terms], float(worst[terms])
        enough = int((worst > rtol).sum()) + 1
        if 2 * enough <= size or size > 2 * method.max_terms:
            enough = min(enough, method.max_terms)
            return C[:, :enough], float(worst[enough])
        size *= 2


def _core(f: ScalarFunction, method: Chebyshev, degree: int) -> Tensor:
    """X (degree, degree) of f[x, y] = Σ X_ij T_i(x) T_j(y)."""
    x = _nodes(degree + 1, method)
    D = _transform(degree + 1, degree)
    F = f.divided_difference(x.unsqueeze(1), x.unsqueeze(0))
    return D.to(F.dtype) @ F @ D.mT.to(F.dtype)


Job = tuple[slice, Tensor]


def _recurrence(matmat: Product, V: Tensor, jobs: Sequence[Job], method: Chebyshev) -> list[Tensor]:
    """Σ_i C_ri T_i(Â) V[:, columns] for every job (columns, C (R, K)): (R, n, columns)."""
    assert method.bounds is not None
    a, b = method.bounds
    mid, half = 0.5 * (a + b), 0.5 * (b - a)
    degree = jobs[0][1].shape[1]
    rows = [(C if V.is_complex() else C.real).to(V.device, V.dtype) for _, C in jobs]
    sums = [V.new_zeros(len(C), V.shape[0] * len(range(V.shape[1])[c])) for c, C in jobs]
    limit = GROWTH * torch.linalg.vector_norm(V, dim=0)
    before, now, chunk, first = V, V, [], 0
    for i in range(degree):
        if i == 1:
            before, now = now, (matmat(now) - mid * now) / half
        elif i > 1:
            before, now = now, torch.sub((matmat(now) - mid * now) * (2 / half), before)
        chunk.append(now)
        if len(chunk) == CHUNK or i + 1 == degree:
            if bool((torch.linalg.vector_norm(now, dim=0) > limit).any()):
                raise DomainError(
                    f"Chebyshev(bounds={method.bounds}): the recurrence grows, so that an eigenvalue lies outside of "
                    "them; expected bounds that hold the whole spectrum"
                )
            block = torch.stack(chunk)
            for total, C, (c, _) in zip(sums, rows, jobs, strict=True):
                total += C[:, first : i + 1] @ block[:, :, c].reshape(len(chunk), -1)
            chunk, first = [], i + 1
    return [s.reshape(len(s), V.shape[0], -1) for s in sums]


def _time_gradients(times: Tensor, speeds: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Tensor:
    """t̄_p = ⟨A e^{t_p A} B, g_p⟩."""
    total = torch.zeros(times.shape, dtype=torch.complex128, device=times.device)
    for p, (speed, g) in enumerate(zip(speeds, cotangents, strict=True)):
        if g is not None:
            total[p] = (speed.conj() * g).sum()
    return (total if times.is_complex() else total.real).to(times.dtype)
