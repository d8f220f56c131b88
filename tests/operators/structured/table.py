"""The structures under test, random members, and the same classes written down a second time, entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from ritz.operators.structured import (
    BlockDiagonal,
    BlockTriangular,
    Dense,
    Diagonal,
    DirectSum,
    Hierarchical,
    LowerToeplitz,
    LowerTriangular,
    RankTriangular,
    Structure,
    UpperToeplitz,
    UpperTriangular,
)

STRUCTURES: dict[str, Structure] = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "block 1": BlockDiagonal(1),
    "block 4": BlockDiagonal(4),
    "block 30": BlockDiagonal(30),
    "lower triangular": LowerTriangular(),
    "upper triangular": UpperTriangular(),
    "lower Toeplitz": LowerToeplitz(),
    "upper Toeplitz": UpperToeplitz(),
    "rank 1, rows first": RankTriangular(1),
    "rank 3, rows first": RankTriangular(3),
    "rank 3, rows last": RankTriangular(3, first=False),
    "rank 3, columns first": RankTriangular(3, rows=False),
    "rank 3, columns last": RankTriangular(3, rows=False, first=False),
    "hierarchical 1 2": Hierarchical(1, 2),
    "hierarchical 15 15": Hierarchical(15, 15),
    "hierarchical 3 0": Hierarchical(3, 0),
    "hierarchical 0 3": Hierarchical(0, 3),
    "upper of triangular and Toeplitz": BlockTriangular(LowerTriangular(), UpperToeplitz(), 3),
    "upper of Toeplitz and blocks": BlockTriangular(LowerToeplitz(), BlockDiagonal(2), -4),
    "lower of hierarchical and blocks": BlockTriangular(Hierarchical(1, 2), BlockDiagonal(3), 4, upper=False),
    "lower of rank and dense": BlockTriangular(RankTriangular(2, rows=False), Dense(), -2, upper=False),
    "upper of upper": BlockTriangular(Dense(), BlockTriangular(Diagonal(), Dense(), -3, upper=False), 2),
    "sum of dense and diagonal": DirectSum(Dense(), Diagonal(), 3),
    "sum of diagonals": DirectSum(Diagonal(), Diagonal(), 2),
    "sum of sums": DirectSum(LowerToeplitz(), DirectSum(UpperTriangular(), RankTriangular(1), 2), 5),
}
SMALL = (1, 2, 3, 5, 8)
SIZES = (*SMALL, 31, 40, 64, 257)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def member(structure: Structure, d: int, *batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Stored numbers of a random member, or of a batch of them; nothing about it is symmetric or small."""
    return normal(*batch, structure.numel(d), seed=seed, dtype=dtype)


def symmetric(d: int, *batch: int, seed: int = 0) -> Tensor:
    M = normal(*batch, d, d, seed=seed)
    return M + M.mT


def basis(structure: Structure, d: int) -> Tensor:
    """The matrices that single stored numbers stand for, (p, d, d)."""
    p = structure.numel(d)
    return torch.stack([structure.to_dense(e, d) for e in torch.eye(p, dtype=torch.float64)])


# -- the classes by their patterns, independent of how they are stored ------------------------------------------------


def split_of(structure: BlockTriangular | DirectSum, d: int) -> int:
    return min(structure.split, d) if structure.split > 0 else max(d + structure.split, 0)


def pattern(structure: Structure, d: int) -> Tensor:
    """Which entries of a d×d member may differ from zero."""
    i, j = torch.arange(d).unsqueeze(1), torch.arange(d).unsqueeze(0)
    match structure:
        case Dense():
            return torch.ones(d, d, dtype=torch.bool)
        case Diagonal():
            return i == j
        case BlockDiagonal(size):
            return i // size == j // size
        case LowerTriangular() | LowerToeplitz():
            return i >= j
        case UpperTriangular() | UpperToeplitz():
            return i <= j
        case RankTriangular(rank, rows, first):
            line = i if rows else j
            return (i == j) | ((line < rank) if first else (line >= d - rank))
        case Hierarchical(top, bottom):
            return (i == j) | (i < top) | ((i >= d - bottom) & (j >= top))
        case BlockTriangular() | DirectSum():
            s = split_of(structure, d)
            mask = torch.zeros(d, d, dtype=torch.bool)
            mask[:s, :s], mask[s:, s:] = pattern(structure.first, s), pattern(structure.second, d - s)
            if isinstance(structure, BlockTriangular):
                mask |= ((i < s) & (j >= s)) if structure.upper else ((i >= s) & (j < s))
            return mask
    raise AssertionError(structure)


def projected(structure: Structure, M: Tensor) -> Tensor:
    """Π(M) as a dense matrix, from the rules: copied, doubled, tied entries averaged."""
    d = M.shape[0]
    if isinstance(structure, (LowerToeplitz, UpperToeplitz)):
        N = torch.zeros_like(M)
        for k in range(d):
            place = -k if isinstance(structure, LowerToeplitz) else k
            N.diagonal(place).fill_((1 if k == 0 else 2) * M.diagonal(k).mean())
        return N
    mask = pattern(structure, d)
    N = M * mask * torch.where(mask.mT, 1.0, 2.0)
    if isinstance(structure, (BlockTriangular, DirectSum)):
        s = split_of(structure, d)
        N[:s, :s], N[s:, s:] = projected(structure.first, M[:s, :s]), projected(structure.second, M[s:, s:])
    return N


def close(got: Tensor, want: Tensor, rtol: float = 1e-12) -> None:
    """Equal in shape and dtype, and in Frobenius norm up to ``rtol``."""
    assert got.shape == want.shape, (got.shape, want.shape)
    assert got.dtype == want.dtype, (got.dtype, want.dtype)
    error, size = float((got - want).detach().norm()), float(want.detach().norm())
    assert error <= rtol * max(size, 1e-300), f"off by {error / max(size, 1e-300):.2e} of the norm"
