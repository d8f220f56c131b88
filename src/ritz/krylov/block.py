"""Block Lanczos: one orthonormal basis for all columns of a start block, with T = Vᴴ A V kept dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockSpace:
    """V (n, D) orthonormal, its first columns the start block's span; T = U diag(ritz) Uᴴ in double precision."""

    V: Tensor
    ritz: Tensor  # (D,)
    vectors: Tensor  # U (D, D)


def block_lanczos(product: Callable[[Tensor], Tensor], start: Tensor, size: int, *, psd: bool = False) -> BlockSpace:
    """The block Krylov space of a Hermitian product, of ``size`` columns, or n where that is less.

    Args:
        product: A X for (n, b).
        start: (n, b).
        psd: A has no negative eigenvalue: negative Ritz values are rounding, and set to zero.

    Cost: size columns through the product, full reorthogonalisation O(n·size²). Memory: n·size.
    """
    n, b = start.shape
    size = min(size, n)
    V = torch.zeros(n, size, dtype=start.dtype, device=start.device)
    wide = torch.complex128 if start.dtype.is_complex else torch.float64
    T = torch.zeros(size, size, dtype=wide, device=start.device)
    block, filled = orthonormal(start, V[:, :0])[0], 0
    while filled < size:
        block = block[:, : size - filled]
        new = slice(filled, filled + block.shape[1])
        V[:, new] = block
        filled = new.stop
        W, c = project(V[:, :filled], product(block))
        T[:filled, new] = c.to(wide)
        T[new, :filled] = c.mH.to(wide)
        block = orthonormal(W, V[:, :filled])[0]
    ritz, U = torch.linalg.eigh(0.5 * (T + T.mH))
    return BlockSpace(V, ritz.clamp(min=0.0) if psd else ritz, U)


def project(V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """W without its part in the span of V, and the coefficients; twice is enough."""
    c = V.mH @ W
    W = W - V @ c
    d = V.mH @ W
    return W - V @ d, c + d


def orthonormal(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """F and R with W = F R, F orthonormal and orthogonal to V; a direction that has run out is drawn anew, its R zero.

    What is left of a column can be rounding error of what was taken away, and lie in V again: it is projected once more
    at unit length.
    """
    eps = torch.finfo(W.dtype).eps
    F, R = torch.linalg.qr(W)
    lost = R.diagonal().abs() <= 10 * eps * R.abs().max()
    if bool(lost.any()):
        generator = torch.Generator().manual_seed(V.shape[1])
        fresh = torch.randn(W.shape, generator=generator, dtype=torch.float64).to(W)
        F, R = torch.where(lost, fresh, F), torch.where(lost.unsqueeze(1), torch.zeros_like(R), R)
    F, again = torch.linalg.qr(project(V, F)[0])
    return F, again @ R
