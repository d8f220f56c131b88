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

    Singular values have the accuracy of rounding, eps·σ_1; those below it are zero, with vectors that complete
    orthonormal sets, and have no derivative.

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
    # AᴴA of a matrix of size 1e-25 is nothing in float32: the size is taken out first.
    v = torch.randn(B.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        size = float((B @ v.to(A.device, A.dtype)).abs().max())
    size = size if 0 < size < torch.inf else 1.0
    scaled = (1.0 / size) * B
    (_, right), info = eigsh(
        (scaled.mH @ scaled).declare(psd=True), k, rtol=rtol, block=block, basis=basis, max_matvecs=max_matvecs,
        seed=seed, return_info=True, on_failure=on_failure,
    )  # fmt: skip
    # Values by the Gram matrix would be good to σ_1 √eps only; of B on the space that it found, to σ_1 eps.
    left, S, turn = torch.linalg.svd(scaled @ right, full_matrices=False)
    right = right @ turn.mH
    zero = S.detach() <= max(m, n) * torch.finfo(S.dtype).eps * S.detach().max()
    S = size * torch.where(zero, torch.zeros_like(S), S)
    U, V = (left, right) if tall else (right, left)
    triplets = SingularTriplets(U, S, V.mH)
    return (triplets, info) if return_info else triplets
