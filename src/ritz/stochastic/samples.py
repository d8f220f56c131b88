"""zᴴ f(A) z for every probe z: the samples that traces are means of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions.forms import Term, shared_forms
from ..functions.multiply import funm_multiply
from ..functions.scalar import as_function
from ..functions.space import choose
from ..methods import GradientRule, KrylovMethod, Lanczos
from ..operators.base import LinearOperator
from ..result import Info, OnFailure, Status


def forms_of_probes(
    A: LinearOperator,
    f: Any,
    Z: Tensor,
    *,
    method: KrylovMethod,
    gradient: GradientRule,
    on_failure: OnFailure,
    shifts: Tensor | None = None,
) -> tuple[Tensor, Info]:
    """Samples (m,) of the probes Z (n, m), or (p, m) with shifts (p,); f None is A itself."""
    if f is None:
        if shifts is not None:
            raise OperandError("tr(A + σI) is tr A + nσ; shifts= needs a function f")
        samples = (Z.conj() * (A @ Z)).sum(0)
        samples = samples.real if A.hermitian and samples.is_complex() else samples
        return samples, Info(None, Z.shape[1], 1, status=Status.FIXED)
    if isinstance(chosen := choose(A, method), Lanczos):
        (samples,), info = shared_forms(
            A, Z, [Term(as_function(f), slice(None), shifts)], method=chosen, gradient=gradient, on_failure=on_failure
        )
        return samples, info
    if shifts is not None:
        raise OperandError(
            "shifts= needs a Lanczos run of a Hermitian operator; declare hermitian=True if it is, or loop over shifts"
        )
    Y, info = funm_multiply(f, A, Z, method=method, gradient=gradient, return_info=True, on_failure=on_failure)
    return (Z.conj() * Y).sum(0), info


def function_of_probes(
    A: LinearOperator, f: Any, Z: Tensor, *, method: KrylovMethod, gradient: GradientRule, on_failure: OnFailure
) -> tuple[Tensor, Info]:
    """f(A) Z (n, m), differentiable; f None is A itself."""
    if f is None:
        return A @ Z, Info(None, Z.shape[1], 1, status=Status.FIXED)
    return funm_multiply(f, A, Z, method=method, gradient=gradient, return_info=True, on_failure=on_failure)


def joined(first: Info, second: Info) -> Info:
    """One report of two runs that a value comes from: products of both, the worse end."""
    worse = second if first.status.success else first
    parts = [i.residual.reshape(-1) for i in (first, second) if i.residual is not None]
    residual = torch.cat(parts) if parts else None
    spent = first.num_matvecs + second.num_matvecs
    return replace(second, num_matvecs=spent, status=worse.status, residual=residual)


def is_real(f: Any) -> bool:
    """Whether f has real values at real eigenvalues, as far as its value at 1 tells."""
    return f is None or not as_function(f)(torch.ones(1, dtype=torch.float64)).is_complex()
