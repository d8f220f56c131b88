"""Σ_j t^j φ_j(tA) b_j, the building block of exponential integrators, by one exponential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions import expm_multiply
from ..functions.exponential import SHORT
from ..functions.inputs import one_time
from ..functions.space import choose
from ..functions.table import table_multiply
from ..functions.timed import PhiTerm
from ..methods import Arnoldi, Auto, Frechet, GradientRule, KrylovMethod, Lanczos
from ..numerics import as_block
from ..operators import LinearOperator, aslinearoperator
from ..operators.base import Gradients
from ..result import OnFailure, Status


def phi_multiply(
    A: Any,
    vectors: Sequence[Tensor | None],
    t: float | complex | Tensor = 1.0,
    *,
    method: KrylovMethod = Auto(),
    gradient: GradientRule = Frechet(),
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """Σ_j t^j φ_j(tA) b_j: the solution at time t of y' = A y + Σ_{j≥1} t^{j−1}/(j−1)! b_j, y(0) = b_0.

    φ₀ = exp and φ_{j+1}(z) = (φ_j(z) − 1/j!)/z. A Hermitian A with a real t runs Lanczos from all b_j at once, which
    share every product. Otherwise, or where ``max_matvecs`` do not suffice for that, one Arnoldi run of
    [[A, W], [0, J]] from (b_0, e_p) does, in substeps if need be, with W = (b_p … b_1) scaled to norm one and J the
    shift: p numbers more than n, whatever p.

    Args:
        A: square operator (n, n).
        vectors: [b_0, b_1, …, b_p], each (n,), or each (n, m) for m problems; None for one that is zero.
        t: number or tensor of no dimension, real of either sign or complex.
        method, gradient, return_info, on_failure: as in :func:`ritz.expm_multiply`.

    Returns:
        The shape of the b_j.

    Raises:
        OperandError: no vector, or vectors of different shapes; otherwise as :func:`ritz.expm_multiply`.

    Gradient: in A's tensors, every b_j, and t.
    Source: Al-Mohy and Higham 2011, Theorem 2.1 (the augmented matrix).
    """
    A = aslinearoperator(A)
    given = [b for b in vectors if b is not None]
    if not given:
        raise OperandError("phi_multiply came without vectors; expected [b_0, b_1, …], None for one that is zero")
    blocks = [None if b is None else as_block(b, A.shape[0], "b_j", dtype=A.dtype, device=A.device) for b in vectors]
    if any(b.shape != given[0].shape for b in given):
        raise OperandError(f"the b_j have shapes {[tuple(b.shape) for b in given]}; expected the same for all")
    time = one_time(t, A)
    if not given_columns(given):
        return expm_multiply(A, given[0], time, method=method, return_info=return_info)
    chosen = choose(A, method)
    shared = isinstance(chosen, Lanczos) and len(blocks) > 1 and (A.dtype.is_complex or not time.is_complex())
    spent = 0
    if shared and isinstance(gradient, Frechet) and isinstance(chosen, Lanczos):
        terms = [(j, b) for j, b in enumerate(blocks) if b is not None]
        s = time.detach().item()
        (Y,), info = table_multiply(
            [[PhiTerm(j, s) for j, _ in terms]],
            A if A.hermitian else A.declare(hermitian=True),
            torch.stack([b for _, b in terms], 1),
            time,
            method=chosen,
            gradient=gradient,
            on_failure=on_failure,
            what="Σ t^j φ_j(tA) b_j",
            quiet=chosen.num_matvecs is None,
        )  # type: ignore[arg-type]
        if info.status is Status.MAX_STEPS and chosen.num_matvecs is None:  # too long a time for one space: by substeps
            spent, shared = info.num_matvecs, False
            method = Arnoldi(rtol=chosen.rtol, max_matvecs=min(chosen.max_matvecs, SHORT))
    else:
        shared = False
    if not shared:
        options = {"method": method, "gradient": gradient, "return_info": True, "on_failure": on_failure}
        columns = zip(*[[None] * given_columns(given) if b is None else b.unbind(1) for b in blocks], strict=True)
        outs = [_augmented(A, list(column), time, options) for column in columns]
        Y, info = torch.stack([y for y, _ in outs], 1), outs[0][1]
        info.num_matvecs = spent + sum(i.num_matvecs for _, i in outs)
    Y = Y.squeeze(1) if given[0].ndim == 1 else Y
    return (Y, info) if return_info else Y


def given_columns(given: Sequence[Tensor]) -> int:
    """The number of problems."""
    return 1 if given[0].ndim == 1 else given[0].shape[1]


def _augmented(A: LinearOperator, vectors: Sequence[Tensor | None], t: Tensor, options: dict[str, Any]) -> Any:
    n, p = A.shape[0], len(vectors) - 1
    zero = torch.zeros(n, dtype=A.dtype, device=A.device)
    first, *rest = [zero if b is None else b for b in vectors]
    if p == 0:
        return expm_multiply(A, first, t, **options)
    W = torch.stack(rest[::-1], 1)
    size = float(torch.linalg.vector_norm(W.detach(), dim=0).max())
    size = size if size > 0 else 1.0
    tail = torch.zeros(p, dtype=A.dtype, device=A.device)
    tail[-1] = size
    y, info = expm_multiply(Augmented(A, W / size), torch.cat([first, tail]), t, **options)
    return y[..., :n], info


class Augmented(LinearOperator):
    """[[A, W], [0, J]] with J (p, p) ones above the diagonal: its exponential holds the φ-functions of A."""

    def __init__(self, A: LinearOperator, W: Tensor) -> None:
        n, p = W.shape
        super().__init__((n + p, n + p), A.dtype, A.device, hermitian=False)
        self.A, self.W = A, W

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.A,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Augmented(children[0], self.W)

    def _matmat(self, X: Tensor) -> Tensor:
        n = self.A.shape[0]
        top, low = X[:n], X[n:]
        return torch.cat([self.A._matmat(top) + self.W @ low, low[1:], torch.zeros_like(low[:1])])

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.adjoint_product(X.shape[1])(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        inner, n = self.A.adjoint_product(width), self.A.shape[0]

        def apply(X: Tensor) -> Tensor:
            top, low = X[:n], X[n:]
            shifted = torch.cat([torch.zeros_like(low[:1]), low[:-1]])
            return torch.cat([inner(top), self.W.mH @ top + shifted])

        return apply

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.W, *self.A.tensors())

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        n = self.A.shape[0]
        own = Lam[:n] @ Q[n:].mH if self.W.requires_grad else None
        return (own, *self.A.pair(Lam[:n], Q[:n]))
