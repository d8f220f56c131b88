"""Classical Gram–Schmidt against a whole basis at once: the one orthogonalisation of every iteration here.

One pass is two matrix–vector products with the basis (BLAS 2, or BLAS 3 over several runs), never a scan over its
vectors. One pass leaves an error of order eps·‖w‖/‖w_new‖; the second removes it ("twice is enough"). Shapes: m
independent runs, j basis vectors each, length n; bases are stored row by row, Q (m, j, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 8  # set aside for a basis that may grow, beyond twice its rows
SHORT = 2**17  # entries up to which BLAS sums squares of float32 to a few units in the last place


def basis_of(V: Tensor, k: int, room: int, before: Tensor | None) -> Tensor:
    """Rows for k vectors (m, k, n), the first ones those of ``before``; in its own storage where that has the room.

    A basis that grows in small steps would be copied at each of them, and one made for its largest depth would pay for
    fresh pages of memory (300 rows of 16 384: 130 µs a row, not 10): twice the rows are set aside, up to ``room``.
    """
    n, m = V.shape
    if before is not None and before._base is not None:
        buffer = before._base
        if buffer.ndim == 3 and buffer.shape[0] == m and buffer.shape[1] >= k and buffer.shape[2] == n:
            return buffer[:, :k]
    buffer = V.new_empty(m, max(k, min(room, 2 * k + ROWS)), n)
    if before is not None:
        buffer[:, : before.shape[1]] = before
    return buffer[:, :k]


def coefficients(Q: Tensor, W: Tensor) -> Tensor:
    """Return c (m, j) with c_i = q_iᴴ w, for Q (m, j, n) and W (m, n).

    The conjugate is put on the vectors: conj(Q conj(w)) costs O(n) where conjugating the basis would copy it.
    """
    Wc = W.conj_physical() if W.is_complex() else W
    if Q.shape[0] == 1:
        c = torch.mv(Q[0], Wc[0]).unsqueeze(0)
    else:  # wᵀQᵀ, not Qw: the same sum, but 2–10 times faster as a batched product (measured, 2 cores)
        c = torch.bmm(Wc.unsqueeze(1), Q.mT).squeeze(1)
    return c.conj_physical_() if c.is_complex() else c


def subtract(Q: Tensor, c: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
    """Return W − Σ_i c_i q_i (m, n); in place with ``out=W``, otherwise W is left as it is."""
    if Q.shape[0] == 1:
        if out is W:
            W[0].addmv_(Q[0].t(), c[0], alpha=-1)
            return W
        return torch.addmv(W[0], Q[0].t(), c[0], alpha=-1).unsqueeze(0)
    if out is W:
        W.unsqueeze(1).baddbmm_(c.unsqueeze(1), Q, alpha=-1)
        return W
    return torch.baddbmm(W.unsqueeze(1), c.unsqueeze(1), Q, alpha=-1).squeeze(1)


def add(Q: Tensor, c: Tensor, W: Tensor) -> Tensor:
    """Add Σ_i c_i q_i to W (m, n) in place, and return it."""
    if Q.shape[0] == 1:
        W[0].addmv_(Q[0].t(), c[0])
    else:
        W.unsqueeze(1).baddbmm_(c.unsqueeze(1), Q)
    return W


def project_out(Q: Tensor, W: Tensor, passes: int = 2) -> tuple[Tensor, Tensor]:
    """Remove from every w its part in the span of the (orthonormal or zero) rows of its basis.

    Args:      Q: bases (m, j, n), j ≥ 1.  W: vectors (m, n), not changed.  passes: 2 for orthogonality to working
               precision, 1 for a plain Gram–Schmidt step.
    Returns:   (W − Qᵀc, c): the remainder (m, n), newly allocated, and the coefficients c_i = q_iᴴw (m, j), summed
               over the passes, so that w = Σ c_i q_i + remainder to rounding.
    Cost:      2·passes readings of the basis.
    Reference: Giraud, Langou, Rozložník, van den Eshof 2005 (why the second pass suffices).
    """
    W = W.contiguous()  # a transposed block product otherwise: the batched products would copy it each time
    if not W.is_complex() and (Q.shape[0] == 1 or _one_by_one(Q)):
        return _project_each(Q, W, passes)
    c = coefficients(Q, W)
    R = subtract(Q, c, W)
    for _ in range(passes - 1):
        correction = coefficients(Q, R)
        R = subtract(Q, correction, R, out=R)
        c += correction
    return R, c


def _one_by_one(Q: Tensor) -> bool:
    """Whether to finish all passes of one run before the next: on a CPU where one basis fits a cache and all do not.

    Batched products then stream every basis from memory at each of the readings (1.5 to 3 times slower, measured with
    10 to 30 runs of 0.8 to 6 MB each); below that size they win by having no loop. A function of shape and dtype only.
    """
    if Q.device.type != "cpu":
        return False
    each = Q.shape[1] * Q.shape[2] * Q.element_size()
    return each <= 2**23 and Q.shape[0] * each > 2**24


def _project_each(Q: Tensor, W: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """project_out run by run, real numbers; with few views, because a step of a short run feels each of them."""
    remainders, totals = [], []
    for q, w in zip(Q.unbind(0), W.unbind(0), strict=True):
        qt = q.t()
        c = torch.mv(q, w)
        w = torch.addmv(w, qt, c, alpha=-1)
        for _ in range(passes - 1):
            correction = torch.mv(q, w)
            w.addmv_(qt, correction, alpha=-1)
            c += correction
        remainders.append(w)
        totals.append(c)
    if len(totals) == 1:
        return remainders[0].unsqueeze(0), totals[0].unsqueeze(0)
    return torch.stack(remainders), torch.stack(totals)


def norms(W: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the 2-norms (m,) of the rows of W (m, n), real; into ``out`` where given.

    Half and single precision are summed in float64: a float32 sum of 10⁷ squares is wrong in the fourth digit, and
    squares below 1e-38 vanish. Devices without float64 (MPS) sum in float32.
    """
    low = W.dtype not in (torch.float64, torch.complex128) and W.device.type != "mps"
    if (
        low
        and out is None
        and W.dtype == torch.float32
        and W.shape[0] == 1
        and W.shape[1] <= SHORT
        and W.device.type == "cpu"
    ):
        square = torch.dot(W[0], W[0])  # a tenth of the time; as exact as float32 here, if nothing over- or underflows
        if 1e-25 < square.item() < 1e25:
            return square.sqrt().unsqueeze(0)
    if not low:
        return torch.linalg.vector_norm(W, dim=1, out=out)
    wide = torch.complex128 if W.is_complex() else torch.float64
    real = W.real.dtype if W.is_complex() else W.dtype
    value = torch.linalg.vector_norm(W, dim=1, dtype=wide)
    return value.to(real) if out is None else out.copy_(value)


def safe_norms(W: Tensor) -> Tensor:
    """Return the 2-norms (m,) of the rows of W without overflow or underflow of the squares (zero rows give 0)."""
    largest = torch.linalg.vector_norm(W, ord=torch.inf, dim=1)
    scale = largest.masked_fill(largest == 0, 1)
    return largest * norms(W / scale.unsqueeze(1))


def columns(W: Tensor) -> Tensor:
    """Return the rows of W (m, n) as the columns of a block (n, m), laid out row by row.

    That is the layout sparse products and stencils are fast in: for a CSR product with 4 columns it is worth 4x.
    """
    return W.mT.contiguous() if W.shape[0] > 1 else W.mT


def dots(X: Tensor, Y: Tensor) -> Tensor:
    """Return x_iᴴ y_i (m,) for the rows of X and Y (m, n)."""
    if X.shape[0] == 1:
        return torch.vdot(X[0], Y[0]).unsqueeze(0)
    return torch.linalg.vecdot(X, Y)
