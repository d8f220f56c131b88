"""f(A)v: functions of an operator times vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..methods import Adjoint, Arnoldi, Auto, Frechet, GradientRule, KrylovMethod, Lanczos, Unrolled
from ..numerics import as_block, check_finite
from ..operators.base import LinearOperator
from ..operators.convert import aslinearoperator
from ..pairing import Cotangents, Pair, Rule, Run
from ..result import Info, OnFailure, Status, report
from . import frechet
from .adjoint import multiply_by_adjoint
from .chebyshev import Chebyshev, chebyshev_multiply
from .closures import bind, no_rule
from .scalar import ScalarFunction, as_function
from .space import (
    HermitianSpace,
    Space,
    as_hermitian,
    build,
    check_psd,
    check_rule,
    choose,
    combine,
    info_of,
    smallest,
)
from .table import conjugate_small, real_parts, select
from .two_pass import two_pass_multiply
from .unrolled import unrolled_multiply

Refine = Callable[[Space, Tensor, Status], tuple[Sequence[ScalarFunction], "Tensor | None", Tensor, Status]]


def funm_multiply(
    f: Any,
    A: LinearOperator,
    B: Tensor,
    *,
    method: KrylovMethod | Chebyshev = Auto(),
    gradient: GradientRule = Frechet(),
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """f(A) B by a Krylov space of every column, with gradients in A's tensors and in B.

    Args:
        f: from ``ritz.functions``, or a callable on a tensor of eigenvalues.
        A: square operator (n, n); Hermitian or not.
        B: vector (n,) or block (n, m); the columns share every product.
        method: ``Lanczos(k)`` or ``Arnoldi(k)`` at fixed depth, with ``rtol=`` adaptive; ``Chebyshev(bounds=...)``;
            or ``Auto()``.
        gradient: ``Frechet()`` (derivative of the limit), ``Adjoint()`` (derivative of the computed value; raises
            where the Krylov space is exhausted), ``Unrolled()`` (autograd, any order).
        return_info: also return an :class:`~ritz.result.Info`; after backward ``info.backward`` reports on it.
        on_failure: "warn", "raise" or "ignore" when an adaptive depth misses its tolerance.

    Returns:
        A tensor of B's shape; complex where f is complex at real eigenvalues.

    Raises:
        DomainError: f is undefined at a Ritz value, or undefined at a matrix that is not normal.
        BreakdownError: ``Adjoint()`` at an exhausted Krylov space.
        OperandError, NonFiniteError: wrong shape, dtype, device; NaN or Inf.

    Cost: k block products; backward k adjoint products, then one narrow pairing (about 10 columns per column of B).
        Memory: k vectors per column until backward.
    Gradient: first order in A's tensors, B, and tensors that a callable f closes over, such as the exponent in
        ``lambda x: x**s`` (any order under ``Unrolled()``; not under Chebyshev and ``two_pass``, which refuse).
    """
    A = aslinearoperator(A)
    V = as_block(B, A.shape[0], "B", dtype=A.dtype, device=A.device)
    if isinstance(method, Chebyshev):
        (Y,), info = chebyshev_multiply([as_function(f)], A, V, None, method, gradient, on_failure)
    else:
        (Y,), info = multiply([as_function(f)], A, V, None, method, gradient, on_failure)
    Y = Y.squeeze(1) if B.ndim == 1 else Y
    return (Y, info) if return_info else Y


def multiply(
    functions: Sequence[ScalarFunction],
    A: LinearOperator,
    V: Tensor,
    times: Tensor | None,
    method: KrylovMethod,
    gradient: GradientRule,
    on_failure: OnFailure,
    *,
    refine: Refine | None = None,
    keep: bool = True,
    quiet: bool = False,
    likely: float = 0.0,
) -> tuple[list[Tensor], Info]:
    """f_p(A) V for several functions of one run; ``times`` are the differentiable t_p of f_p = exp(t_p ·).

    ``refine`` may choose other functions and times once it has seen the space. ``keep=False`` gives the basis up after
    the forward pass, and builds it again in backward. ``quiet`` leaves the report on the forward pass to the caller.
    ``likely``: the depth that a space much like this one needed.
    """
    chosen = choose(A, method)
    check_rule(gradient, chosen)
    check_finite(V, "B")
    if isinstance(chosen, Lanczos) and chosen.two_pass:
        return two_pass_multiply(functions, A, V, times, chosen, gradient, on_failure)
    A = as_hermitian(A, chosen)
    if isinstance(gradient, Unrolled):
        return unrolled_multiply(functions, A, V, times, chosen)
    with Run(A, V) as run:
        space, error, status = build(run.matmat, V.detach(), chosen, functions, likely, psd=A.psd)
        if refine is not None:
            functions, times, error, status = refine(space, error, status)
        run.inputs = (V,) if times is None else (V, times)
        space.check_domain(functions)
        values = [_value(space, f, V) for f in functions]
        info = info_of(chosen, space, error, status, run.num_matvecs)
        report(info, what="f(A)v", target=chosen.tolerance(V.dtype), on_failure="ignore" if quiet else on_failure)
        check_psd(A, space, info, on_failure)
        points = space.ritz if isinstance(space, HermitianSpace) else None
        plain = None if run.wants_gradient() else no_rule(run)
        extend = bind(run, functions, lambda i: _value(space, functions[i], V, recorded=True), points)
        if not run.wants_gradient():
            return values, info
        rule: Rule
        blocks: list[Tensor]
        if plain is not None:
            rule, blocks = plain, []
        elif isinstance(gradient, Adjoint):
            rule, blocks = multiply_by_adjoint(run, space, functions, times, info)
        else:
            again = None if keep or not run.bound.deferrable else replace(chosen, num_matvecs=space.basis.shape[1])
            rule, blocks = _frechet_rule(
                run, V.detach() if again else space, functions, times, chosen, gradient, info, on_failure, again
            )
    return list(run.attach(values, extend(rule), blocks, name="f(A)v")), info


def _value(space: Space, f: ScalarFunction, V: Tensor, recorded: bool = False) -> Tensor:
    """‖v‖ Q f(T) e₁ in the dtype of the vectors (complex where f is)."""
    y = combine(space.basis, space.recorded(f) if recorded else space.small(f))
    return y.to(V.dtype) if V.is_complex() or not y.is_complex() else y


def _frechet_rule(
    run: Run,
    forward: Space | Tensor,
    functions: Sequence[ScalarFunction],
    times: Tensor | None,
    method: Lanczos | Arnoldi,
    gradient: Frechet,
    info: Info,
    on_failure: OnFailure,
    again: Lanczos | Arnoldi | None,
) -> tuple[Callable[..., Cotangents], list[Tensor]]:
    """Rule F: a Krylov space of (Aᴴ, cotangents) in backward, all cotangents in one block.

    ``forward`` is the space of the forward pass, or its starting vectors, from which the method ``again`` repeats it.
    """
    backward = gradient.method or method
    slopes = [] if times is None else [f.in_time() for f in functions]

    def rule(*cotangents: Tensor | None) -> Cotangents:
        before = run.num_matvecs
        if isinstance(forward, Tensor):
            assert again is not None
            space, _, _ = build(run.matmat, forward.detach(), again, functions, psd=run.A.psd)
        else:
            space = forward
        basis, m = space.basis, space.basis.shape[0]
        parts = real_parts(functions, cotangents, basis.is_complex())
        rest: tuple[Tensor | None, ...] = () if times is None else (None,)
        if times is not None and run.needs_input(1):
            rest = (_time_gradients(space, slopes, times, cotangents),)
        if not parts:
            return Cotangents([None], [None, *rest])
        G = torch.cat([g for _, g in parts], dim=1)
        index = torch.arange(m, device=G.device).repeat(len(parts))
        likely = basis.shape[1]
        left, error, status = build(run.adjoint(G.shape[1]), G, backward, [f for f, _ in parts], likely, psd=run.A.psd)
        info.backward = info_of(backward, left, error, status, run.num_matvecs - before)
        report(info.backward, what="backward of f(A)v", target=backward.tolerance(basis.dtype), on_failure=on_failure)
        lefts, rights = [], []
        bars = torch.zeros_like(G[:, :m]) if run.needs_input(0) else None
        for i, (f, _) in enumerate(parts):
            some = select(left, slice(i * m, (i + 1) * m))
            if bars is not None:
                bars += combine(some.basis, conjugate_small(some, f)).to(bars.dtype)
            if run.needs_operator():
                X = frechet.core(some, space, f, index[i * m : (i + 1) * m])
                low = frechet.compress(X, gradient.tolerance(basis.dtype, smallest(error)))
                lefts.append(low.left.to(basis.dtype).mT @ some.basis)
                rights.append(low.right)
        if not lefts:
            return Cotangents([None], [bars, *rest])
        block = basis if isinstance(forward, Tensor) else None
        return Cotangents([Pair(torch.cat(lefts, 1), torch.cat(rights, 2), block)], [bars, *rest])

    # A block of no columns holds the place of one that backward makes.
    n = forward.shape[0] if isinstance(forward, Tensor) else 0
    return rule, [forward.new_empty(n, 0) if isinstance(forward, Tensor) else forward.basis]


def _time_gradients(
    space: Space, slopes: Sequence[ScalarFunction], times: Tensor, cotangents: Sequence[Tensor | None]
) -> Tensor:
    """t̄_p = ⟨A e^{t_p A} B, g_p⟩, with A e^{tA} B read off the forward space."""
    grads = []
    for f, g in zip(slopes, cotangents, strict=True):
        if g is None:
            grads.append(torch.zeros((), dtype=times.dtype, device=times.device))
            continue
        slope = combine(space.basis, space.small(f))
        dot = (slope.conj() * g).sum()
        grads.append((dot if times.is_complex() else dot.real).to(times.dtype))
    return torch.stack(grads)
