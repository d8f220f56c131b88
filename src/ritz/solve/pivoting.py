"""Which columns of a positive semidefinite matrix to build a preconditioner on: greedy, random in blocks.

Both work on the matrix through its diagonal and some of its columns, in float64, and return the columns they read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DomainError
from .root import wide

Columns = Callable[[Tensor], Tensor]  # indices (k,) -> columns (n, k)

# Candidates of one block: enough for matrix products to pay, few enough that most are still worth taking after the
# others of their block. A quarter of the rank had 1.2 to 1.4 candidates read per pivot taken on Matérn 3/2 kernels.
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128


class Selection(NamedTuple):
    """Pivots (r,), the columns at them (n, r) without a graph, and the trace that they leave over."""

    pivots: Tensor
    columns: Tensor
    left: float


class _State:
    """The partial factor F and the columns of K that it is made of, both by rows, and the diagonal of K − F Fᴴ."""

    def __init__(self, diagonal: Tensor, rank: int, dtype: torch.dtype) -> None:
        n = diagonal.shape[0]
        self.d = diagonal.to(torch.float64).clone()
        top = float(self.d.max()) if n else 0.0
        self.tol = 100 * torch.finfo(dtype).eps * max(top, 0.0)
        if bool((self.d < -self.tol).any()) or top < 0:
            raise DomainError(
                f"pivoted Cholesky needs a positive semidefinite operator; diagonal entry {int(self.d.argmin())} is "
                f"{float(self.d.min()):.3g}: drop psd=True, or check which multiple of the identity belongs to A"
            )
        self.d.clamp_(min=0.0)
        self.rows = torch.empty(
            min(rank, n), n, dtype=torch.promote_types(dtype, torch.float64), device=diagonal.device
        )
        self.pivots: list[int] = []
        self.columns: Tensor | None = None

    def done(self, enough: float) -> bool:
        """Whether the rank is used up, K is exhausted, or the trace left over is at most ``enough``."""
        r = len(self.pivots)
        return r >= self.rows.shape[0] or float(self.d.max()) <= self.tol or float(self.d.sum()) <= enough

    def residual(self, C: Tensor, at: Tensor) -> Tensor:
        """Columns of K − F Fᴴ, from those of K."""
        F = self.rows[: len(self.pivots)]
        return wide(C) - F.mT @ F[:, at].conj()

    def append(self, pivots: Tensor, C: Tensor, G: Tensor) -> None:
        """Take further pivots; G (n, k) are the new columns of F."""
        r = len(self.pivots)
        if self.columns is None:
            self.columns = torch.empty(self.rows.shape, dtype=C.dtype, device=C.device)
        self.columns[r : r + C.shape[1]] = C.mT
        self.rows[r : r + G.shape[1]] = G.mT
        self.d -= (G.abs() ** 2).sum(1)
        self.d.clamp_(min=0.0)
        self.d[pivots] = 0.0
        self.pivots += pivots.tolist()

    def result(self, dtype: torch.dtype) -> Selection:
        n, device = self.d.shape[0], self.d.device
        empty = torch.zeros(n, 0, dtype=dtype, device=device)
        C = empty if self.columns is None else self.columns[: len(self.pivots)].mT
        return Selection(torch.tensor(self.pivots, dtype=torch.long, device=device), C, float(self.d.sum()))


def greedy(diagonal: Tensor, columns: Columns, rank: int, dtype: torch.dtype, enough: float = 0.0) -> Selection:
    """The largest entry of the remaining diagonal, one at a time.

    Reference: Harbrecht, Peters, Schneider, On the low-rank approximation by the pivoted Cholesky decomposition, 2012.
    """
    state = _State(diagonal, rank, dtype)
    while not state.done(enough):
        at = state.d.argmax().reshape(1)
        C = columns(at)
        state.append(at, C, state.residual(C, at) / state.d[at].sqrt())
    return state.result(dtype)


def random_blocks(
    diagonal: Tensor, columns: Columns, rank: int, dtype: torch.dtype, seed: int, enough: float = 0.0
) -> Selection:
    """Pivots in proportion to the remaining diagonal, drawn in blocks, with the distribution of one-by-one drawing.

    A block of candidates is drawn from the diagonal as it is; going through them, one is taken with the probability
    (what is left of its diagonal entry after those taken before it)/(the entry it was drawn with). Factor and diagonal
    are updated once a block, by matrix products.

    Reference: Epperly, Tropp, Webber, Embrace rejection: kernel matrix approximation by accelerated randomly pivoted
    Cholesky, 2024, Algorithm 2.2; Chen, Epperly, Tropp, Webber, Randomly pivoted Cholesky, 2024.
    """
    state = _State(diagonal, rank, dtype)
    generator = torch.Generator().manual_seed(seed)
    block = min(max(SMALLEST_BLOCK, rank // 4), LARGEST_BLOCK)
    while not state.done(enough):
        wanted = rank - len(state.pivots)
        size = min(block, wanted)
        draws = torch.rand(2, size, generator=generator, dtype=torch.float64, device="cpu")
        total = state.d.cumsum(0)
        found = torch.searchsorted(total, draws[0].to(total.device) * total[-1], right=True)
        candidates = found.clamp(max=len(total) - 1)
        drawn, back = torch.unique(candidates, return_inverse=True)
        C = columns(drawn)
        G = state.residual(C, drawn)
        H = G[drawn][back][:, back]
        taken = _accept((H + H.mH).cpu() / 2, draws[1], state.tol)
        if not taken:  # the only way: rounding made the first entry vanish; take the largest instead
            at = state.d.argmax().reshape(1)
            C = columns(at)
            state.append(at, C, state.residual(C, at) / state.d[at].sqrt())
            continue
        where = back[torch.tensor(taken, device=back.device)]
        at = drawn[where]
        G = G[:, where]
        S = G[at]
        L, order = torch.linalg.cholesky_ex((S + S.mH) / 2)
        if int(order) > 0:  # at the limit of rounding: keep the part that is definite
            keep = max(int(order) - 1, 1)
            where, at, G, L = where[:keep], at[:keep], G[:, :keep], L[:keep, :keep]
            if int(order) == 1:
                L = state.d[at].sqrt().reshape(1, 1).to(G.dtype)
        state.append(at, C[:, where], torch.linalg.solve_triangular(L.mH, G, upper=True, left=False))
    return state.result(dtype)


def _accept(H: Tensor, uniform: Tensor, tol: float) -> list[int]:
    """Which candidates of a block are taken, H (b, b) the residual matrix at them; eliminates as it goes."""
    H = H.clone()
    before = H.diagonal().real.clone()
    taken = []
    for i in range(H.shape[0]):
        left = float(H[i, i].real)
        if left <= tol or float(uniform[i]) * float(before[i]) >= left:
            continue
        taken.append(i)
        column = H[i:, i] / left**0.5
        H[i:, i:] -= column.unsqueeze(1) * column.conj()
    return taken
