"""Singular triplets against the dense decomposition, and derivatives against autograd through it."""

import pytest
import torch

import ritz
from ritz.errors import OperandError

DOUBLE = {"dtype": torch.float64}


def matrix(m, n, dtype=torch.float64, values=None):
    M = torch.randn(m, n, generator=torch.Generator().manual_seed(m + n), dtype=dtype)
    if values is None:
        return M
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U * values.to(dtype)) @ Vh


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(30, 30, 4), (60, 20, 5), (20, 60, 5), (7, 3, 3), (1, 4, 1)])
def test_triplets(m, n, k, dtype):
    A = matrix(m, n, dtype)
    (U, S, Vh), info = ritz.svds(A, k, return_info=True)
    exact = torch.linalg.svdvals(A)[:k]
    tol = 1e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(S, exact, rtol=tol, atol=tol)
    assert U.shape == (m, k) and Vh.shape == (k, n) and info.status.success
    eye = torch.eye(k, dtype=dtype)
    torch.testing.assert_close(U.mH @ U, eye, rtol=0, atol=tol)
    torch.testing.assert_close(Vh @ Vh.mH, eye, rtol=0, atol=tol)
    torch.testing.assert_close(A @ Vh.mH, U * S, rtol=tol, atol=10 * tol)
    torch.testing.assert_close(A.mH @ U, Vh.mH * S, rtol=tol, atol=10 * tol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("m", "n"), [(25, 12), (12, 25)])
def test_derivatives_of_values_and_vectors(m, n, dtype):
    A = matrix(m, n, dtype, torch.linspace(5.0, 1.0, 12, **DOUBLE))
    w = matrix(n, 2, dtype)

    def loss(U, S, Vh):
        low_rank = (U * S) @ (Vh @ w)  # whatever the phases are
        return low_rank.abs().square().sum() + S.log().sum() + (Vh @ w).abs().square()[0].sum()

    one, other = A.clone().requires_grad_(), A.clone().requires_grad_()
    loss(*ritz.svds(one, 3, rtol=1e-13)).backward()
    U, S, Vh = torch.linalg.svd(other, full_matrices=False)
    loss(U[:, :3], S[:3], Vh[:3]).backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-8)


def test_matrices_of_lower_rank():
    A = matrix(20, 15, values=torch.cat([torch.tensor([3.0, 2.0]), torch.zeros(13)]).double())
    for M in (A, A.mT):
        leaf = M.clone().requires_grad_()
        U, S, Vh = ritz.svds(leaf, 4)
        torch.testing.assert_close(S.detach(), torch.tensor([3.0, 2.0, 0.0, 0.0], **DOUBLE), rtol=1e-9, atol=1e-12)
        for Q in (U, Vh.mT):
            torch.testing.assert_close(Q.mT @ Q, torch.eye(4, **DOUBLE), rtol=0, atol=1e-8)
        (grad,) = torch.autograd.grad(S.sum(), leaf)
        torch.testing.assert_close(grad, U[:, :2] @ Vh[:2], rtol=1e-6, atol=1e-8)
    U, S, Vh = ritz.svds(torch.zeros(6, 4, **DOUBLE), 2)
    assert not bool(S.any()) and float((U.mT @ U - torch.eye(2)).abs().max()) < 1e-12


def test_callables_and_what_is_refused():
    M = matrix(9, 6)
    A = ritz.aslinearoperator(lambda X: M @ X, shape=(9, 6), dtype=torch.float64, block=True)
    torch.testing.assert_close(ritz.svds(A, 2).S, torch.linalg.svdvals(M)[:2], rtol=1e-8, atol=1e-10)
    for k in (0, 7, 2.0):
        with pytest.raises(OperandError, match="expected a number of triplets from 1 to min\\(9, 6\\) = 6"):
            ritz.svds(M, k)
