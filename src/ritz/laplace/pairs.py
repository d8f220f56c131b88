"""All eigenpairs of a Gauss–Newton matrix with a short side: few parameters, or few outputs of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..curvature import GGN, DualGGN
from ..curvature.preflight import refuse

MOST_SIDE = 2000  # rows of the smaller one of G and its dual
MOST_BYTES = 512 << 20  # of the eigenvectors, and of the root they are made from


def all_pairs(G: GGN, *, whatever_size: bool = False) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues (k,) and eigenvectors (P, k) with G = V diag(λ) Vᵀ, float64; None where they are too many.

    From the root R (M, P) with G = RᵀR: R Rᵀ has the same nonzero eigenvalues, and V = Rᵀ Q λ^{-1/2} for its own
    eigenvectors Q. In float64 whatever the network has: rounding of size eps·λ_max would drown the small eigenvalues,
    and the evidence has all of them above the prior precision.
    """
    dual = DualGGN(G)
    M, P = dual.shape[0], G.shape[0]
    side = min(M, P)
    if not whatever_size and (side > MOST_SIDE or 8 * side * P > MOST_BYTES):
        return None
    if whatever_size:
        instead = "leave dense=True out (Krylov spaces need no such matrix), or take a subset of parameters or data"
        refuse((side, max(M, P) if M <= P else P), torch.float64, "the root that dense=True decomposes", instead)
    if M > P and 8 * M * P > MOST_BYTES:
        values, V = torch.linalg.eigh(G.to_dense().double())
        return values.clamp(min=0.0), V
    R = dual.root_rows().double()
    if P < M:
        values, V = torch.linalg.eigh(R.mT @ R)
        return values.clamp(min=0.0), V
    values, Q = torch.linalg.eigh(R @ R.mT)
    kept = values > M * torch.finfo(torch.float64).eps * values[-1]
    values, Q = values[kept], Q[:, kept]
    return values, (R.mT @ Q) / values.sqrt()
