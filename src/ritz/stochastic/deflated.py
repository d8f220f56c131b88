"""Traces with what carries the variance taken out: a block Krylov space exactly, probes for the rest.

For any orthonormal Q, tr f(A) = tr Qᵀ f(A) Q + tr P f(A) P with P = I − Q Qᵀ, so that probes only see P. With Q the
first blocks of a block Krylov space, f(A) Q is known from the same products: A V = V T + … gives Qᵀ f(A) Q as a corner
of f(T). The derivative holds Q fixed: the identity is one for every Q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions import frechet
from ..functions.forms import Term, shared_forms
from ..functions.scalar import ScalarFunction
from ..functions.terms import shift_tensor, shifted
from ..krylov.block import BlockSpace, block_lanczos
from ..methods import Frechet, GradientRule, Lanczos
from ..operators.base import LinearOperator
from ..pairing import Cotangents, Pair, Run
from ..result import Info, OnFailure
from .probes import Hutchinson, mean_and_error, rest_probes


@dataclass(frozen=True)
class Deflated:
    """A block Krylov space of ``columns`` vectors taken out exactly, and m probes for what is left.

    Worth its products where few eigenvalues carry f(A), as in Gauss–Newton matrices: the standard error falls with the
    size of f on the rest. ``shifts=`` come from the same run, since Krylov spaces do not see shifts.

    Args:
        columns: dimension of what is taken out; ``block`` divides it.
        m, seed: probes of the rest, as in :class:`~ritz.Hutchinson`.
        block: columns that go through the product together.
        extra: further block products that only serve to know f(A) on the space; f that is smooth on the scale of the
            spectrum needs few.

    Reference: Chen, Hallman, "Krylov-aware stochastic trace estimation" (2023).
    """

    columns: int = 100
    m: int = 10
    seed: int = 0
    block: int = 10
    extra: int = 10

    def __post_init__(self) -> None:
        for name in ("columns", "m", "block", "extra"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OperandError(f"Deflated({name}={value!r}); expected a whole number, at least one")
        if self.columns % self.block:
            raise OperandError(f"Deflated({self.columns}, block={self.block}); block must divide the columns")

    def resolve(self, n: int) -> Deflated | Hutchinson:
        """The same on a matrix of size n; where the space would be all of it, unit vectors do it exactly."""
        return Hutchinson(n) if self.columns + self.block * self.extra >= n else self


def krylov_part(
    A: LinearOperator, product: Callable[[Tensor], Tensor], estimator: Deflated, generator: torch.Generator | None
) -> BlockSpace:
    """The space whose first ``columns`` are taken out."""
    start = Hutchinson(estimator.block, estimator.seed + 1).probes(A.shape[0], A.dtype, A.device, generator)
    size = estimator.columns + estimator.block * estimator.extra
    return block_lanczos(product, start, size, psd=bool(A.psd))


def deflated_trace(
    A: LinearOperator,
    f: ScalarFunction,
    estimator: Deflated,
    *,
    method: Lanczos,
    gradient: GradientRule,
    shifts: Tensor | None,
    generator: torch.Generator | None,
    on_failure: OnFailure,
) -> tuple[Tensor, Info]:
    """Value, () or (p,), and report; ``details`` has the ``deflated`` part and the ``probed`` one."""
    if not isinstance(gradient, Frechet):
        raise OperandError(f"estimator={estimator} came with gradient={gradient}; expected Frechet()")
    shifts = shift_tensor(shifts, A)
    known, space = _known_part(A, f, shifts, estimator, gradient, generator)
    Q = space.V[:, : estimator.columns]
    Z = rest_probes(Q, estimator.m, estimator.seed, generator)
    (samples,), info = shared_forms(
        A, Z, [Term(f, slice(None), shifts)], method=method, gradient=gradient, on_failure=on_failure
    )
    rest, error = mean_and_error(samples, False)
    spent = info.num_matvecs + space.V.shape[1]
    details = {**info.details, "deflated": known.detach(), "probed": rest.detach()}
    return known + rest, replace(info, num_matvecs=spent, standard_error=error, details=details)


def _known_part(
    A: LinearOperator,
    f: ScalarFunction,
    shifts: Tensor | None,
    estimator: Deflated,
    gradient: Frechet,
    generator: torch.Generator | None,
) -> tuple[Tensor, BlockSpace]:
    """tr Qᵀ f(A) Q for Q the first columns of the space."""
    inputs = () if shifts is None else (shifts,)
    with Run(A, *inputs) as run:
        space = krylov_part(A, run.matmat, estimator, generator)
        functions = shifted(Term(f, slice(None), shifts))
        top = space.vectors[: estimator.columns]
        weights = top.abs().square().sum(0)
        for g in functions:
            g.check_domain(space.ritz)
        sums = torch.stack([(g(space.ritz) * weights).sum() for g in functions])
        value = (sums[0] if shifts is None else sums).to(A.dtype if not A.dtype.is_complex else space.V.real.dtype)
        if not run.wants_gradient():
            return value, space

    def rule(bar: Tensor | None) -> Cotangents:
        if bar is None:
            return Cotangents([None], [None] * len(inputs))
        pairs = list(zip(functions, bar.double().reshape(-1)))
        both = top.mH @ top
        w = space.ritz
        inner = sum(b * frechet.slopes(g, w.unsqueeze(1), w.unsqueeze(0), both.abs()) * both for g, b in pairs)
        X = space.vectors @ inner @ space.vectors.mH
        left, right = frechet.compress_symmetric(X.unsqueeze(0), gradient.tolerance(A.dtype, 0.0))
        Lam = space.V @ left[0].to(space.V.dtype)
        sigma: list[Tensor | None] = []
        if shifts is not None:
            sigma = [torch.stack([b * (g.derivative(w) * weights).sum() for g, b in pairs])]
        return Cotangents([Pair(Lam, right[0].to(space.V.dtype))], sigma)

    (value,) = run.attach([value], rule, [space.V], name="a deflated trace")
    return value, space
