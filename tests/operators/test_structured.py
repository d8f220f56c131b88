"""Structured operators against the dense matrices they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ritz
from ritz.errors import NonFiniteError, OperandError
from ritz.operators import (
    BlockDiagonal,
    Conjugate,
    Counting,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Toeplitz,
    low_rank_update,
)
from ritz.pairing import Cotangents, Pair, Run
from ritz.testing import check_operator

REAL, COMPLEX = torch.float64, torch.complex128


class Draw:
    """Random tensors that require grad, from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype).requires_grad_()

    def hermitian(self, n: int) -> Tensor:
        G = self(n, n).detach()
        return (G + G.mH).requires_grad_()

    def real_corner(self, n: int) -> Tensor:
        c = self(n).detach()
        c[0] = 3.0
        return c.requires_grad_()

    def positive(self, n: int) -> Tensor:
        real = torch.zeros(1, dtype=self.dtype).real.dtype
        return (torch.rand(n, generator=self.generator, dtype=real) + 0.1).requires_grad_()

    def function(self, *shape: int) -> ritz.LinearOperator:
        """A callable that mishandles blocks, without an adjoint of its own."""
        W = self(*shape)
        return ritz.aslinearoperator(lambda x: x @ W.mT, shape=shape, dtype=self.dtype)


STRUCTURED = {
    "kronecker of one": lambda r: Kronecker(r(3, 2)),
    "kronecker": lambda r: Kronecker(r(2, 3), r(4, 2)),
    "kronecker of three": lambda r: Kronecker(r(2, 3), r(3, 1), r(2, 2)),
    "kronecker of square": lambda r: Kronecker(r(2, 2), r(3, 3)),
    "kronecker hermitian": lambda r: Kronecker(r.hermitian(2), Dense(r.hermitian(3))),
    "kronecker of callables": lambda r: Kronecker(r.function(2, 3), r(3, 3), r.function(2, 1)),
    "kronecker of structures": lambda r: Kronecker(LowRank(r(3, 1)), Toeplitz(r(3), r(2)).mH + r(2, 3)),
    "block diagonal": lambda r: BlockDiagonal([r(2, 3), r(1, 1), r(4, 2)]),
    "block diagonal square": lambda r: BlockDiagonal([r(2, 2), r.function(3, 3), Diagonal(r(2))]),
    "block diagonal hermitian": lambda r: BlockDiagonal([r.hermitian(2), r.hermitian(3)]),
    "block diagonal square in all": lambda r: BlockDiagonal([r(2, 3), r(3, 2)]),
    "low rank": lambda r: LowRank(r(5, 2)),
    "low rank rectangular": lambda r: LowRank(r(5, 2), r(3, 2)),
    "low rank diagonal core": lambda r: LowRank(r(4, 2), r(4, 2), r(2)),
    "low rank dense core": lambda r: LowRank(r(4, 2), None, r(2, 2)),
    "low rank hermitian core": lambda r: LowRank(r(4, 2), core=r.hermitian(2)),
    "low rank positive core": lambda r: LowRank(r(4, 2), core=r.positive(2)),
    "low rank wide": lambda r: LowRank(r(2, 4), r(3, 4)),
    "low-rank update": lambda r: low_rank_update(Dense(r(4, 4)), r(4, 2), r(4, 2)),
    "low-rank update psd": lambda r: low_rank_update(LowRank(r(4, 4)), r(4, 1)),
    "toeplitz": lambda r: Toeplitz(r(5), r(3)),
    "toeplitz wide": lambda r: Toeplitz(r(2), r(7)),
    "toeplitz square": lambda r: Toeplitz(r(6), r(6)),
    "toeplitz column": lambda r: Toeplitz(r(4), r(1)),
    "toeplitz row": lambda r: Toeplitz(r(1), r(4)),
    "toeplitz 1x1": lambda r: Toeplitz(r.real_corner(1)),
    "toeplitz hermitian": lambda r: Toeplitz(r.real_corner(5)),
    "toeplitz sizes of FFTs": lambda r: Toeplitz(r(11), r(13)),
    "all at once": lambda r: (
        0.5
        * Kronecker(Toeplitz(r(2), r(2)), BlockDiagonal([r(1, 1), r(1, 1)]))
        @ low_rank_update(r.function(4, 4), r(4, 1)).mH
    ),
}


