"""``svds``: the largest singular triplets of any operator, from the eigenpairs of its smaller Gram operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OperandError
from ..operators import aslinearoperator
from ..result import OnFailure
from .eigsh import eigsh


class SingularTriplets(NamedTuple):
    """U (m, k), singular values (k,), largest first, and Vh (k, n), as ``torch.linalg.svd`` has them."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def svds(
    A: Any,
    k: int = 6,
    *,
    rtol: float | None = None,
    block: int = 1,
    basis: int | None = None,
    max_matvecs: int | None = None,
    seed: int = 0,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """The k largest singular values of an operator (m, n), with their vectors.

    Thick-restart Lanczos on AᴴA, or AAᴴ where that is smaller; the vectors of the other side are one product more.

    Args:
        A: operator (m, n), with an adjoint product, or what ``aslinearoperator`` takes.
        k: number of triplets, at most min(m, n).
        rtol, block, basis, max_matvecs, seed, on_failure: as in :func:`ritz.eigsh`, for the Gram operator.

    Returns:
        :class:`SingularTriplets`; with ``return_info`` also the report of the eigenvalue problem.

    A singular value σ has the relative accuracy rtol·(σ_1/σ)²: those below about 1e-5 σ_1 (float64) are no more than
    zero to it, their vectors on the other side are completed to an orthonormal set, and have no derivative.

    Raises:
        OperandError: k beyond min(m, n); an operator without an adjoint product.

    Cost: two products (one of them adjoint) a column of ``eigsh``. Gradient: first order, in values and vectors; signs
        (phases) are arbitrary, and the derivative along them is zero.

    Example:
        >>> import torch, ritz
        >>> U, S, Vh = ritz.svds(torch.diag(torch.arange(1.0, 7.0))[:, :5], 2)
        >>> S
        tensor([5., 4.])
    """
    A = aslinearoperator(A)
    m, n = A.shape
    if not isinstance(k, int) or not 1 <= k <= min(m, n):
        raise OperandError(f"k={k!r}; expected a number of triplets from 1 to min{(m, n)} = {min(m, n)}")
    tall = m >= n
    B = A if tall else A.mH
    gram = (B.mH @ B).declare(psd=True)
    (values, right), info = eigsh(
        gram, k, rtol=rtol, block=block, basis=basis, max_matvecs=max_matvecs, seed=seed, return_info=True,
        on_failure=on_failure,
    )  # fmt: skip
    eps = torch.finfo(values.dtype).eps
    positive = values.detach() > 100 * eps * values.detach().max()
    # A root has no derivative at zero, and 0 · inf is NaN in backward: both branches are made finite.
    S = torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)
    left = (B @ right) / torch.where(positive, S, 1.0)
    if not bool(positive.all()):
        left = _completed(left, positive, seed)
    U, V = (left, right) if tall else (right, left)
    triplets = SingularTriplets(U, S, V.mH)
    return (triplets, info) if return_info else triplets


def _completed(left: Tensor, positive: Tensor, seed: int) -> Tensor:
    """The columns that are not positive replaced by orthonormal ones, orthogonal to the others."""
    n, missing = left.shape[0], int((~positive).sum())
    Z = torch.randn(n, missing, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    known, Z = left.detach()[:, positive], Z.to(left.device, left.dtype)
    for _ in range(2):
        Z = torch.linalg.qr(Z - known @ (known.mH @ Z))[0]
    return torch.cat([left[:, positive], Z], 1)  # eigenvalues come largest first
