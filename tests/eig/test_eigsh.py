"""Thick-restart Lanczos against dense eigenvalues, and its derivatives against autograd through dense eigh."""

from __future__ import annotations

import pytest
import torch

import ritz
from ritz.errors import ConvergenceError, ConvergenceWarning, OperandError
from ritz.testing import check_gradient

DOUBLE = {"dtype": torch.float64}


def symmetric(n: int, eigenvalues: torch.Tensor | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    M = torch.randn(n, n, generator=generator, dtype=dtype)
    if eigenvalues is None:
        return 0.5 * (M + M.mH)
    Q = torch.linalg.qr(M)[0]
    M = (Q * eigenvalues) @ Q.mH
    return 0.5 * (M + M.mH)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 5), (7, 2), (60, 4), (200, 10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
def test_extremal_pairs(which, block, n, k, dtype):
    A = symmetric(n, dtype=dtype)
    pairs, info = ritz.eigsh(A, k, which=which, block=min(block, n), return_info=True)
    exact = torch.linalg.eigvalsh(A)
    order = {"LA": -exact, "SA": exact, "LM": -exact.abs()}[which].argsort()[:k]
    tol = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(pairs.values, exact[order], rtol=tol, atol=tol)
    assert pairs.values.dtype == exact.dtype and pairs.vectors.dtype == dtype
    residual = torch.linalg.vector_norm(A @ pairs.vectors - pairs.vectors * pairs.values, dim=0)
    assert float(residual.max()) < 10 * tol * float(exact.abs().max())
    torch.testing.assert_close(pairs.vectors.mH @ pairs.vectors, torch.eye(k, dtype=dtype), rtol=0, atol=tol)
    assert info.status.success and info.num_matvecs > 0 and float(info.residual.max()) <= tol


@pytest.mark.parametrize("block", [1, 2, 5])
def test_repeated_and_clustered_eigenvalues(block):
    """More copies than a block has columns are found too, because directions that run out are drawn anew."""
    top = torch.tensor([4.0] * 5 + [3.999999] + [3.0, 3.0])
    A = symmetric(80, torch.cat([top, torch.linspace(0, 1, 72)]).double())
    values, V = ritz.eigsh(A, 8, block=block, rtol=1e-12)
    torch.testing.assert_close(values, top.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(V.mT @ V, torch.eye(8, **DOUBLE))


@pytest.mark.parametrize(
    "A", [torch.zeros(6, 6, **DOUBLE), torch.eye(6, **DOUBLE), torch.diag(torch.ones(6)).double() * 1e-200]
)
def test_degenerate_operators(A):
    values, V = ritz.eigsh(A, 3)
    torch.testing.assert_close(values, A.diagonal()[:3])
    torch.testing.assert_close(V.mT @ V, torch.eye(3, **DOUBLE))


def test_memory_is_the_basis_and_restarts_go_on():
    """1D Laplacian: eigenvalues crowd at the end that is asked for, so that one pass is not enough."""
    n = 400
    A = (
        torch.diag(2.0 * torch.ones(n, **DOUBLE))
        - torch.diag(torch.ones(n - 1, **DOUBLE), 1)
        - torch.diag(torch.ones(n - 1, **DOUBLE), -1)
    )
    pairs, info = ritz.eigsh(A, 3, basis=20, max_matvecs=20_000, return_info=True)
    exact = 2 - 2 * torch.cos(torch.arange(n, n - 3, -1, **DOUBLE) * torch.pi / (n + 1))
    torch.testing.assert_close(pairs.values, exact, rtol=1e-12, atol=0)
    assert info.details["restarts"] > 5 and info.depth == 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_gradients_are_those_of_dense_eigh(dtype, which):
    A = symmetric(12, torch.tensor([9, 7, 6, 5, -8, 1, 0.5, 0.3, -1, -2, -4, 2.5], **DOUBLE), dtype).requires_grad_()
    k, C = 3, symmetric(12, dtype=dtype)

    def loss(values: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        # |entries| do not see signs and phases
        return (values * torch.arange(1, k + 1, **DOUBLE)).sum() + (C.abs()[:, :k] * V.abs().square()).sum()

    got = torch.autograd.grad(loss(*ritz.eigsh(A, k, which=which, rtol=1e-13)), A)[0]
    w, U = torch.linalg.eigh(A)
    order = {"LA": -w, "SA": w, "LM": -w.abs()}[which].argsort()[:k]
    want = torch.autograd.grad(loss(w[order], U[:, order]), A)[0]
    torch.testing.assert_close(0.5 * (got + got.mH), 0.5 * (want + want.mH), rtol=1e-7, atol=1e-8)


def test_gradient_of_a_projector_with_a_repeated_eigenvalue():
    """What depends on the eigenspace alone is differentiable, though its vectors are not."""
    B = symmetric(10)
    A0 = symmetric(10, torch.tensor([5, 5, 5, 2, 1, 0, -1, -1, -2, -3], **DOUBLE))

    def energy(A: torch.Tensor) -> torch.Tensor:
        V = ritz.eigsh(0.5 * (A + A.mT), 3, block=3, rtol=1e-13).vectors
        return (V * (B @ V)).sum()

    check_gradient(energy, A0.requires_grad_(), rtol=1e-5)


def test_gradient_reaches_what_a_callable_closes_over():
    t = torch.tensor(0.7, requires_grad=True, **DOUBLE)
    M = symmetric(30)
    L = torch.ones(30, 30, **DOUBLE).triu() @ torch.ones(30, 30, **DOUBLE).tril()
    A = ritz.aslinearoperator(lambda x: M @ x + t * (L @ x), shape=(30, 30), dtype=torch.float64, hermitian=True)
    (g,) = torch.autograd.grad(ritz.eigsh(A, 2).values.sum(), t)
    V = torch.linalg.eigh(M + t.detach() * L)[1][:, -2:]
    torch.testing.assert_close(g, (V * (L @ V)).sum())


def test_bad_input_and_failures():
    A = symmetric(30)
    for call, message in [
        (lambda: ritz.eigsh(A, 0), "k=0; expected a number of pairs from 1 to n = 30"),
        (lambda: ritz.eigsh(A, 31), "k=31"),
        (lambda: ritz.eigsh(A, 2, which="largest"), "expected 'LA', 'SA' or 'LM'"),
        (lambda: ritz.eigsh(A, 2, block=0), "block=0"),
        (lambda: ritz.eigsh(torch.randn(4, 4), 2), "needs a Hermitian operator"),
        (lambda: ritz.eigsh(A, 2, v0=torch.ones(29, **DOUBLE)), r"v0 has shape \(29,\)"),
        (lambda: ritz.eigsh(torch.ones(3, 4), 2), "square"),
    ]:
        with pytest.raises(OperandError, match=message):
            call()
    with pytest.warns(ConvergenceWarning, match="eigsh"):
        pairs, info = ritz.eigsh(A, 4, basis=7, max_matvecs=8, return_info=True)
    assert not info.status.success and float(info.residual.max()) > 1e-9
    spread = torch.diag(torch.cat([torch.linspace(1e-3, 1e-2, 5), torch.linspace(1, 1e3, 200)]).double())
    _, info = ritz.eigsh(spread, 2, which="SA", rtol=1e-6, return_info=True)
    assert float(info.residual.max()) <= 1e-6  # relative to the largest that was seen, not to the smallest found
    with pytest.raises(ConvergenceError):
        ritz.eigsh(A, 4, basis=7, max_matvecs=8, on_failure="raise")
    assert ritz.eigsh(A, 1, v0=torch.ones(30, **DOUBLE)).values.shape == (1,)