@pytest.mark.parametrize("dtype", [REAL, COMPLEX, torch.float32], ids=["real", "complex", "single"])
@pytest.mark.parametrize("name", STRUCTURED)
def test_keeps_the_contract(name, dtype):
    check_operator(STRUCTURED[name](Draw(dtype)))


@pytest.mark.parametrize("name", STRUCTURED)
def test_without_gradients(name):
    A = STRUCTURED[name](Draw(REAL))
    with torch.no_grad():
        y = A @ torch.ones(A.shape[1], dtype=REAL)
    assert not y.requires_grad


@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
def test_equals_the_dense_matrix(dtype):
    r = Draw(dtype)
    A, B, C = r(2, 3), r(4, 2), r(1, 2)
    torch.testing.assert_close(Kronecker(A, B, C).to_dense(), torch.kron(torch.kron(A, B), C))
    torch.testing.assert_close(BlockDiagonal([A, B, C]).to_dense(), torch.block_diag(A, B, C))
    U, V, core = r(4, 2), r(3, 2), r(2)
    torch.testing.assert_close(LowRank(U, V, core).to_dense(), U @ torch.diag(core) @ V.mH)
    torch.testing.assert_close(LowRank(U).to_dense(), U @ U.mH)
    X = r(2, 3).detach()
    torch.testing.assert_close(Kronecker(A.mH, X) @ X.new_ones(6), torch.kron(A.mH.contiguous(), X) @ X.new_ones(6))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize("n, m", [(1, 1), (3, 5), (5, 3), (16, 16), (7, 1)])
def test_toeplitz_equals_scipys(dtype, n, m):
    linalg = pytest.importorskip("scipy.linalg")
    r = Draw(dtype)
    column, row = r(n).detach(), r(m).detach()
    expected = torch.from_numpy(linalg.toeplitz(column.numpy(), row.numpy()))
    torch.testing.assert_close(Toeplitz(column, row) @ torch.eye(m, dtype=dtype), expected)
    column = r.real_corner(n).detach()
    expected = torch.from_numpy(linalg.toeplitz(column.numpy()))
    torch.testing.assert_close(Toeplitz(column) @ torch.eye(n, dtype=dtype), expected)


def test_toeplitz_in_half_precision():
    column = torch.tensor([2.0, -1.0, 0.0, 0.5], dtype=torch.bfloat16)
    y = Toeplitz(column) @ torch.ones(4, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.tensor([1.5, 0.0, 0.0, 1.5]), rtol=1e-2, atol=1e-2)


def test_toeplitz_follows_a_change_of_its_column():
    """The transform is kept between products; a step of an optimiser must not go unnoticed."""
    column = torch.tensor([2.0, -1.0, 0.0], dtype=REAL)
    A = Toeplitz(column)
    x = torch.ones(3, dtype=REAL)
    A @ x
    column.mul_(2)
    torch.testing.assert_close(A @ x, 2 * torch.tensor([1.0, 0.0, 1.0], dtype=REAL))


def test_flags():
    r = Draw(REAL)
    psd, hermitian, general = LowRank(r(3, 2)), Dense(r.hermitian(3)), Dense(r(3, 3))
    assert (psd.hermitian, psd.psd) == (True, True)
    assert Kronecker(psd, psd).psd and BlockDiagonal([psd, psd]).psd
    assert Kronecker(psd, hermitian).hermitian and Kronecker(psd, hermitian).psd is None
    assert Kronecker(psd, general).hermitian is None
    assert BlockDiagonal([psd, hermitian]).hermitian and BlockDiagonal([psd, general]).hermitian is False
    assert low_rank_update(psd, r(3, 1)).psd and low_rank_update(hermitian, r(3, 1)).hermitian
    assert low_rank_update(psd, r(3, 1), r(3, 1)).hermitian is None
    assert LowRank(r(3, 2), core=-r.positive(2)).psd is None and LowRank(r(3, 2), core=-r.positive(2)).hermitian
    assert Toeplitz(r(3)).hermitian and Toeplitz(r(3), r(3)).hermitian is False
    column = r(3).detach()
    assert Toeplitz(column, column.clone()).hermitian


