"""Quadratic forms vᴴ f(A) v of a Hermitian operator, for a block of vectors and several functions from one run.

Everything that reads forms off a Lanczos run stands on :func:`shared_forms`: single forms, stochastic traces and
log-determinants, curves over shifts, and the two terms of a Gaussian process' likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..methods import Adjoint, Arnoldi, Auto, Frechet, GradientRule, KrylovMethod, Lanczos, Unrolled
from ..numerics import as_block, check_finite
from ..operators.base import LinearOperator
from ..operators.convert import aslinearoperator
from ..pairing import Cotangents, Pair, Rule, Run
from ..result import Info, OnFailure, Status, report
from . import frechet
from .adjoint import forms_by_adjoint
from .closures import bind, no_rule
from .composed import Part
from .multiply import funm_multiply
from .scalar import ScalarFunction, as_function
from .space import (
    HermitianSpace,
    as_hermitian,
    build,
    check_psd,
    check_rule,
    choose,
    info_of,
    smallest,
)
from .terms import Term, applied, form_input_gradients, form_values, overlap, shift_tensor, shifted, term_cotangents
from .unrolled import unrolled_forms


def quadratic_form(
    f: Any,
    A: LinearOperator,
    v: Tensor,
    *,
    method: KrylovMethod = Auto(),
    gradient: GradientRule = Frechet(),
    shifts: Tensor | None = None,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """vᴴ f(A) v from one Krylov run, with gradients in A's tensors and in v.

    Args:
        f: from ``ritz.functions``, or a callable on a tensor of eigenvalues.
        A: square operator (n, n).
        v: vector (n,), or a block (n, m) of vectors that share every product.
        method: ``Lanczos(k)`` at fixed depth, ``Lanczos(rtol=...)`` adaptive, ``Arnoldi``, or ``Auto()``.
        gradient: ``Frechet()`` spends no further product for a Hermitian A; ``Adjoint()`` one adjoint product a step.
        shifts: values σ (p,); the result then has a leading axis with vᴴ f(A + σI) v, all from the same run.
        return_info: also return an :class:`~ritz.result.Info`.
        on_failure: "warn", "raise" or "ignore" when an adaptive depth misses its tolerance.

    Returns:
        A scalar, or (m,) for a block; (p,) or (p, m) with shifts. Real for Hermitian A and real f.

    Raises:
        DomainError: f is undefined at a Ritz value.
        OperandError, NonFiniteError: wrong shape, dtype, device; NaN or Inf.

    Cost: k block products; memory k vectors per column while it runs, about 2·10 per column until backward.
    Gradient: first order in A's tensors, v, shifts and tensors that a callable f closes over (any order under
        ``Unrolled()``).
    """
    A = aslinearoperator(A)
    function, vector = as_function(f), v
    V = as_block(v, A.shape[0], "v", dtype=A.dtype, device=A.device)
    chosen = choose(A, method)
    check_rule(gradient, chosen)
    if isinstance(chosen, Arnoldi):
        return _general_form(function, A, v, chosen, gradient, shifts, return_info, on_failure)
    (value,), info = shared_forms(
        A, V, [Term(function, slice(None), shifts)], method=chosen, gradient=gradient, on_failure=on_failure
    )
    value = value.squeeze(-1) if vector.ndim == 1 else value
    return (value, info) if return_info else value


def bilinear_form(
    f: Any,
    A: LinearOperator,
    u: Tensor,
    v: Tensor,
    *,
    method: KrylovMethod = Auto(),
    gradient: GradientRule = Frechet(),
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """uᴴ f(A) v, with gradients in A's tensors, u and v.

    u and v are vectors (n,) or blocks (n, m) of equal width; the result is a scalar or (m,). Arguments, errors and
    gradient rules as in :func:`quadratic_form`; backward spends k adjoint products, as for f(A)v.
    """
    A = aslinearoperator(A)
    U = as_block(u, A.shape[0], "u", dtype=A.dtype, device=A.device)
    as_block(v, A.shape[0], "v", dtype=A.dtype, device=A.device)
    if u.shape != v.shape:
        raise OperandError(f"u has shape {tuple(u.shape)} and v {tuple(v.shape)}; a bilinear form needs equal shapes")
    check_finite(U, "u")
    Y, info = funm_multiply(f, A, v, method=method, gradient=gradient, return_info=True, on_failure=on_failure)
    value = (u.conj() * Y).sum(0)
    return (value, info) if return_info else value


def shared_forms(
    A: LinearOperator,
    V: Tensor,
    terms: Sequence[Term],
    *,
    method: Lanczos | Auto = Auto(),
    gradient: GradientRule = Frechet(),
    on_failure: OnFailure = "warn",
) -> tuple[list[Tensor], Info]:
    """Forms v_jᴴ f(A) v_j for several functions, each on some columns of one block V (n, m), from one Lanczos run.

    Returns:
        For each term the values (columns,), or (p, columns) with shifts, and one Info; ``info.residual`` has the
        error estimate of every column.
    """
    chosen = choose(A, method)
    if not isinstance(chosen, Lanczos):
        raise OperandError("forms that share a run need a Hermitian operator; declare hermitian=True if it is")
    check_rule(gradient, chosen)
    check_finite(V, "v")
    A = as_hermitian(A, chosen)
    terms = [t._replace(shifts=shift_tensor(t.shifts, A)) for t in terms]
    if isinstance(gradient, Unrolled):
        return unrolled_forms(A, V, terms, chosen)
    probe = torch.ones(1, dtype=torch.float64, device=A.device)
    if any(t.f(probe).is_complex() for t in terms):
        return _complex_forms(A, V, [t.f(probe).is_complex() for t in terms], terms, chosen, gradient, on_failure)
    shifts = [t.shifts for t in terms if t.shifts is not None]
    with Run(A, V, *shifts) as run:
        Vn = V.detach()
        functions = [f for t in terms for f in shifted(t)]
        space, error, status = build(run.matmat, Vn, chosen, functions, psd=A.psd)
        assert isinstance(space, HermitianSpace)
        space.check_domain(functions)
        weights = space.first.square()  # ‖v‖² times the Gauss weights
        values = [form_values(t, space.ritz, weights).to(V.real.dtype) for t in terms]
        info = info_of(chosen, space, error, status, run.num_matvecs)
        report(info, what="forms of f(A)", target=chosen.tolerance(V.dtype), on_failure=on_failure)
        check_psd(A, space, info, on_failure)
        plain = None if run.wants_gradient() else no_rule(run)
        extend = bind(run, [t.f for t in terms], lambda i: form_values(terms[i], space.ritz, weights), space.ritz)
        if not run.wants_gradient():
            return values, info
        rule: Rule
        blocks: list[Tensor]
        if plain is not None:
            rule, blocks = plain, []
        elif isinstance(gradient, Adjoint):
            rule, blocks = forms_by_adjoint(run, space, terms, chosen, info)
        else:
            rule, blocks = _frechet_rule(space, terms, gradient.tolerance(V.dtype, smallest(error)), info)
    return list(run.attach(values, extend(rule), blocks, name="a form of f(A)")), info


def _complex_forms(
    A: LinearOperator,
    V: Tensor,
    is_complex: Sequence[bool],
    terms: Sequence[Term],
    method: Lanczos,
    gradient: GradientRule,
    on_failure: OnFailure,
) -> tuple[list[Tensor], Info]:
    """Complex f: the forms of its real and of its imaginary part, from the same run."""
    parts = [
        term._replace(f=Part(term.f, imaginary))
        for term, split in zip(terms, is_complex, strict=True)
        for imaginary in ((False, True) if split else (False,))
    ]
    found, info = shared_forms(A, V, parts, method=method, gradient=gradient, on_failure=on_failure)
    values = iter(found)
    return [torch.complex(next(values), next(values)) if split else next(values) for split in is_complex], info


def _frechet_rule(
    space: HermitianSpace, terms: Sequence[Term], rtol: float, info: Info
) -> tuple[Callable[..., Cotangents], list[Tensor]]:
    """Rule F. With one function per column the pairing is ready now and the basis can go (n·r numbers stay).

    With shifts, or several terms on one column, several cotangents meet there; their mixture is known in backward
    only, and the basis stays.
    """
    done = Info(info.method, 0, info.depth, status=Status.FIXED)  # backward spends no product
    if any(t.shifts is not None for t in terms) or overlap(terms, space.ritz.shape[0]):

        def late(*cotangents: Tensor | None) -> Cotangents:
            info.backward = done
            X = frechet.symmetric_core(space, term_cotangents(terms, cotangents, space.ritz.shape[0]))
            left, right = frechet.compress_symmetric(X, rtol)
            Lam = left.to(space.basis.dtype).mT @ space.basis
            return Cotangents([Pair(Lam, right)], form_input_gradients(space, terms, cotangents))

        return late, [space.basis]

    m = space.ritz.shape[0]
    ones = [torch.ones(m, dtype=torch.float64)[t.columns].to(space.ritz.device) for t in terms]
    left, right = frechet.compress_symmetric(frechet.symmetric_core(space, term_cotangents(terms, ones, m)), rtol)
    dtype, basis = space.basis.dtype, space.basis
    Q = right.to(dtype).mT @ basis
    # Λ is Q with its rows scaled (X is symmetric): only Q is kept
    scale = (left * right).sum(1) / right.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    image = 2 * applied(space, terms)

    def ready(*cotangents: Tensor | None) -> Cotangents:
        info.backward = done
        g = torch.zeros(m, dtype=torch.float64, device=scale.device)
        for f_g in term_cotangents(terms, cotangents, m):
            g = g + f_g[1]
        Lam = (g.unsqueeze(1) * scale).to(dtype).unsqueeze(2) * Q
        return Cotangents([Pair(Lam)], [image * g.to(image.dtype)])

    return ready, [Q]


def _general_form(
    f: ScalarFunction,
    A: LinearOperator,
    v: Tensor,
    method: Arnoldi,
    gradient: GradientRule,
    shifts: Tensor | None,
    return_info: bool,
    on_failure: OnFailure,
) -> Any:
    """vᴴ f(A) v of an operator that is not known to be Hermitian: the bilinear form with u = v."""
    if shifts is not None:
        raise OperandError("shifts= needs a Hermitian operator; declare hermitian=True if it is, or loop over shifts")
    return bilinear_form(f, A, v, v, method=method, gradient=gradient, return_info=return_info, on_failure=on_failure)
