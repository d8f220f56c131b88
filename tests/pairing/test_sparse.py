"""Gradients of sparse matrices stay on their pattern."""

from __future__ import annotations

import pytest
import torch
from tests.pairing.common import DTYPES, REAL, N, randn, squared_norm
from torch import Tensor

import ritz
from ritz.operators import Sparse

BIG = 200_000  # a dense gradient would take 320 GB


def _bidiagonal_pattern(n: int) -> tuple[Tensor, Tensor, Tensor]:
    i = torch.arange(n)
    row = torch.cat([i, i[1:]])
    col = torch.cat([i, i[:-1]])
    order = torch.argsort(row * n + col)
    row, col = row[order], col[order]
    crow = torch.zeros(n + 1, dtype=torch.long)
    crow[1:] = torch.bincount(row, minlength=n).cumsum(0)
    return crow, row, col


@pytest.mark.parametrize("leaf", ["values", "computed values", "tensor"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_gradients_stay_on_the_pattern(layout, leaf):
    crow, row, col = _bidiagonal_pattern(BIG)
    values = randn(col.numel())
    theta = values.clone().requires_grad_(leaf != "tensor")
    entries = theta if leaf != "computed values" else theta * 2
    if layout == "coo":
        index = torch.stack([row, col])
        A = torch.sparse_coo_tensor(index, entries, (BIG, BIG), is_coalesced=True, check_invariants=False)
    else:
        A = torch.sparse_csr_tensor(crow, col, entries, (BIG, BIG), check_invariants=False)
    if leaf == "tensor":
        theta = A.detach().requires_grad_()
        A = theta
    v = randn(BIG, seed=1).requires_grad_()
    squared_norm(ritz.aslinearoperator(A, hermitian=False), v).backward()
    entries = values if leaf == "tensor" else entries.detach()
    y = torch.zeros(BIG, dtype=REAL).index_add(0, row, entries * v.detach()[col])
    want = 2 * y[row] * v.detach()[col] * (2 if leaf == "computed values" else 1)
    grad = theta.grad
    if leaf == "tensor":
        assert grad.layout == theta.layout
        grad = grad.coalesce().values() if layout == "coo" else grad.values()
    torch.testing.assert_close(grad, want)
    assert v.grad is not None and v.grad.shape == (BIG,)


def test_sparse_product_under_autograd_stays_on_the_pattern():
    crow, row, col = _bidiagonal_pattern(BIG)
    theta = randn(col.numel()).requires_grad_()
    A = Sparse(crow, col, theta, (BIG, BIG), hermitian=False)
    v = randn(BIG, seed=1)
    (A @ v).square().sum().backward()
    (A.mH @ v).square().sum().backward()
    assert theta.grad.shape == theta.shape


@DTYPES
def test_second_derivative_of_a_sparse_product(dtype):
    crow, row, col = _bidiagonal_pattern(N)
    values, v, w = (randn(k, seed=s, dtype=dtype).requires_grad_() for k, s in ((col.numel(), 0), (N, 1), (N, 2)))

    def run(adjoint, dense):
        A = Sparse(crow, col, values, (N, N), hermitian=False)
        y = (A.to_dense().mH if adjoint else A.to_dense()) @ v if dense else (A.mH if adjoint else A) @ v
        energy = ((y * y * w).sum() * w.conj().sum()).abs()
        first = torch.autograd.grad(energy, (values, v), create_graph=True)
        return torch.autograd.grad(sum((g.conj() * g).real.sum() for g in first), (values, v, w))

    for adjoint in (False, True):
        for got, want in zip(run(adjoint, False), run(adjoint, True)):
            torch.testing.assert_close(got, want)


def test_second_derivative_of_a_sparse_product_with_an_operand_made_from_its_values():
    """The engine does not stop at the operand: without care its part of the gradient counts twice."""
    values = randn(N).requires_grad_()

    def first(A, dense):
        x = values.square()
        y = dense @ x if dense is not None else A @ x
        return torch.autograd.grad(y.square().sum(), values, create_graph=True)[0]

    A = Sparse(torch.arange(N + 1), torch.arange(N).flip(0), values, (N, N), hermitian=False)
    torch.testing.assert_close(first(A, None), first(None, A.to_dense()))
    got = torch.autograd.grad(first(A, None).square().sum(), values)
    torch.testing.assert_close(got, torch.autograd.grad(first(None, A.to_dense()).square().sum(), values))
