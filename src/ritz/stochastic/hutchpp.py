"""Hutch++: the trace on a sketched range exactly, probes for the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..methods import GradientRule, KrylovMethod
from ..operators.base import LinearOperator
from ..result import Info, OnFailure
from .probes import Hutchinson, mean_and_error, rest_probes
from .samples import forms_of_probes, function_of_probes


@dataclass(frozen=True)
class HutchPP:
    """m columns through f(A) in all: a third to find its range, a third on that range, the others on what is left.

    With Q an orthonormal basis of f(A) S, tr f(A) = tr Qᴴ f(A) Q + tr P f(A) P, P = I − Q Qᴴ; probes see only the
    second term. The error falls like 1/m for positive semidefinite f(A) where that of :class:`~ritz.Hutchinson` falls
    like 1/√m, and faster where the eigenvalues of f(A) decay. Where they do not, it is worse than plain probes, of
    which it has a third.

    Args:
        m: columns in all, at least 3.
        seed: fixes the probes.

    Gradient: the identity holds for every Q, which is held fixed; unbiased, and costs what Hutchinson's costs.
    Reference: Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation" (2021).
    """

    m: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or self.m < 3:
            raise OperandError(f"HutchPP(m={self.m!r}); expected a whole number of columns, at least three")

    def resolve(self, n: int) -> HutchPP | Hutchinson:
        """The same on a matrix of size n; where the sketch would be all of it, unit vectors do it exactly."""
        return Hutchinson(n) if self.m // 3 >= n else self


def hutchpp(
    A: LinearOperator,
    f: Any,
    estimator: HutchPP,
    *,
    method: KrylovMethod,
    gradient: GradientRule,
    generator: torch.Generator | None,
    on_failure: OnFailure,
) -> tuple[Tensor, Info]:
    """Value () and report, whose ``details`` have the ``sketched`` part and the ``probed`` one."""
    third = estimator.m // 3
    S = Hutchinson(third, estimator.seed + 1).probes(A.shape[0], A.dtype, A.device, generator)
    with torch.no_grad():
        Y, first = function_of_probes(A, f, S, method=method, gradient=gradient, on_failure=on_failure)
        Q, _ = torch.linalg.qr(Y if A.dtype.is_complex else Y.real)
        Z = rest_probes(Q, estimator.m - 2 * third, estimator.seed, generator)
    samples, info = forms_of_probes(A, f, torch.cat([Q, Z], 1), method=method, gradient=gradient, on_failure=on_failure)
    known = samples[:third].sum()
    rest, error = mean_and_error(samples[third:], False)
    details = {**info.details, "sketched": known.detach(), "probed": rest.detach()}
    # How the sketch ended has no part in it: any Q gives an unbiased estimate.
    spent = first.num_matvecs + info.num_matvecs
    return known + rest, replace(info, num_matvecs=spent, standard_error=error.abs(), details=details)
