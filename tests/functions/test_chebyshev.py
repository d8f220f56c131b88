"""Chebyshev expansions, with bounds and with estimated ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.functions.exponentials import TIMES, N, as_time, compare, problem

import ritz
from ritz.errors import DomainError, OperandError


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_chebyshev(t: Any, dtype: torch.dtype) -> None:
    M, S, v = problem(True, dtype)
    times = as_time(t)
    top = float(torch.linalg.eigvalsh(S.detach()).max())
    info = compare(S, [M, v, times], v, times, 1e-9, method=ritz.Chebyshev(bounds=(-0.1, 1.05 * top)))
    assert info.num_matvecs == v.shape[1] * (info.depth - 1)


def test_chebyshev_of_any_function() -> None:
    M, S, v = problem(True)
    S = S + torch.eye(N, dtype=torch.float64)
    top = float(torch.linalg.eigvalsh(S.detach()).max())
    A = ritz.aslinearoperator(S, hermitian=True)
    for f, f_dense in ((ritz.functions.log, torch.log), (ritz.functions.power(-0.3), lambda x: x**-0.3)):
        w, U = torch.linalg.eigh(S)
        y = U @ (f_dense(w).unsqueeze(1) * (U.mT @ v))
        found = ritz.funm_multiply(f, A, v, method=ritz.Chebyshev(bounds=(0.9, 1.1 * top)))
        assert float(((found - y).norm() / y.norm()).detach()) < 1e-9
        ours = torch.autograd.grad(found.sin().sum(), [M, v], retain_graph=True)
        for a, b in zip(ours, torch.autograd.grad(y.sin().sum(), [M, v], retain_graph=True)):
            assert float(((a - b).norm() / b.norm()).detach()) < 1e-8


def test_chebyshev_notices_wrong_bounds() -> None:
    _, S, v = problem(True)
    with pytest.raises(DomainError, match="an eigenvalue lies outside"):
        ritz.expm_multiply(ritz.aslinearoperator(S), v, -10.0, method=ritz.Chebyshev(bounds=(0.0, 5.0)))
    with pytest.raises(OperandError, match="expected a Hermitian operator"):
        ritz.expm_multiply(ritz.aslinearoperator(problem(False)[1]), v, method=ritz.Chebyshev(bounds=(0.0, 5.0)))
    with pytest.raises(OperandError, match="a < b"):
        ritz.Chebyshev(bounds=(2.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_chebyshev_estimates_its_bounds(dtype: torch.dtype) -> None:
    M, S, v = problem(True, dtype)
    eigenvalues = torch.linalg.eigvalsh(S.detach())
    for method in (ritz.Chebyshev(), ritz.Chebyshev(40)):
        y, info = ritz.expm_multiply(ritz.aslinearoperator(S), v, -1.0, method=method, return_info=True)
        low, high = info.method.bounds
        assert low <= eigenvalues[0] and high >= eigenvalues[-1]
        assert info.num_matvecs == 16 + v.shape[1] * (info.depth - 1)
        torch.testing.assert_close(y, torch.matrix_exp(-S) @ v, rtol=1e-8, atol=1e-8)
    eye = ritz.operators.Identity(5, dtype=dtype)
    y = ritz.funm_multiply(ritz.functions.exp, eye, torch.ones(5, dtype=dtype), method=ritz.Chebyshev(8))
    torch.testing.assert_close(y, torch.full((5,), math.e, dtype=dtype))
