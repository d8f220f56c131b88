"""Sparse operators: layouts, flags, gradients."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import ritz
from ritz.errors import NonFiniteError, OperandError
from ritz.operators import Sparse
from ritz.testing import check_operator, problem, problems

REAL, COMPLEX = torch.float64, torch.complex128


def random_sparse(n, m, dtype=REAL, seed=0, density=0.4):
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, m, dtype=dtype, generator=g)
    return dense * (torch.rand(n, m, generator=g) < density)


def parts(dense):
    csr = dense.to_sparse_csr()
    return csr.crow_indices(), csr.col_indices(), csr.values()


@pytest.mark.parametrize("dtype", [REAL, COMPLEX, torch.float32], ids=["real", "complex", "single"])
@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 3), (1, 1), (3, 1)])
def test_keeps_the_contract(shape, dtype):
    crow, col, values = parts(random_sparse(*shape, dtype=dtype))
    check_operator(Sparse(crow, col, values.requires_grad_(), shape))


@pytest.mark.parametrize("p", problems(sparse=True), ids=lambda p: p.name)
def test_market(p):
    A = ritz.aslinearoperator(p.matrix.clone().requires_grad_())
    assert A.hermitian == p.hermitian
    check_operator(A)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "uncoalesced"])
def test_layouts(layout):
    dense = random_sparse(4, 6)
    if layout == "uncoalesced":
        half = (dense / 2).to_sparse_coo()
        x = torch.sparse_coo_tensor(
            torch.cat([half.indices(), half.indices()], 1),
            torch.cat([half.values(), half.values()]),
            (4, 6),
        )
    else:
        x = dense.to_sparse_bsr((2, 2)) if layout == "bsr" else getattr(dense, f"to_sparse_{layout}")()
    torch.testing.assert_close(ritz.aslinearoperator(x).to_dense(), dense)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_gradient_comes_in_the_layout_of_the_leaf(layout):
    dense = random_sparse(4, 6)
    x = getattr(dense, f"to_sparse_{layout}")().requires_grad_()
    v = torch.ones(6, dtype=REAL)
    (ritz.aslinearoperator(x) @ v).square().sum().backward()
    assert x.grad.layout == x.layout
    expected = 2 * torch.outer(dense @ v, v) * (dense != 0)
    torch.testing.assert_close(x.grad.to_dense(), expected)


def test_trainable_in_other_layouts_is_refused():
    with pytest.raises(OperandError, match="convert it to COO or CSR"):
        ritz.aslinearoperator(random_sparse(4, 4).to_sparse_csc().requires_grad_())


def test_hermitian_is_read_off_exactly():
    M = random_sparse(6, 6)
    S = M + M.T
    assert Sparse(*parts(S), (6, 6)).hermitian is True
    assert Sparse(*parts(M), (6, 6)).hermitian is False
    off = S.clone()
    i, j = (S.triu(1) != 0).nonzero()[0]
    off[i, j] *= 1 + 1e-15
    assert Sparse(*parts(off), (6, 6)).hermitian is False
    C = random_sparse(6, 6, COMPLEX)
    assert Sparse(*parts(C + C.mH), (6, 6)).hermitian is True
    assert Sparse(*parts(C + C.mT), (6, 6)).hermitian is False


def test_hermitian_is_read_off_through_stored_zeros_and_unsorted_columns():
    crow, col = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1])
    assert Sparse(crow, col, torch.tensor([1.0, 0.0, 2.0]), (2, 2)).hermitian is True
    assert Sparse(crow, col, torch.tensor([1.0, 3.0, 2.0]), (2, 2)).hermitian is False
    crow, col = torch.tensor([0, 2, 4]), torch.tensor([1, 0, 0, 1])
    assert Sparse(crow, col, torch.tensor([5.0, 1.0, 5.0, 2.0]), (2, 2)).hermitian is True
    duplicated = Sparse(torch.tensor([0, 2, 3]), torch.tensor([1, 1, 0]), torch.tensor([1.0, 2.0, 3.0]), (2, 2))
    assert duplicated.hermitian is True


def test_products_follow_the_values_in_place():
    """Compressed copies are kept between products; a step of an optimiser must not go unnoticed."""
    crow, col, values = parts(random_sparse(5, 5))
    A = Sparse(crow, col, values, (5, 5))
    x = torch.ones(5, dtype=REAL)
    y, z = A @ x, A.mH @ x
    values.mul_(2)
    torch.testing.assert_close(A @ x, 2 * y)
    torch.testing.assert_close(A.mH @ x, 2 * z)


def test_columns_and_diagonal_of_a_rectangular_matrix():
    dense = random_sparse(4, 6)
    A = Sparse(*parts(dense), (4, 6))
    torch.testing.assert_close(A.diagonal(), dense.diagonal())
    torch.testing.assert_close(A.columns([5, 0]), dense[:, [5, 0]])


def test_refusals():
    crow, col, values = parts(random_sparse(4, 4))
    with pytest.raises(OperandError, match="CSR parts"):
        Sparse(crow[:-1], col, values, (4, 4))
    with pytest.raises(OperandError, match="CSR parts"):
        Sparse(crow, col, values[:-1], (4, 4))
    with pytest.raises(NonFiniteError):
        ritz.aslinearoperator(torch.sparse_csr_tensor(crow, col, values * float("nan"), (4, 4)))


def test_warning_filters_are_left_alone():
    """They belong to the process: another thread's filters must survive our use of CSR tensors."""
    p = problem("laplacian_2d")
    before = list(warnings.filters)
    errors = []

    def work():
        try:
            for _ in range(20):
                A = ritz.aslinearoperator(p.matrix)
                A @ torch.ones(p.n, 2, dtype=REAL)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == [] and list(warnings.filters) == before


def test_float16_and_bfloat16_pair():
    crow, col, values = parts(random_sparse(5, 5, torch.float32))
    values = values.bfloat16().requires_grad_()
    A = Sparse(crow, col, values, (5, 5), hermitian=False)
    (grad,) = A.pair(torch.ones(5, 2, dtype=torch.bfloat16), torch.ones(5, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(grad, torch.full_like(grad, 2.0))


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_trainable_leaf_serves_many_backward_passes_through_one_operator(layout):
    S = ritz.testing.problem("laplacian_1d", n=12).matrix.detach()
    S = (S.to_sparse_coo().coalesce() if layout == "coo" else S.clone()).requires_grad_()
    A = ritz.aslinearoperator(S, hermitian=True, psd=True)
    v = torch.linspace(1, 2, 12, dtype=torch.float64)
    gradients = []
    for _ in range(3):
        S.grad = None
        ritz.quadratic_form(ritz.functions.log, A, v, method=ritz.Lanczos(12)).backward()
        gradients.append(S.grad.to_dense())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=0)
    assert gradients[0].norm() > 1
