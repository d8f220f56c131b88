"""Members, their storage and their products against the dense matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from tests.operators.structured.table import SIZES, SMALL, STRUCTURES, basis, close, member, normal, pattern

from ritz.operators.structured import BlockDiagonal, Dense, Diagonal, Hierarchical, Structure

structures = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
sizes = pytest.mark.parametrize("d", SIZES)
small = pytest.mark.parametrize("d", SMALL)


@structures
@small
def test_stored_numbers_are_coordinates_on_the_documented_pattern(structure: Structure, d: int) -> None:
    E = basis(structure, d)
    assert torch.linalg.matrix_rank(E.flatten(1)) == structure.numel(d)
    assert torch.equal((E != 0).any(0), pattern(structure, d))


@structures
@sizes
def test_conversion_there_and_back(structure: Structure, d: int) -> None:
    flat = member(structure, d)
    K = structure.to_dense(flat, d)
    assert K.shape == (d, d)
    assert not K[~pattern(structure, d)].any()
    close(structure.from_dense(K), flat)
    close(structure.diagonal(flat, d), K.diagonal())


@structures
@small
def test_from_dense_is_the_closest_member(structure: Structure, d: int) -> None:
    M = normal(d, d, seed=1)
    E = basis(structure, d).flatten(1)
    best = torch.linalg.lstsq(E.mT, M.flatten().unsqueeze(1)).solution.squeeze(1)
    close(structure.from_dense(M), best)


@structures
@sizes
def test_identity(structure: Structure, d: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        flat = structure.identity(d, dtype=dtype, device="cpu")
        assert flat.shape == (structure.numel(d),)
        assert torch.equal(structure.to_dense(flat, d), torch.eye(d, dtype=dtype))
        assert structure.storage(d, dtype) == flat.numel() * flat.element_size()


@structures
@sizes
def test_products_with_blocks(structure: Structure, d: int) -> None:
    flat = member(structure, d)
    K = structure.to_dense(flat, d)
    for width in (1, 7, d):
        X = normal(d, width, seed=width)
        close(structure.matmul(flat, X), K @ X)
        close(structure.rmatmul(flat, X), K.mT @ X)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("d", [1, 5, 40, 600])
def test_products_with_other_memory_layouts(name: str, d: int) -> None:
    structure = STRUCTURES[name]
    flat = member(structure, d)
    K, Z = structure.to_dense(flat, d), normal(6, 2 * d, seed=1)
    for X in (Z[:, :d].contiguous().mT, Z[:, :d].mT, Z.mT[::2], Z[:1, :d].mT, Z[:1, :d].mT.expand(d, 3)):
        assert X.shape[0] == d
        close(structure.matmul(flat, X), K @ X)
        close(structure.rmatmul(flat, X), K.mT @ X)
        close(structure.outer(X), structure.project(X @ X.mT))
    if d > 1 and "block" not in name and "Toeplitz" not in name:  # a product keeps the layout of its operand
        assert structure.matmul(flat, Z[:, :d].contiguous().mT).mT.is_contiguous()


@structures
@sizes
def test_closed_under_products(structure: Structure, d: int) -> None:
    left, right = member(structure, d, seed=1), member(structure, d, seed=2)
    dense = structure.to_dense(left, d) @ structure.to_dense(right, d)
    close(structure.to_dense(structure.from_dense(dense), d), dense)
    close(structure.multiply(left, right, d), structure.from_dense(dense))


@structures
@sizes
def test_square(structure: Structure, d: int) -> None:
    flat = member(structure, d)
    K, square = structure.to_dense(flat, d), structure.square(flat, d)
    assert (square is not None) == isinstance(structure, (Dense, Diagonal, BlockDiagonal, Hierarchical))
    if square is not None:
        for X in (normal(d, 7, seed=1), normal(7, d, seed=1).mT):
            kept = X.clone()
            close(structure.apply_square(square, X), K @ (K.mT @ kept))
            assert torch.equal(X, kept)
            close(structure.apply_square(square, X, overwrite=True), K @ (K.mT @ kept))
    if isinstance(structure, (Diagonal, BlockDiagonal)):
        close(structure.to_dense(square, d), K @ K.mT)


@structures
@sizes
def test_trace_and_norm(structure: Structure, d: int) -> None:
    flat = member(structure, d)
    K = structure.to_dense(flat, d)
    close(structure.trace(flat, d), K.trace(), 1e-10)
    close(structure.norm(flat, d), torch.linalg.matrix_norm(K))


@structures
def test_inputs_are_left_alone(structure: Structure) -> None:
    d = 11
    flat, other, X, M = member(structure, d), member(structure, d, seed=1), normal(d, 3), normal(d, d)
    M = M + M.mT
    before = [t.clone() for t in (flat, other, X, M)]
    structure.matmul(flat, X), structure.rmatmul(flat, X), structure.multiply(flat, other, d), structure.outer(X)
    structure.gram(flat, d).mul_(3)
    structure.from_dense(M).mul_(3), structure.project(M).mul_(3)
    assert all(torch.equal(t, old) for t, old in zip((flat, other, X, M), before, strict=True))


@structures
def test_cost_grows_with_the_width_and_stays_below_dense(structure: Structure) -> None:
    for d in (40, 1000):
        assert structure.apply_cost(d, 20) == pytest.approx(2 * structure.apply_cost(d, 10))
        assert 0 < structure.apply_cost(d, 10) <= d * d * 10
    assert structure.describe(40)
