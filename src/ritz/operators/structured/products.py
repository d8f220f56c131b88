"""Products that structures are made of: written into memory that is there, accumulated, symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics import has_tangent, in_transform

ALIGNMENT = 64  # bytes: a product of matrices whose rows start elsewhere takes up to a quarter longer on a CPU
ALIGNED_SIZE = 256  # below this many columns that does not pay for a copy
SYMMETRIC_BLOCK = 256  # below this size one product is faster than three smaller ones and a transposed copy


def _transformed() -> bool:
    """Whether a function transform is active; torch.vmap has no rule for fused multiplication and addition."""
    return not torch.compiler.is_compiling() and in_transform()


def writable(*tensors: Tensor) -> bool:
    """Whether a result may be written into memory made beforehand: nothing is recorded, traced or transformed."""
    if torch.compiler.is_compiling() or in_transform() or has_tangent(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def empty_product(flat: Tensor, X: Tensor) -> Tensor:
    """Memory for a product of the matrices behind ``flat`` (..., p) with ``X`` (..., d, m)."""
    batch = torch.broadcast_shapes(flat.shape[:-1], X.shape[:-2])
    if not batch and by_columns(X):
        return empty_aligned(X, X.shape[1], X.shape[0]).mT
    return X.new_empty(batch + X.shape[-2:])


def row_length(columns: int, like: Tensor) -> int:
    """Numbers from one row to the next in aligned memory."""
    if columns < ALIGNED_SIZE or like.device.type != "cpu":
        return columns
    step = ALIGNMENT // like.dtype.itemsize
    return -(-columns // step) * step


def empty_aligned(like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for a (rows, columns) matrix whose rows start at whole cache lines: a view where that needs gaps."""
    length = row_length(columns, like)
    memory = like.new_empty(rows, length)
    return memory if length == columns else memory[:, :columns]


def aligned(M: Tensor) -> Tensor:
    """M, or a copy of it in aligned memory where a product with M would be slow and nothing is recorded."""
    if M.ndim != 2 or not writable(M):
        return M
    rows = M if M.stride(1) == 1 else M.mT
    if rows.stride(1) != 1 or rows.stride(0) == row_length(rows.stride(0), M):
        return M
    copy = empty_aligned(M, *rows.shape).copy_(rows)
    return copy if rows is M else copy.mT


def aligned_product(A: Tensor, B: Tensor) -> Tensor:
    """A B for (n, k) and (k, m), in aligned memory; with a batch axis or a graph as usual."""
    if A.ndim != 2 or B.ndim != 2 or not writable(A, B):
        return A @ B
    return torch.mm(aligned(A), aligned(B), out=empty_aligned(A, A.shape[0], B.shape[1]))


def fixed_vector(d: int, like: Tensor) -> Tensor:
    """A vector (d,) of irregular entries, the same every time: it has a part in any direction of interest."""
    angle = torch.arange(d, dtype=torch.float64, device=like.device)
    return torch.cos(angle * (angle + 1.618)).to(like.dtype)


def by_columns(X: Tensor) -> bool:
    """Whether a matrix lies in memory column after column, as the transpose of a contiguous one does.

    A product keeps that layout, so that Y = (K Xᵀ)ᵀ is contiguous where X is, and what follows reads it in order.
    """
    return X.ndim == 2 and X.stride(0) == 1 and X.stride(1) > 1


def pieces(flat: Tensor, *sizes: int) -> list[Tensor]:
    """Consecutive pieces of the last axis as views of their own: those of ``split`` must not be changed in place."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [flat.narrow(-1, start, size) for start, size in zip(starts, sizes, strict=True)]


def as_matrix(flat: Tensor, rows: int, columns: int) -> Tensor:
    """The last axis as a (rows, columns) matrix; a view, because that axis is contiguous in everything stored."""
    return flat.reshape(flat.shape[:-1] + (rows, columns))


def product(A: Tensor, X: Tensor, out: Tensor | None = None) -> Tensor:
    """A X, into ``out`` where given: (..., n, k) with (..., k, m)."""
    if out is None:
        if A.ndim != 2 or not by_columns(X) or not writable(A, X):
            return A @ X
        out = empty_aligned(X, X.shape[1], A.shape[0]).mT
    if A.ndim == 2 and X.ndim == 2:
        return torch.mm(A, X, out=out)
    if A.ndim == 3 and X.ndim == 3 and A.shape[0] == X.shape[0]:
        return torch.bmm(A, X, out=out)
    return out.copy_(A @ X)  # torch.matmul resizes an ``out`` of other ranks, and so detaches a view from its memory


def add_product_(Y: Tensor, A: Tensor, X: Tensor) -> Tensor:
    """Y + A X in place; Y is memory of our own."""
    if _transformed():
        return Y.add_(A @ X)
    if Y.ndim == 2 and A.ndim == 2 and X.ndim == 2:
        return Y.addmm_(A, X)
    if Y.ndim == 3 and A.ndim == 3 and X.ndim == 3 and Y.shape[0] == A.shape[0] == X.shape[0]:
        return Y.baddbmm_(A, X)
    return Y.add_(A @ X)


def add_scaled_(Y: Tensor, a: Tensor, B: Tensor) -> Tensor:
    """Y + a B in place, entry by entry; Y is memory of our own."""
    return Y.add_(a * B) if _transformed() else Y.addcmul_(a, B)


def symmetric_product(L: Tensor) -> Tensor:
    """L Lᵀ, (..., d, m) -> (..., d, d).

    A large product is computed in its lower blocks and mirrored, recursively: for d = 4 SYMMETRIC_BLOCK that saves
    three eighths of the multiplications. With few columns the mirror image costs more time than that saves.
    """
    d, m = L.shape[-2:]
    if L.ndim != 2 or d < 2 * SYMMETRIC_BLOCK or 2 * m < d or L.device.type != "cpu" or not writable(L):
        return L @ L.mT
    out = empty_aligned(L, d, d)
    _fill_symmetric(aligned(L), out)
    return out


def _fill_symmetric(L: Tensor, out: Tensor) -> None:
    d = L.shape[0]
    if d < 2 * SYMMETRIC_BLOCK:
        torch.mm(L, L.mT, out=out)
        return
    h = d // 2
    _fill_symmetric(L[:h], out[:h, :h])
    _fill_symmetric(L[h:], out[h:, h:])
    torch.mm(L[h:], L[:h].mT, out=out[h:, :h])
    out[:h, h:] = out[h:, :h].mT


def square_sum(U: Tensor) -> Tensor:
    """Sums of squares of the rows, (..., d, m) -> (..., d)."""
    if U.dtype == torch.float32 and U.stride(-1) == 1 and writable(U):
        return torch.linalg.vector_norm(U, dim=-1).square_()  # one pass over contiguous rows, without a temporary
    return U.square().sum(-1)
