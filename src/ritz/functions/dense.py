"""Functions of small general (not normal) matrices, batched, in double precision.

Hermitian ones never come here: they go through their eigendecomposition. These are the textbook methods of Higham,
Functions of Matrices (2008): the product form of the Denman–Beavers iteration with determinantal scaling for roots
(ch. 6), inverse scaling and squaring with partial fractions for the logarithm (ch. 11).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DomainError

if TYPE_CHECKING:
    from .scalar import ScalarFunction


def by_eigenvectors(f: Callable[[Tensor], Tensor], H: Tensor) -> Tensor:
    """f(H) = V f(D) V⁻¹; refused where the eigenvectors are too ill-conditioned to be trusted."""
    w, V = eigenvectors(H)
    return _keep_real(V @ (f(w).unsqueeze(-1) * torch.linalg.inv(V)), H, f(H.real.diagonal(dim1=-2, dim2=-1)))


def eigenvectors(H: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a batch of general matrices, or a DomainError where they are useless."""
    w, V = torch.linalg.eig(H)
    worst = float(torch.linalg.cond(V.detach()).max())
    if not worst < 1e8:
        raise DomainError(
            f"a general callable was applied to a nearly defective matrix (eigenvector condition {worst:.1e}); use a "
            "named function from ritz.functions, which needs no eigenvectors, or a Hermitian operator"
        )
    return w, V


def _keep_real(F: Tensor, H: Tensor, probe: Tensor) -> Tensor:
    """A real matrix has a real f(H) when f is real on the real axis."""
    return F if H.is_complex() or probe.is_complex() else F.real


def sqrtm(H: Tensor) -> tuple[Tensor, Tensor]:
    """H^(1/2) and H^(−1/2) of a batch; no eigenvalue on the closed negative real axis."""
    k = H.shape[-1]
    eye = torch.eye(k, dtype=H.dtype, device=H.device).expand_as(H)
    M, X, Y, last = H, H, eye, False
    for step in range(60):
        inverse = torch.linalg.inv(M)
        if step < 6:
            # scaling brings all |eigenvalues| towards 1 in the first steps; afterwards it would only disturb
            mu = torch.linalg.det(M.detach()).abs().clamp(min=1e-300, max=1e300).pow(-1 / (2 * k))[..., None, None]
        else:
            mu = torch.ones((), dtype=H.real.dtype, device=H.device)
        mu2 = mu * mu
        X = 0.5 * mu * X @ (eye + inverse / mu2)
        Y = 0.5 * mu * Y @ (eye + inverse / mu2)
        M = 0.5 * (eye + 0.5 * (mu2 * M + inverse / mu2))
        if last:
            return X, Y
        error = float((M - eye).detach().abs().amax())
        if error != error:
            break
        last = error <= 1e-8  # convergence is quadratic: the next step is the last
    raise DomainError(
        "the square root of a small nonsymmetric matrix did not converge; it has an eigenvalue on or near the negative "
        "real axis: add a shift (A.shift(sigma))"
    )


def logm(H: Tensor) -> Tensor:
    """Principal logarithm of a batch; no eigenvalue on the closed negative real axis."""
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    root, halvings = H, 0
    while float(torch.linalg.matrix_norm((root - eye).detach(), 1).max()) > 0.25 and halvings < 60:
        root, halvings = sqrtm(root)[0], halvings + 1
    # log(I + E) = Σ w_j E (I + x_j E)⁻¹, Gauss–Legendre on [0, 1]: the diagonal Padé approximant
    E = root - eye
    nodes, weights = np.polynomial.legendre.leggauss(9)
    total = torch.zeros_like(H)
    for x, w in zip(nodes, weights, strict=True):
        total = total + 0.5 * float(w) * torch.linalg.solve(eye + 0.5 * (1 + float(x)) * E, E)
    return 2.0**halvings * total


def between(f: ScalarFunction, A: Tensor, B: Tensor, E: Tensor) -> Tensor:
    """The upper right block of f([[A, E], [0, B]]): the Fréchet derivative of f in direction E, between A and B.

    Through the block matrix where f has a dense algorithm, through eigenvectors and divided differences otherwise.
    """
    if not f.block_exact:
        (a, P), (b, R) = eigenvectors(A), eigenvectors(B)
        ratio = f.divided_difference(a.unsqueeze(-1), b.unsqueeze(-2))
        X = P @ (ratio * (torch.linalg.inv(P) @ E.to(P.dtype) @ R)) @ torch.linalg.inv(R)
        return _keep_real(X, E, f(E.real.diagonal(dim1=-2, dim2=-1)))
    k, j = A.shape[-1], B.shape[-1]
    # The block is linear in E: bring it to the scale of the diagonal blocks, so that norms are not driven by it
    size = torch.linalg.matrix_norm(E, 1)[..., None, None]
    target = torch.maximum(torch.linalg.matrix_norm(A, 1), torch.linalg.matrix_norm(B, 1))[..., None, None]
    target = torch.where(target > 0, target, torch.ones_like(target))
    scale = torch.where(size > 0, target / torch.where(size > 0, size, 1.0), 1.0)
    big = A.new_zeros((*A.shape[:-2], k + j, k + j))
    big[..., :k, :k], big[..., :k, k:], big[..., k:, k:] = A, E * scale, B
    return f.matrix(big)[..., :k, k:] / scale
