"""Lanczos without its basis: a first pass that keeps T alone, and a second one that combines the vectors as they pass.

Twice the products for the memory of four blocks, whatever the depth. The second pass repeats the operations of the
first with the numbers α and β that it left, hence makes the same vectors without a dot product. Where products are
not repeatable to the bit (sums by atomic operations on a GPU) it drifts, as a plain recurrence does from its limit.
Source: Borici 2000; Frommer, Simoncini 2008, "Matrix functions".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adjoint import Product
from .lanczos import LanczosState, begin, finish, three_term
from .orthogonalize import columns, norms


@dataclass(frozen=True)
class PassedState(LanczosState):
    """A run whose basis is gone: Q has shape (m, k, 0). ``last`` (m, n) is the vector of the last step."""

    last: Tensor


def run_without_basis(
    matmat: Product,
    V: Tensor,
    k: int,
    *,
    reorthogonalize: bool = False,
    state: PassedState | None = None,
    room: int = 0,
) -> PassedState:
    """:func:`run_lanczos` by the plain recurrence, of which α, β and the last two vectors are kept.

    Args, Raises: as there; ``reorthogonalize`` must be False, and ``room`` has no meaning.
    Cost:      k products with a block of m; 4 m vectors of memory.
    """
    assert not reorthogonalize
    W, norm, run = begin(V, state)
    before = None if state is None else state.last
    for _ in range(0 if state is None else state.alpha.shape[1], k):
        if not run.any():
            break
        q = W / run.divisor()
        W, a = three_term(q, before, matmat(columns(q)).mT, run.length)
        run.record(a, norms(W))
        before = q
    last = torch.zeros_like(W) if before is None else before
    return PassedState(V.new_empty(V.shape[1], k, 0), *finish(run, W, norm, state, k), last)


def pass_again(matmat: Product, V: Tensor, state: PassedState, C: Tensor) -> Tensor:
    """Σ_j C[:, j] q_j for every run: V the starting vectors (n, m), C (m, k, r), the result (m, r, n).

    Cost:      k − 1 products with a block of m; m·(r + 3) vectors of memory.
    """
    total = torch.zeros(
        C.shape[0], C.shape[2], V.shape[0], dtype=torch.promote_types(C.dtype, V.dtype), device=V.device
    )
    depth = int(state.depth.max()) if state.depth.numel() else 0
    zero = torch.zeros_like(state.norm)
    W, length, before = V.mT, torch.where(state.depth > 0, state.norm, zero), None
    for j in range(depth):
        q = W / torch.where(length > 0, length, torch.inf).unsqueeze(1)
        total += C[:, j].unsqueeze(2) * q.unsqueeze(1)
        if j + 1 == depth:
            break
        W = matmat(columns(q)).mT
        if before is not None:
            W = torch.addcmul(W, before, length.unsqueeze(1).to(W.dtype), value=-1)
        W = torch.addcmul(W, q, state.alpha[:, j : j + 1].to(W.dtype), value=-1)
        before, length = q, state.beta[:, j]
    return total
