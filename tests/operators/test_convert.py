"""``aslinearoperator``: whatever a user has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ritz
from ritz.errors import AdjointUnavailableError, NonFiniteError, OperandError
from ritz.operators import Dense, FunctionOperator, Sparse
from ritz.testing import check_operator, problems


@pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
def test_market(p):
    A = ritz.aslinearoperator(p.matrix.clone().requires_grad_())
    assert A.shape == (p.n, p.n) and A.hermitian == p.hermitian
    check_operator(A)


def test_dispatch():
    dense = torch.randn(3, 3)
    assert isinstance(ritz.aslinearoperator(dense), Dense)
    assert isinstance(ritz.aslinearoperator(dense.numpy()), Dense)
    assert isinstance(ritz.aslinearoperator(dense.to_sparse_coo()), Sparse)
    assert isinstance(ritz.aslinearoperator(lambda x: x, shape=3), FunctionOperator)
    assert ritz.aslinearoperator(lambda x: x, shape=3).dtype == torch.get_default_dtype()
    assert ritz.aslinearoperator(torch.nn.Linear(3, 2, bias=False), shape=(2, 3)).shape == (2, 3)


def test_scipy_sparse():
    sparse = pytest.importorskip("scipy.sparse")
    for make in (sparse.csr_matrix, sparse.coo_array, sparse.csc_matrix, sparse.dia_matrix):
        M = make(np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 1.0]]))
        A = ritz.aslinearoperator(M)
        assert A.hermitian and A.dtype == torch.float64
        check_operator(A)
    A = ritz.aslinearoperator(sparse.csr_matrix(np.array([[1, 2], [0, 1]])))
    assert A.dtype == torch.float64 and A.hermitian is False


def test_scipy_operator():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    M = np.array([[2.0, 1.0j], [0.5, 3.0]])
    check_operator(ritz.aslinearoperator(linalg.aslinearoperator(M)))
    product_only = linalg.LinearOperator((2, 2), matvec=lambda x: M.real @ x, dtype=float)
    A = ritz.aslinearoperator(product_only)
    torch.testing.assert_close(A @ torch.ones(2, dtype=torch.float64), torch.tensor([2.0, 3.5], dtype=torch.float64))
    with pytest.raises(AdjointUnavailableError, match="SciPy"):
        A.mH @ torch.ones(2, dtype=torch.float64)
    check_operator(A)


def test_refusals():
    with pytest.raises(OperandError, match="without a shape"):
        ritz.aslinearoperator(lambda x: x)
    with pytest.raises(OperandError, match="cannot view a str"):
        ritz.aslinearoperator("A")
    with pytest.raises(OperandError, match="floating-point"):
        ritz.aslinearoperator(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(OperandError, match="2-D"):
        ritz.aslinearoperator(torch.ones(2))
    with pytest.raises(OperandError, match="2-D"):
        ritz.aslinearoperator(torch.ones(2, 2, 2))
    with pytest.raises(NonFiniteError, match="the matrix has 1 NaN or Inf among 4"):
        ritz.aslinearoperator(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]))
    with pytest.raises(OperandError, match="give it to aslinearoperator"):
        Dense(torch.eye(2).to_sparse_coo())


@pytest.mark.parametrize("option", ["shape", "dtype", "adjoint"])
def test_options_of_callables_are_refused_elsewhere(option):
    values = {"shape": 2, "dtype": torch.float32, "adjoint": lambda x: x}
    with pytest.raises(OperandError, match=option):
        ritz.aslinearoperator(torch.eye(2, dtype=torch.float64), **{option: values[option]})