@pytest.mark.parametrize(
    "make",
    [
        lambda: Kronecker(),
        lambda: Kronecker(torch.ones(2, 2), torch.ones(2, 2, dtype=REAL)),
        lambda: BlockDiagonal([]),
        lambda: BlockDiagonal([torch.ones(2, 2), torch.ones(2, 2, dtype=REAL)]),
        lambda: LowRank(torch.ones(3)),
        lambda: LowRank(torch.ones(3, 2), torch.ones(3, 1)),
        lambda: LowRank(torch.ones(3, 2), core=torch.ones(3)),
        lambda: LowRank(torch.ones(3, 2), torch.ones(3, 2, dtype=REAL)),
        lambda: low_rank_update(Dense(torch.ones(3, 3)), torch.ones(2, 1)),
        lambda: Toeplitz(torch.ones(2, 2)),
        lambda: Toeplitz(torch.ones(0)),
        lambda: Toeplitz(torch.ones(2), torch.ones(2, dtype=REAL)),
        lambda: Toeplitz(torch.tensor([1j, 1.0])),
    ],
)
def test_refusals(make):
    with pytest.raises(OperandError):
        make()


@pytest.mark.parametrize(
    "make", [lambda x: LowRank(x), lambda x: LowRank(torch.ones(2, 1), core=x[0]), lambda x: Toeplitz(x[0])]
)
def test_not_finite(make):
    with pytest.raises(NonFiniteError):
        make(torch.full((1, 1), float("nan")))


def test_products_of_the_factors_are_what_the_docstring_says():
    r = Draw(REAL)
    A, B = Counting(Dense(r(2, 3))), Counting(Dense(r(4, 5)))
    K = Kronecker(A, B)
    K @ torch.ones(15, 7, dtype=REAL)
    assert A.num_forward == 7 * 5 and B.num_forward == 7 * 2  # A shrinks more (2/3 < 4/5): it goes first
    K.mH @ torch.ones(8, 7, dtype=REAL)
    assert B.num_adjoint == 7 * 2 and A.num_adjoint == 7 * 5
    K.pair(torch.ones(8, 1, dtype=REAL), torch.ones(15, 1, dtype=REAL))
    assert A.num_paired == 4 and B.num_paired == 2


def test_an_adjoint_of_callables_is_recorded_once():
    W, calls = torch.randn(3, 3, dtype=COMPLEX), []
    fn = lambda x: (calls.append(x.shape), W @ x)[1]
    A = ritz.aslinearoperator(fn, shape=3, dtype=COMPLEX, block=True)
    for B in (Kronecker(A, torch.eye(2, dtype=COMPLEX)), BlockDiagonal([A]), A + A, 2j * A, Conjugate(A), Counting(A)):
        adjoint = B.adjoint_product(2)
        calls.clear()
        for _ in range(3):
            adjoint(torch.ones(B.shape[0], 2, dtype=COMPLEX))
        assert calls == []


def test_large_sizes_stay_cheap():
    """Nothing of the size of the matrix appears: 10⁵ × 10⁵ here."""
    n = 100_000
    r = Draw(REAL)
    A = Toeplitz(r(n), r(n)) + LowRank(r(n, 2), r(n, 2)) + Kronecker(r(100, 100), Diagonal(r(n // 100)))
    v = torch.ones(n, 1, dtype=REAL)
    with Run(A) as run:
        y = run.matmat(v)
    (value,) = run.attach([y.square().sum()], lambda g: Cotangents([Pair(2 * g * y)], []), [v], name="square")
    value.backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in A.tensors())


def test_batches_are_block_diagonal():
    batch = torch.randn(4, 3, 3, dtype=REAL)
    x = torch.randn(4, 3, dtype=REAL)
    y = BlockDiagonal(list(batch)) @ x.reshape(-1)
    torch.testing.assert_close(y.reshape(4, 3), (batch @ x.unsqueeze(2)).squeeze(2))
