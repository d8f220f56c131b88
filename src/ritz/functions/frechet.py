"""Rule F: the derivative of the limit f(A)v, from Krylov spaces that are already there.

⟨u, df(A) v⟩ = Re⟨dA, L⟩ with L = L_{f̄}(Aᴴ, u vᴴ), and L ≈ V X Wᴴ with W the space of (A, v), V that of (Aᴴ, u) and
X the upper right block of f̄([[H_u, ‖u‖‖v‖ e₁e₁ᵀ], [0, H_vᴴ]]). X has numerical rank about 10 whatever the depth:
it is compressed before the pairing. Derivation: docs/derivations/frechet.md. Sources: Kandolf, Koskela, Relton,
Schweitzer 2021 (low-rank form); Barros, Singh, Li 2026 (Hermitian bilinear forms).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DomainError
from .scalar import ScalarFunction
from .space import GeneralSpace, HermitianSpace, Space


class LowRank(NamedTuple):
    """X = left rightᴴ for a batch: (m, k, r) and (m, k', r), r the largest rank over the batch."""

    left: Tensor
    right: Tensor


def symmetric_core(space: HermitianSpace, weights: Sequence[tuple[ScalarFunction, Tensor]]) -> Tensor:
    """X of Σ_p g_p vᴴ f_p(A) v for every column, (m, k, k); the cotangents g_p have shape (m,).

    For a quadratic form u = v: the forward space serves both sides, and no further product is needed.
    """
    w, U, first = space.ritz, space.vectors, space.first
    i, j = torch.triu_indices(w.shape[1], w.shape[1], device=w.device)  # f[a, b] = f[b, a]: half of them will do
    both = first[:, i] * first[:, j]
    total = torch.zeros_like(both)
    for f, g in weights:
        total = total + g.double().unsqueeze(1) * slopes(f, w[:, i], w[:, j], both)
    inner = torch.zeros_like(U)
    inner[:, i, j] = inner[:, j, i] = total * both
    return U @ inner @ U.mT


def compress_symmetric(X: Tensor, rtol: float) -> LowRank:
    """Eigenvectors of X, largest first, cut where the dropped part is below rtol in Frobenius norm."""
    scale = X.abs().amax((1, 2), keepdim=True)
    s, P = torch.linalg.eigh(X / torch.where(scale > 0, scale, 1.0))
    order = s.abs().argsort(dim=1, descending=True)
    s, P = s.gather(1, order), P.gather(2, order.unsqueeze(1).expand_as(P))
    r = _rank(s.abs(), rtol)
    s, P = s[:, :r], P[:, :, :r]
    return LowRank(P * (s * scale.squeeze(2)).unsqueeze(1), P)


def compress(X: Tensor, rtol: float) -> LowRank:
    """Singular vectors of X, cut likewise."""
    scale = X.abs().amax((1, 2), keepdim=True)
    if not bool(torch.isfinite(scale).all()):
        raise DomainError(
            "the derivative of f overflows on the small Krylov matrices: their space lost its orthogonality or is too "
            "long for f; expected reorthogonalize=True, a smaller max_matvecs (substeps), or a smaller t"
        )
    P, s, Rh = torch.linalg.svd(X / torch.where(scale > 0, scale, 1.0), full_matrices=False)
    r = _rank(s, rtol)
    return LowRank(P[:, :, :r] * (s[:, :r] * scale.squeeze(2)).unsqueeze(1), Rh[:, :r].mH)


def _rank(s: Tensor, rtol: float) -> int:
    """Smallest r that drops less than rtol of every matrix, s (m, k) sorted downwards."""
    if not s.numel():
        return 0
    tail = s.square().flip(1).cumsum(1).flip(1).sqrt()  # norm of what is dropped when cut before each index
    keep = tail > rtol * tail[:, :1]
    return max(1, int(keep.sum(1).max()))  # at least one, so that a zero gradient is a zero and not a None


def core(left: Space, right: Space, f: ScalarFunction, index: Tensor) -> Tensor:
    """X (p, k_u, k_v) of the direction u_p v_{index[p]}ᴴ, u from the space ``left`` of (Aᴴ, u)."""
    if isinstance(left, HermitianSpace) and isinstance(right, HermitianSpace):
        a, b = left.ritz, right.ritz[index]
        U, R = left.vectors, right.vectors[index]
        weight = left.first.unsqueeze(2) * right.first[index].unsqueeze(1)
        inner = slopes(f, a.unsqueeze(2), b.unsqueeze(1), weight).conj() * weight
        if inner.is_complex() and not U.is_complex():
            U, R = U.to(inner.dtype), R.to(inner.dtype)
        return U @ inner @ R.mH
    assert isinstance(left, GeneralSpace) and isinstance(right, GeneralSpace)
    return _general_core(left, right, f, index)


def _general_core(left: GeneralSpace, right: GeneralSpace, f: ScalarFunction, index: Tensor) -> Tensor:
    """The general case with f̄, written through f: f̄(M) = conj(f(conj(M)))."""
    A, B = left.H.conj().resolve_conj(), right.H[index].mT.contiguous()  # conj of H_u, and conj of H_vᴴ
    size = left.state.norm.to(A.dtype) * right.state.norm[index].to(A.dtype)
    E = torch.zeros(A.shape[0], A.shape[1], B.shape[2], dtype=A.dtype, device=A.device)
    E[:, 0, 0] = size
    return f.between(A, B, E).conj().resolve_conj()


def slopes(f: ScalarFunction, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """f[a, b] where the weight is not zero, zero elsewhere; raises where f has no finite slope and it matters."""
    ratio = f.divided_difference(a, b)
    used = weight != 0
    bad = used & ~torch.isfinite(ratio.abs())
    if bool(bad.any()):
        at = float(a.expand_as(ratio)[bad][0]), float(b.expand_as(ratio)[bad][0])
        raise DomainError(
            f"f has no finite slope between the Ritz values {at[0]:.6g} and {at[1]:.6g}, and a gradient was asked for; "
            "add a shift (A.shift(sigma)), or a function that is smooth there"
        )
    return torch.where(used, ratio, torch.zeros_like(ratio))
