"""Π, the map of symmetric matrices to a class, and the two products that it is applied to."""

from __future__ import annotations

import pytest
import torch
from tests.operators.structured.table import (
    SIZES,
    SMALL,
    STRUCTURES,
    basis,
    close,
    member,
    normal,
    projected,
    symmetric,
)

from ritz.operators.structured import Structure, products, toeplitz

structures = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
sizes = pytest.mark.parametrize("d", SIZES)
small = pytest.mark.parametrize("d", SMALL)


def inner(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return (A * B).sum((-2, -1))


@structures
@small
def test_projection_solves_the_normal_equations(structure: Structure, d: int) -> None:
    M, E = symmetric(d), basis(structure, d)
    F = (E + E.mT).flatten(1)
    # Symmetric blocks make the system singular: its solution of least norm is the symmetric one.
    wanted = torch.linalg.pinv(F @ F.mT / 2, hermitian=True) @ (F @ M.flatten())
    close(structure.project(M), wanted)


@structures
@sizes
def test_projection_copies_doubles_and_averages(structure: Structure, d: int) -> None:
    M = symmetric(d)
    close(structure.to_dense(structure.project(M), d), projected(structure, M))


@structures
@pytest.mark.parametrize("d", SIZES[:-1])
def test_projection_carries_derivatives_to_the_class(structure: Structure, d: int) -> None:
    M = symmetric(d)
    P = structure.to_dense(structure.project(M), d)
    for seed in range(3):
        N = structure.to_dense(member(structure, d, seed=seed), d)
        left, right = inner(M, N + N.mT), inner(P + P.mT, N + N.mT) / 2
        assert abs(left - right) <= 1e-12 * M.norm() * N.norm()
    close(P.trace(), M.trace(), 1e-11)


@structures
def test_projection_is_the_derivative_along_the_group(structure: Structure) -> None:
    # f(K) = ½ tr(W K Kᵀ) at K₀ (I + E) has the derivative ⟨K₀ᵀ W K₀, E⟩ in E, and W is made such that K₀ᵀ W K₀ = M.
    d = 7
    M = symmetric(d)
    K0 = structure.to_dense(member(structure, d) / 8 + structure.identity(d, dtype=torch.float64), d)
    inverse = torch.linalg.inv(K0)
    W = inverse.mT @ M @ inverse
    P = structure.to_dense(structure.project(M), d)
    coordinates = torch.zeros(structure.numel(d), dtype=torch.float64, requires_grad=True)
    K = K0 @ (torch.eye(d, dtype=torch.float64) + structure.to_dense(coordinates, d))
    (found,) = torch.autograd.grad((W @ K @ K.mT).trace() / 2, coordinates)
    E = basis(structure, d)
    close(found, inner(P + P.mT, E + E.mT) / 4, 1e-10)


@structures
@sizes
def test_gram_and_outer(structure: Structure, d: int) -> None:
    flat = member(structure, d)
    K = structure.to_dense(flat, d)
    close(structure.gram(flat, d), structure.from_dense(projected(structure, K.mT @ K)))
    for width in (1, 9, 2 * d):
        U = normal(d, width, seed=width)
        close(structure.outer(U), structure.from_dense(projected(structure, U @ U.mT)))


@structures
@pytest.mark.parametrize("d", [9, 64])
def test_other_forms_of_the_same_products(structure: Structure, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transforms where a matrix would be formed, and symmetric products by blocks."""
    flat, X = member(structure, d), normal(d, 40, seed=1)
    K, M = structure.to_dense(flat, d), structure.from_dense(projected(structure, X @ X.mT))
    monkeypatch.setattr(toeplitz, "MATRIX_SIZE", 0)
    monkeypatch.setattr(toeplitz, "CHUNK", 0)
    monkeypatch.setattr(products, "SYMMETRIC_BLOCK", 2)
    close(structure.matmul(flat, X), K @ X)
    close(structure.rmatmul(flat, X), K.mT @ X)
    close(structure.outer(X), M)
    close(structure.gram(flat, d), structure.from_dense(projected(structure, K.mT @ K)))


def test_large_symmetric_products_are_mirrored() -> None:
    d = 4 * products.SYMMETRIC_BLOCK + 3
    h, L = d // 2, normal(d, d)
    G = products.symmetric_product(L)
    close(G, L @ L.mT)
    assert torch.equal(G[:h, h:], G[h:, :h].mT)


def test_corners_of_a_large_toeplitz_gram_in_single_precision() -> None:
    # c_0 = 1 is counted d times, the last diagonal has one entry: single-precision transforms would leave 1e-4 there.
    d, structure = 1500, STRUCTURES["lower Toeplitz"]
    flat = structure.identity(d, dtype=torch.float32) + 1e-3 * member(structure, d, dtype=torch.float32)
    error = structure.gram(flat, d).double() - structure.gram(flat.double(), d)
    assert error.abs().max() < 2e-7
