"""Thick-restart block Lanczos: the wanted Ritz pairs and a block of new directions are kept, the rest is dropped.

With orthonormal V and T = Vᴴ A V, every step keeps A V = V T + F Eᴴ, where E picks the last b columns and F is what the
last products have outside of the basis. A Ritz pair (θ, V s) has the residual ‖F Eᴴ s‖, without a further product. A
restart replaces V by V S for the kept vectors S, and F again stands for what comes next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..krylov.block import orthonormal, project

Product = Callable[[Tensor], Tensor]
CHECKING = 30  # columns that look for what a converged space may have missed


@dataclass
class Found:
    """Ritz values (k,) and vectors (n, k), best first, residual norms (k,), restarts, and whether all converged.

    ``scale`` is the largest |θ| that was seen, which residuals are measured by.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    scale: float
    restarts: int
    converged: bool


def order_of(which: str, theta: Tensor, k: int) -> Tensor:
    """Indices of the k wanted values, best first."""
    key = {"LA": -theta, "SA": theta, "LM": -theta.abs()}[which]
    return key.argsort(stable=True)[:k]


def thick_restart(
    product: Product, start: Tensor, k: int, which: str, size: int, tol: float, max_products: int
) -> Found:
    """The k wanted pairs of a Hermitian operator.

    Args:
        product: A X for blocks (n, b).
        start: (n, b), linearly independent columns.
        size: columns of the basis at most; k + 2b ≤ size ≤ n.
        tol: of residuals, relative to the largest |θ|.
        max_products: limit on columns that go through the product.
    """
    n, b = start.shape
    V = torch.zeros(n, size, dtype=start.dtype, device=start.device)
    T = torch.zeros(size, size, dtype=start.dtype, device=start.device)
    block, _ = orthonormal(start, V[:, :0])
    filled = spent = restarts = 0
    found: Found | None = None  # converged, and being checked
    limit = size
    while True:
        F = R = None
        while filled + block.shape[1] <= limit:
            new = slice(filled, filled + block.shape[1])
            V[:, new] = block
            filled = new.stop
            W = product(block)
            spent += block.shape[1]
            W, c = project(V[:, :filled], W)
            T[:filled, new] = c
            T[new, :filled] = c.mH
            if filled >= n:
                R = torch.zeros(block.shape[1], block.shape[1], dtype=T.dtype, device=T.device)
                break
            F, R = orthonormal(W, V[:, :filled])
            block = F[:, : max(0, min(F.shape[1], n - filled))]
        theta, S = torch.linalg.eigh(0.5 * (T[:filled, :filled] + T[:filled, :filled].mH))
        chosen = order_of(which, theta, k)
        assert R is not None
        last = S[filled - R.shape[1] :, chosen]
        residuals = torch.linalg.vector_norm(R @ last, dim=0)
        scale = float(theta.abs().max())
        if found is not None and bool(((theta[chosen] - found.values).abs() <= 10 * tol * scale).all()):
            return found
        done = bool((residuals <= tol * scale).all()) or filled >= n
        now = Found(theta[chosen], V[:, :filled] @ S[:, chosen], residuals, scale, restarts, done)
        if filled >= n or spent >= max_products or not block.shape[1]:
            return now
        # Some more than the wanted ones: the gap to what is dropped sets the speed.
        keep = min(k + max(b, (size - k) // 3), filled - b)
        found, limit = None, size
        if done:
            # A Krylov space of b vectors has b copies of a repeated eigenvalue at most, and converges without the rest:
            # a random direction has some of them, and shows them as a change of what is wanted. Only converged vectors
            # are kept: A of the others leaves the space through F, which goes.
            keep = k
            found, limit = now, min(size, keep + max(CHECKING, 2 * b))
            block = orthonormal(_random(V, b, restarts), V[:, :filled])[0]
        best = order_of(which, theta, keep)
        V[:, :keep] = V[:, :filled] @ S[:, best]
        T.zero_()
        T[:keep, :keep] = torch.diag(theta[best].to(T.dtype))
        filled, restarts = keep, restarts + 1


def _random(V: Tensor, b: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(V.shape[0], b, generator=generator, dtype=torch.float64).to(V)
