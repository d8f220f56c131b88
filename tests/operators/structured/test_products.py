"""Memory whose rows start at whole cache lines, and products in it."""

from __future__ import annotations

import pytest
import torch

from ritz.operators.structured.products import aligned, aligned_product, empty_aligned, symmetric_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("columns", [3, 255, 256, 257, 1025])
def test_rows_of_large_matrices_start_at_cache_lines(columns, dtype):
    memory = empty_aligned(torch.empty(0, dtype=dtype), 5, columns)
    assert memory.shape == (5, columns) and memory.dtype == dtype and memory.stride(1) == 1
    if columns < 256:
        assert memory.is_contiguous()  # gaps would cost more than they save
    else:
        assert memory.stride(0) * dtype.itemsize % 64 == 0
        assert memory.stride(0) - columns < 64 // dtype.itemsize


def test_aligned_copies_only_where_that_helps():
    fits, odd, small = torch.randn(300, 320), torch.randn(300, 321), torch.randn(9, 9)
    assert aligned(fits) is fits and aligned(small) is small
    for M in (odd, odd.mT):
        copy = aligned(M)
        assert torch.equal(copy, M) and copy.data_ptr() != M.data_ptr() and max(copy.stride()) == 336
    recorded = torch.randn(300, 321, requires_grad=True)
    assert aligned(recorded) is recorded
    strided = odd[:, ::2]
    assert aligned(strided) is strided


@pytest.mark.parametrize("shape", [(300, 321, 290), (40, 30, 20), (2, 300, 321)])
def test_products(shape):
    n, k, m = shape
    A, B = torch.randn(n, k, dtype=torch.float64), torch.randn(k, m, dtype=torch.float64)
    torch.testing.assert_close(aligned_product(A, B), A @ B, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(aligned_product(B.mT, A.mT), (A @ B).mT, rtol=1e-12, atol=1e-12)
    pair = torch.stack([A, 2 * A])
    torch.testing.assert_close(aligned_product(pair, B), pair @ B, rtol=1e-12, atol=1e-12)
    leaf = A.clone().requires_grad_()
    (found,) = torch.autograd.grad(aligned_product(leaf, B).sum(), leaf)
    torch.testing.assert_close(found, torch.ones(n, m, dtype=torch.float64) @ B.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [511, 512, 513, 1025])
def test_symmetric_product(d):
    L = torch.randn(d, d, dtype=torch.float64)
    found = symmetric_product(L)
    torch.testing.assert_close(found, L @ L.mT, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found, found.mT, rtol=1e-12, atol=1e-11)
