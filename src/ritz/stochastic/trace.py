"""Traces and log-determinants: stochastic Lanczos quadrature with all probes in one block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions.multiply import funm_multiply
from ..functions.scalar import as_function, log
from ..functions.space import choose
from ..methods import Auto, Frechet, GradientRule, KrylovMethod, Lanczos
from ..operators.base import LinearOperator, check_square
from ..operators.convert import aslinearoperator
from ..result import Info, OnFailure
from .deflated import Deflated, deflated_trace
from .hutchpp import HutchPP, hutchpp
from .preconditioned import preconditioned_logdet
from .probes import Hutchinson, mean_and_error
from .samples import forms_of_probes
from .xdiag import XDiag, xdiag
from .xtrace import XTrace, xtrace


def trace(
    A: LinearOperator,
    f: Any = None,
    *,
    estimator: Hutchinson | HutchPP | XTrace | Deflated = Hutchinson(),
    method: KrylovMethod = Auto(),
    gradient: GradientRule = Frechet(),
    shifts: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """tr f(A), or tr A, as the mean of zᴴ f(A) z over random probes that share every product.

    Args:
        A: square operator (n, n).
        f: from ``ritz.functions`` or a callable on eigenvalues; None for tr A itself (one product, no Krylov run).
        estimator: ``Hutchinson(m, seed=0)``, exact when m >= n. Where the eigenvalues of f(A) decay, ``XTrace(m)`` or
            ``HutchPP(m)``, which learn the range of f(A) from the same m columns; or ``Deflated(columns, m)``, which
            takes a Krylov space out exactly first: for Hermitian A with few large eigenvalues.
        method, gradient, on_failure: as in :func:`ritz.quadratic_form`.
        shifts: values σ (p,): tr f(A + σI) for each of them from the same run (Krylov spaces do not see shifts), with
            gradients in σ.
        generator: draws the probes instead of the estimator's seed; they then differ from call to call.
        return_info: also return an :class:`~ritz.result.Info` whose ``standard_error`` is that of the mean.

    Returns:
        A scalar, or (p,) with shifts. The same probes in every call: a deterministic, differentiable function.

    Cost: k block products of width m; the gradient needs none, only one pairing of width about 10 m.
    Reference: Hutchinson 1989; Ubaru, Chen, Saad 2017 (stochastic Lanczos quadrature).
    """
    A = aslinearoperator(A)
    check_square(A, "a trace")
    n = A.shape[0]
    if isinstance(estimator, (Deflated, HutchPP, XTrace)):
        resolved = estimator.resolve(n)
        if not isinstance(resolved, Hutchinson):
            return _reduced(A, f, resolved, method, gradient, shifts, generator, return_info, on_failure)
        estimator = resolved
    _check_estimator(estimator)
    Z = estimator.probes(n, A.dtype, A.device, generator)
    samples, info = forms_of_probes(A, f, Z, method=method, gradient=gradient, on_failure=on_failure, shifts=shifts)
    info = replace(info, method=estimator) if f is None else info
    value, error = mean_and_error(samples, estimator.is_exact(n))
    info.standard_error = error
    info.details["estimator"] = estimator
    return (value, info) if return_info else value


def _reduced(
    A: LinearOperator,
    f: Any,
    estimator: Deflated | HutchPP | XTrace,
    method: KrylovMethod,
    gradient: GradientRule,
    shifts: Tensor | None,
    generator: torch.Generator | None,
    return_info: bool,
    on_failure: OnFailure,
) -> Any:
    """The estimators that take the variance out first."""
    if isinstance(estimator, Deflated):
        chosen = choose(A, method)
        if f is None or not isinstance(chosen, Lanczos):
            raise OperandError(
                f"{estimator} needs a function f of a Hermitian operator; declare hermitian=True if it is one"
            )
        value, info = deflated_trace(
            A, as_function(f), estimator, method=chosen, gradient=gradient, shifts=shifts, generator=generator,
            on_failure=on_failure,
        )  # fmt: skip
    else:
        if shifts is not None:
            raise OperandError(
                f"{estimator} came with shifts=, of which every value has a range of its own; use Hutchinson(m) or "
                "Deflated(columns, m), or loop over shifts"
            )
        rule: Any = hutchpp if isinstance(estimator, HutchPP) else xtrace
        value, info = rule(
            A, f, estimator, method=method, gradient=gradient, generator=generator, on_failure=on_failure
        )
        info = replace(info, method=estimator) if f is None else info
    info.details["estimator"] = estimator
    return (value, info) if return_info else value


def _check_estimator(estimator: object) -> None:
    if not isinstance(estimator, Hutchinson):
        raise OperandError(
            f"estimator={estimator!r}; expected Hutchinson(m) with m probes; traces take HutchPP(m), XTrace(m) and "
            "Deflated(columns, m) too"
        )


def logdet(
    A: LinearOperator,
    *,
    estimator: Hutchinson | HutchPP | XTrace | Deflated = Hutchinson(),
    method: KrylovMethod = Auto(),
    gradient: GradientRule = Frechet(),
    shifts: Tensor | None = None,
    preconditioner: Any = None,
    generator: torch.Generator | None = None,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """log det A = tr log A of a positive definite operator; arguments as in :func:`trace`.

    With ``shifts`` (p,) the whole curve log det(A + σI) comes from one run, with derivatives in σ and in A.

    Args:
        preconditioner: P near A, for log det A = log det P + tr log(R⁻¹ A R⁻ᴴ) with P = R Rᴴ: a value such as
            ``RandomlyPivotedCholesky(100)``, what its ``build(A)`` returned, or None. ``Auto()`` tries
            ``RandomlyPivotedCholesky()``, and keeps it if the standard error is smaller with it than without. Not with
            ``shifts``: P depends on σ, and each needs its own run.

    With a preconditioner ``info.details`` has ``logdet_preconditioner``, ``preconditioner``, its rank, and under
    ``Auto()`` ``standard_errors``, of the ``plain`` and the ``preconditioned`` estimate from 20 steps each. The
    gradient is that of both terms, P included where it was built with gradients on, and costs one further product of
    the pairing's width.

    Raises:
        DomainError: a Ritz value <= 0, with its size and what to do.
        OperandError: ``shifts`` together with ``preconditioner``.

    Reference: Wenger et al., Preconditioning for scalable Gaussian process hyperparameter optimization, 2022.
    """
    if preconditioner is not None:
        if shifts is not None:
            raise OperandError(
                "shifts= and preconditioner= exclude each other: P⁻¹(A + σI) has a Krylov space of its own for every "
                "σ; give one of them"
            )
        A = aslinearoperator(A)
        check_square(A, "a log-determinant")
        if not isinstance(estimator, Hutchinson):
            raise OperandError(f"estimator={estimator} with a preconditioner; expected Hutchinson(m)")
        value, info = preconditioned_logdet(
            A,
            preconditioner,
            estimator=estimator,
            method=method,
            gradient=gradient,
            generator=generator,
            on_failure=on_failure,
        )
        return (value, info) if return_info else value
    return trace(
        A,
        log,
        estimator=estimator,
        method=method,
        gradient=gradient,
        shifts=shifts,
        generator=generator,
        return_info=return_info,
        on_failure=on_failure,
    )


def diagonal(
    A: LinearOperator,
    f: Any = None,
    *,
    estimator: Hutchinson | XDiag | None = None,
    method: KrylovMethod = Auto(),
    gradient: GradientRule = Frechet(),
    generator: torch.Generator | None = None,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """diag f(A), or diag A.

    Args:
        f: None for the diagonal of A itself, which operators know exactly (``A.diagonal()``) unless an estimator is
            asked for.
        estimator: ``Hutchinson(m)``: the mean of conj(z) ∘ f(A)z; exact with m >= n. Default Hutchinson(10) where f
            is given. ``XDiag(m)``, for A itself: better where the spectrum decays.

    Returns:
        (n,), with gradients in A's tensors; ``info.standard_error`` (n,) is that of every entry.

    Reference: Bekas, Kokiopoulou, Saad 2007.
    """
    A = aslinearoperator(A)
    check_square(A, "a diagonal")
    n = A.shape[0]
    if f is None and estimator is None:
        exact = A.diagonal()
        return (exact, Info(None, 0, 0, standard_error=torch.zeros_like(exact.real))) if return_info else exact
    estimator = Hutchinson() if estimator is None else estimator
    if isinstance(estimator, XDiag):
        if f is not None:
            raise OperandError(f"{estimator} is for the diagonal of A itself; use Hutchinson(m) for that of f(A)")
        if isinstance(resolved := estimator.resolve(n), XDiag):
            value, error = xdiag(A, resolved, generator)
            info = Info(estimator, estimator.m, 1, standard_error=error, details={"estimator": estimator})
            return (value, info) if return_info else value
        estimator = resolved
    _check_estimator(estimator)
    Z = estimator.probes(n, A.dtype, A.device, generator)
    if f is None:
        Y, info = A @ Z, Info(estimator, Z.shape[1], 1)
    else:
        Y, info = funm_multiply(f, A, Z, method=method, gradient=gradient, return_info=True, on_failure=on_failure)
    samples = Z.conj() * Y
    value, error = mean_and_error(samples, estimator.is_exact(n))
    if samples.is_complex() and A.hermitian and f is None:
        value = value.real
    info.standard_error = error.abs()
    info.details["estimator"] = estimator
    return (value, info) if return_info else value
