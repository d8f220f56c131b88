"""Log-determinants through a preconditioner: log det A = log det P + tr log(R⁻¹ A R⁻ᴴ), P = R Rᴴ, P differentiated.

The second term is small where P is near A, and so is the variance of its estimate. Its gradient is less noisy too, but
only if P's own dependence on A is kept: docs/derivations/preconditioning.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions.forms import Term, shared_forms
from ..functions.scalar import log
from ..functions.space import choose
from ..methods import Auto, GradientRule, KrylovMethod, Lanczos
from ..operators.base import LinearOperator
from ..result import Info, OnFailure
from ..solve.nystrom import RandomlyPivotedCholesky
from ..solve.preconditioners import Preconditioner, as_preconditioner
from ..solve.root import Preconditioned
from .probes import Hutchinson, mean_and_error

# Depth of the runs that compare two estimates: a standard error is itself known to a quarter or so from ten probes.
# At 20 steps the plain one came out within 3 % of its limit (26 % at n·s/σ² = 4e5), always too large where it was off,
# and the preconditioned one within 0.1 %; 12 steps left the plain one off by up to 90 %.
COMPARE_DEPTH = 20


def standard_errors(A: LinearOperator, P: Preconditioner, Z: Tensor) -> dict[str, float]:
    """Standard errors of tr log A ("plain") and tr log(R⁻¹ A R⁻ᴴ) ("preconditioned") from the probes Z (n, m).

    From two runs of 20 steps without a gradient.
    """
    out = {}
    with torch.no_grad():
        for name, B in (("plain", A), ("preconditioned", Preconditioned(A, P.inverse_root()))):
            method = Lanczos(min(COMPARE_DEPTH, A.shape[0]))
            (samples,), _ = shared_forms(B, Z, [Term(log, slice(None))], method=method, on_failure="ignore")
            out[name] = float(mean_and_error(samples, False)[1])
    return out


def preferred(errors: dict[str, float], probes: int) -> bool:
    """Whether a likelihood keeps the preconditioner: its standard error is not clearly larger than the plain one.

    Within what is known of a standard error, 1/√(2(m − 1)) of it from m probes, the two count as equal, and P is kept:
    the same error then costs several times fewer products, and targets that share the run are solved for as well.
    """
    slack = 1 + 1 / math.sqrt(2 * max(probes - 1, 1))
    return errors["preconditioned"] < slack * errors["plain"]


def plain_error(P: Preconditioner, Z: Tensor, samples: Tensor) -> float | None:
    """The standard error that tr log A would have, from a preconditioned run's ``samples`` zᴴ log(R⁻¹ A R⁻ᴴ) z (m,).

    It is that of zᴴ log(P) z + the samples: exact where P and A commute, and no product with A. None where the forms of
    log P are not at hand.
    """
    forms = P.log_forms(Z)
    return None if forms is None else float(mean_and_error(forms + samples.detach().double(), False)[1])


def select(
    A: LinearOperator, preconditioner: Any, Z: Tensor, *, exact: bool, later: bool = False
) -> tuple[Preconditioner | None, dict[str, Any]]:
    """What ``preconditioner=`` asks for: a built preconditioner or None, and what to report.

    ``Auto()`` builds ``RandomlyPivotedCholesky()`` and keeps it if its estimate has the smaller standard error; where
    the estimate is ``exact`` anyway it takes none. With ``later`` the caller compares by :func:`plain_error`, unless
    that needs what P does not have.
    """
    if preconditioner is None:
        return None, {}
    details: dict[str, Any] = {"preconditioner": None}
    asked = preconditioner
    if isinstance(preconditioner, Auto):
        if exact:
            return None, details | {"standard_errors": {"plain": 0.0, "preconditioned": 0.0}}
        asked = RandomlyPivotedCholesky()
    P = as_preconditioner(asked, A)
    if isinstance(preconditioner, Auto) and not (later and P.log_forms(Z[:, :0]) is not None):
        errors = standard_errors(A, P, Z)
        details["standard_errors"] = errors
        if not errors["preconditioned"] < errors["plain"]:
            return None, details
    details["preconditioner"] = asked
    for name, found in (("pivots", getattr(P, "pivots", None)), ("factor", getattr(P, "factor", None))):
        if found is not None:
            details |= {"pivots": found} if name == "pivots" else {"preconditioner_rank": int(found.shape[1])}
    return P, details


def preconditioned_logdet(
    A: LinearOperator,
    preconditioner: Any,
    *,
    estimator: Hutchinson,
    method: KrylovMethod,
    gradient: GradientRule,
    generator: torch.Generator | None,
    on_failure: OnFailure,
) -> tuple[Tensor, Info]:
    """log det A and its report; see :func:`ritz.logdet`."""
    n = A.shape[0]
    chosen = choose(A, method)
    if not isinstance(chosen, Lanczos):
        raise OperandError(
            "preconditioner= needs a Lanczos run of a Hermitian operator; declare hermitian=True or psd=True if it is"
        )
    Z = estimator.probes(n, A.dtype, A.device, generator)
    P, details = select(A, preconditioner, Z, exact=estimator.is_exact(n))
    B = A if P is None else Preconditioned(A, P.inverse_root())
    (samples,), info = shared_forms(
        B, Z, [Term(log, slice(None))], method=chosen, gradient=gradient, on_failure=on_failure
    )
    value, info.standard_error = mean_and_error(samples, estimator.is_exact(n))
    info.details.update(details, estimator=estimator)
    if P is not None:
        known = P.logdet()
        info.details["logdet_preconditioner"] = float(known.detach())
        value = value + known.to(value.dtype)
    return value, info
