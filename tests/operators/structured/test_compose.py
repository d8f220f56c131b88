"""Compositions against the classes that have a file of their own."""

from __future__ import annotations

import pytest
import torch
from tests.operators.structured.table import close, member, normal, symmetric

from ritz.operators.structured import (
    BlockTriangular,
    Dense,
    Diagonal,
    DirectSum,
    Hierarchical,
    RankTriangular,
    Structure,
)


def hierarchical(top: int, bottom: int) -> Structure:
    return BlockTriangular(Dense(), BlockTriangular(Diagonal(), Dense(), -bottom, upper=False), top)


TWINS: dict[str, tuple[Structure, Structure]] = {
    "hierarchical 1 2": (Hierarchical(1, 2), hierarchical(1, 2)),
    "hierarchical 4 3": (Hierarchical(4, 3), hierarchical(4, 3)),
    "rows first": (RankTriangular(3), BlockTriangular(Dense(), Diagonal(), 3)),
    "columns first": (RankTriangular(3, rows=False), BlockTriangular(Dense(), Diagonal(), 3, upper=False)),
    "columns last": (RankTriangular(3, rows=False, first=False), BlockTriangular(Diagonal(), Dense(), -3)),
    "rows last": (RankTriangular(3, first=False), BlockTriangular(Diagonal(), Dense(), -3, upper=False)),
    "top rows only": (Hierarchical(3, 0), RankTriangular(3)),
    "bottom rows only": (Hierarchical(0, 3), RankTriangular(3, first=False)),
    "diagonal": (DirectSum(Diagonal(), Diagonal(), 3), Diagonal()),
}


@pytest.mark.parametrize("one, other", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 6, 7, 8, 40])
def test_composition_equals_the_dedicated_class(one: Structure, other: Structure, d: int) -> None:
    assert one.numel(d) == other.numel(d)
    a, b = member(one, d, seed=1), member(one, d, seed=2)
    K, L = one.to_dense(a, d), one.to_dense(b, d)
    a2, b2 = other.from_dense(K), other.from_dense(L)
    close(other.to_dense(a2, d), K)  # the same class
    X, M = normal(d, 6), symmetric(d)
    close(other.matmul(a2, X), one.matmul(a, X))
    close(other.rmatmul(a2, X), one.rmatmul(a, X))
    for mine, theirs in [
        (one.multiply(a, b, d), other.multiply(a2, b2, d)),
        (one.gram(a, d), other.gram(a2, d)),
        (one.outer(X), other.outer(X)),
        (one.project(M), other.project(M)),
        (one.identity(d, dtype=X.dtype), other.identity(d, dtype=X.dtype)),
    ]:
        close(other.to_dense(theirs, d), one.to_dense(mine, d))
    close(other.trace(a2, d), one.trace(a, d), 1e-10)
    close(other.norm(a2, d), one.norm(a, d))


def test_a_direct_sum_is_two_independent_matrices() -> None:
    structure, d = DirectSum(Dense(), RankTriangular(2), 4), 11
    flat, X = member(structure, d), normal(d, 3)
    K = structure.to_dense(flat, d)
    assert not K[:4, 4:].any() and not K[4:, :4].any()
    head, tail = flat[:16], flat[16:]
    close(structure.matmul(flat, X), torch.cat([Dense().matmul(head, X[:4]), RankTriangular(2).matmul(tail, X[4:])]))


def test_small_sizes_belong_to_one_of_the_two() -> None:
    structure = BlockTriangular(Dense(), Diagonal(), 3)
    assert [structure.numel(d) for d in (1, 2, 3, 4, 5)] == [1, 4, 9, 13, 17]
    structure = BlockTriangular(Diagonal(), Dense(), -3)
    assert [structure.numel(d) for d in (1, 2, 3, 4, 5)] == [1, 4, 9, 13, 17]
    assert structure.describe(2) == "dense" and "diagonal" in structure.describe(5)
