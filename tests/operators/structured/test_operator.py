"""Structured matrices as operators: the contract, flags, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from tests.operators.structured.table import STRUCTURES, close, member, normal, symmetric

from ritz.errors import OperandError
from ritz.operators.structured import (
    BlockDiagonal,
    BlockTriangular,
    Dense,
    Diagonal,
    DirectSum,
    Hierarchical,
    LowerToeplitz,
    RankTriangular,
    Structure,
    StructuredMatrix,
    toeplitz,
)
from ritz.testing import check_operator

structures = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


@structures
@pytest.mark.parametrize("d", [1, 3, 9])
@pytest.mark.parametrize("dtype, trained", [(torch.float64, True), (torch.float32, False)])
def test_operator_contract(structure: Structure, d: int, dtype: torch.dtype, trained: bool) -> None:
    A = structure.matrix(member(structure, d, dtype=dtype).requires_grad_(trained), d)
    assert isinstance(A, StructuredMatrix) and A.tensors() == (A.flat,)
    check_operator(A)


@structures
def test_operator_contract_at_a_size_that_has_all_blocks(structure: Structure) -> None:
    check_operator(structure.matrix(member(structure, 34).requires_grad_(), 34))


@pytest.mark.parametrize("structure", [LowerToeplitz(), STRUCTURES["upper of triangular and Toeplitz"]])
def test_operator_contract_with_transforms(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toeplitz, "MATRIX_SIZE", 0)
    check_operator(structure.matrix(member(structure, 9).requires_grad_(), 9))


@structures
def test_flags_say_what_holds_for_the_class(structure: Structure) -> None:
    d = 9
    A = structure.matrix(member(structure, d), d)
    K = A.to_dense()
    assert A.hermitian in (True, None) and A.psd is None
    assert A.hermitian is None or torch.equal(K, K.mT)
    assert structure.describe(d) in repr(A)


def test_diagonal_structures_are_flagged_symmetric() -> None:
    for structure, flag in [
        (Diagonal(), True),
        (DirectSum(Diagonal(), Diagonal(), 2), True),
        (DirectSum(Diagonal(), Dense(), 2), None),
        (BlockTriangular(Diagonal(), Diagonal(), 2), None),
    ]:
        assert structure.matrix(member(structure, 5), 5).hermitian is flag


@structures
def test_gradients(structure: Structure) -> None:
    d = 7
    flat, other, X = member(structure, d), member(structure, d, seed=1), normal(d, 2)
    for t in (flat, other, X):
        t.requires_grad_()
    assert torch.autograd.gradcheck(structure.matmul, (flat, X))
    assert torch.autograd.gradcheck(structure.rmatmul, (flat, X))
    fast = {"fast_mode": True}  # random directions instead of whole Jacobians
    assert torch.autograd.gradgradcheck(structure.matmul, (flat, X), **fast)
    assert torch.autograd.gradcheck(lambda a, b: structure.multiply(a, b, d), (flat, other), **fast)
    assert torch.autograd.gradcheck(lambda a: structure.gram(a, d), (flat,), **fast)
    assert torch.autograd.gradcheck(structure.outer, (X,), **fast)
    if structure.square(flat, d) is not None:
        both = lambda a, x: structure.apply_square(structure.square(a, d), x)
        assert torch.autograd.gradcheck(both, (flat, X), **fast)
    assert torch.autograd.gradcheck(structure.project, (symmetric(d).requires_grad_(),), **fast)
    assert torch.autograd.gradcheck(lambda a: structure.to_dense(a, d), (flat,), **fast)
    assert torch.autograd.gradcheck(lambda a: structure.norm(a, d), (flat,), **fast)


@pytest.mark.parametrize("size", [3, 4, 20])
def test_block_diagonal_transposes_are_true_transposes(size: int) -> None:
    structure, d = BlockDiagonal(size), 14
    flat, X = member(structure, d), normal(d, 5)
    K, start, rest = torch.zeros(d, d, dtype=torch.float64), 0, flat
    while start < d:  # block by block, from the documented storage
        k = min(size, d - start)
        K[start : start + k, start : start + k], rest = rest[: k * k].reshape(k, k), rest[k * k :]
        start += k
    assert rest.numel() == 0
    forward, backward = structure.matmul(flat, X), structure.rmatmul(flat, X)
    assert (forward - backward).norm() > 0.1 * forward.norm()
    close(forward, K @ X)
    close(backward, K.mT @ X)
    close(structure.to_dense(structure.gram(flat, d), d), (K.mT @ K) * (K != 0))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: BlockDiagonal(0), "size=0"),
        (lambda: BlockDiagonal(2.0), "size=2.0"),
        (lambda: RankTriangular(0), "rank=0"),
        (lambda: RankTriangular(True), "rank=True"),
        (lambda: RankTriangular(1, rows=1), "rows=1"),
        (lambda: RankTriangular(1, first="last"), "first='last'"),
        (lambda: Hierarchical(-1, 2), "top=-1"),
        (lambda: Hierarchical(2, "3"), "bottom='3'"),
        (lambda: Hierarchical(0, 0), "top=0 and bottom=0"),
        (lambda: BlockTriangular(Dense(), Diagonal(), 0), "split=0"),
        (lambda: BlockTriangular(Dense(), Diagonal(), 1.5), "split=1.5"),
        (lambda: BlockTriangular(Dense(), Diagonal(), 1, upper=None), "upper=None"),
        (lambda: BlockTriangular(Dense, Diagonal(), 1), "first=<class"),
        (lambda: DirectSum(Dense(), 3, 1), "second=3"),
        (lambda: Dense().matmul(torch.zeros(5), torch.zeros(2, 1)), r"\(5,\); expected \(..., 4\)"),
        (lambda: Dense().matmul(torch.zeros(4), torch.zeros(2)), r"X has shape \(2,\)"),
        (lambda: Dense().rmatmul(torch.zeros(4), torch.zeros(2, 1).double()), "X is torch.float64"),
        (lambda: Diagonal().multiply(torch.ones(2), torch.ones(3), 2), "diagonal matrix of size 2"),
        (lambda: LowerToeplitz().gram(torch.ones(3), 2), "lower Toeplitz matrix of size 2"),
        (lambda: LowerToeplitz().norm(torch.ones(3), 2), "lower Toeplitz matrix of size 2"),
        (lambda: DirectSum(Dense(), Dense(), 1).norm(torch.ones(3), 2), "of size 2"),
        (lambda: Dense().outer(torch.ones(3)), "U has shape"),
        (lambda: Dense().project(torch.ones(3, 2)), "M has shape"),
        (lambda: Dense().from_dense(torch.ones(3)), "M has shape"),
        (lambda: Dense().matrix(torch.ones(2, 4), 2), r"flat has shape \(2, 4\)"),
        (lambda: Dense().matrix(torch.ones(4, dtype=torch.complex64), 2), "complex64"),
        (lambda: Dense().matrix(torch.ones(4, dtype=torch.int64), 2), "int64"),
    ],
)
def test_refusals(make, said: str) -> None:
    with pytest.raises(OperandError, match=said):
        make()


def test_structures_are_values() -> None:
    assert Hierarchical(15, 15) == Hierarchical(15, 15) != Hierarchical(15, 14)
    assert LowerToeplitz() == LowerToeplitz() and len({Dense(), Dense(), Diagonal(), RankTriangular(2)}) == 3
    with pytest.raises(AttributeError):
        Hierarchical(1, 1).top = 2  # type: ignore[misc]
