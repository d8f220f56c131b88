"""φ-functions against the dense exponential of the augmented matrix, and against their series."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ritz
from ritz.errors import OperandError, SecondDerivativeError
from ritz.expint import phi_multiply
from ritz.expint.phi import Augmented

N = 25


def problem(hermitian: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    M = (torch.randn(N, N, dtype=dtype, generator=g) / 3).requires_grad_()
    vectors = [torch.randn(N, dtype=dtype, generator=g).requires_grad_() for _ in range(4)]
    return M, (M + M.mH) / 2 if hermitian else M * 1.0, vectors


def dense(S: Tensor, vectors: list[Tensor], t: Tensor) -> Tensor:
    n, p = S.shape[0], len(vectors) - 1
    wide = torch.promote_types(S.dtype, t.dtype)
    W = torch.stack(vectors[:0:-1], 1)
    J = torch.diag(torch.ones(p - 1, dtype=wide), 1)
    big = torch.cat([torch.cat([S, W], 1).to(wide), torch.cat([torch.zeros(p, n, dtype=wide), J], 1)])
    last = torch.eye(p, dtype=wide)[-1]
    return (torch.matrix_exp(t * big) @ torch.cat([vectors[0].to(wide), last]))[:n]


@pytest.mark.parametrize("hermitian", [True, False], ids=["Hermitian", "general"])
@pytest.mark.parametrize("t", [1.3, -0.7, 0.4 - 1.1j])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_against_dense(hermitian: bool, t: Any, dtype: torch.dtype) -> None:
    M, S, vectors = problem(hermitian, dtype)
    time = torch.tensor(t, dtype=torch.complex128 if isinstance(t, complex) else torch.float64, requires_grad=True)
    leaves = [M, time, *vectors]
    y = dense(S, vectors, time)
    found, info = phi_multiply(ritz.aslinearoperator(S, hermitian=hermitian), vectors, time, return_info=True)
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, y, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad((g.conj() * y).sum().real, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad((g.conj() * found).sum().real, leaves), expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-8
    assert info.num_matvecs > 0 and float(info.residual.max()) < 1e-9


@pytest.mark.parametrize("hermitian", [True, False], ids=["Hermitian", "general"])
def test_missing_vectors_and_several_problems(hermitian: bool) -> None:
    _, S, vectors = problem(hermitian)
    A = ritz.aslinearoperator(S.detach(), hermitian=hermitian)
    zero = torch.zeros(N, dtype=torch.float64)
    b = [v.detach() for v in vectors]
    alone = phi_multiply(A, [None, b[1], None, b[3]], 0.8)
    torch.testing.assert_close(
        alone, dense(S, [zero, b[1], zero, b[3]], torch.tensor(0.8, dtype=torch.float64)), rtol=1e-9, atol=1e-9
    )
    other = phi_multiply(A, [None, b[0], None, b[2]], 0.8)
    both = phi_multiply(A, [None, torch.stack(b[:2][::-1], 1), None, torch.stack(b[2:][::-1], 1)], 0.8)
    torch.testing.assert_close(both, torch.stack([alone, other], 1), rtol=1e-9, atol=1e-9)


def test_nilpotent_and_zero() -> None:
    b = torch.arange(1.0, 5.0, dtype=torch.float64)
    for A in (torch.zeros(4, 4, dtype=torch.float64), torch.diag(torch.ones(3, dtype=torch.float64), 1)):
        for j in range(4):
            series = sum(0.5 ** (i + j) / math.factorial(i + j) * torch.linalg.matrix_power(A, i) @ b for i in range(4))
            vectors = [None] * j + [b]
            operator = ritz.aslinearoperator(A, hermitian=False)
            torch.testing.assert_close(phi_multiply(operator, vectors, 0.5), series, rtol=1e-12, atol=1e-13)


def test_tiny_and_huge_vectors() -> None:
    _, S, vectors = problem(False)
    A = ritz.aslinearoperator(S.detach())
    for size in (1e-30, 1e30):
        b = [size * v.detach() for v in vectors]
        y = phi_multiply(A, b, 0.7)
        torch.testing.assert_close(
            y / size,
            dense(S, [v.detach() for v in vectors], torch.tensor(0.7, dtype=torch.float64)),
            rtol=1e-8,
            atol=1e-8,
        )


def test_augmented_operator() -> None:
    M, S, vectors = problem(False)
    W = torch.stack(vectors[1:], 1)
    A = Augmented(ritz.aslinearoperator(S), W)
    ritz.testing.check_operator(A)
    leaf = Augmented(ritz.aslinearoperator(M), W.detach().requires_grad_())
    ritz.testing.check_operator(leaf)


def test_refusals() -> None:
    _, S, vectors = problem(True)
    A = ritz.aslinearoperator(S)
    with pytest.raises(OperandError, match="came without vectors"):
        phi_multiply(A, [None, None], 1.0)
    with pytest.raises(OperandError, match="expected the same for all"):
        phi_multiply(A, [vectors[0], vectors[1].unsqueeze(1)], 1.0)
    with pytest.raises(OperandError, match="expected one time"):
        phi_multiply(A, vectors, torch.ones(2))
    (g,) = torch.autograd.grad(phi_multiply(A, vectors, 1.0).sum(), vectors[1], create_graph=True)
    with pytest.raises(SecondDerivativeError, match="differentiated twice"):
        g.sum().backward()


def test_a_time_too_long_for_one_space_goes_by_substeps() -> None:
    n = 60
    d = torch.linspace(0.0, 2000.0, n, dtype=torch.float64).requires_grad_()
    b0, b1 = (torch.cos((j + 1) * torch.arange(n, dtype=torch.float64)).requires_grad_() for j in range(2))
    A = ritz.operators.Diagonal(-d)
    method = ritz.Lanczos(rtol=1e-8, max_matvecs=36)
    y, info = phi_multiply(A, [b0, b1], 1.0, method=method, return_info=True, on_failure="raise")
    x = -d
    exact = (
        torch.exp(x) * b0 + torch.where(x == 0, torch.ones_like(x), torch.expm1(x) / torch.where(x == 0, -1.0, x)) * b1
    )
    torch.testing.assert_close(y, exact, rtol=1e-7, atol=1e-7)
    got, wanted = (torch.autograd.grad(out.square().sum(), [b0, b1]) for out in (y, exact))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    assert info.details["substeps"] > 1


def test_time_zero_has_a_slope() -> None:
    A = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b0, b1 = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    for M in (A, A + A.mT):
        y = phi_multiply(ritz.aslinearoperator(M), [b0, b1], t)
        torch.testing.assert_close(y, b0)
        (slope,) = torch.autograd.grad(y.sum(), t)
        torch.testing.assert_close(slope, (M @ b0 + b1).sum())
