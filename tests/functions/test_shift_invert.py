"""e^{tA}v by shift-and-invert spaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.functions.exponentials import NASTY, N, as_time, compare, problem
from torch import Tensor

import ritz
from ritz.errors import ConvergenceError, DomainError, OperandError


def test_the_resolvent_of_a_matrix_far_from_normal_is_not_believed() -> None:
    v = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for n, error in ((30, ConvergenceError), (N, (ConvergenceError, DomainError))):
        A = ritz.aslinearoperator(NASTY["far from normal"][:n, :n].contiguous(), hermitian=False)
        with pytest.raises(error, match="stagnated|far from normal"):
            ritz.expm_multiply(A, v[:n], 1.0, method=ritz.ShiftInvert(), on_failure="raise")


def stiff(hermitian: bool) -> tuple[Tensor, Tensor, Tensor]:
    M, S, v = problem(True)
    turn = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    S = -300.0 * S
    return M, S if hermitian else S + (turn - turn.mT), v


@pytest.mark.parametrize("rule", [ritz.Frechet(), ritz.Adjoint()], ids=["Frechet", "Adjoint"])
@pytest.mark.parametrize("hermitian", [True, False], ids=["Hermitian", "general"])
@pytest.mark.parametrize("t", [1.0, [0.0, 0.3, 1.0]], ids=["one", "grid"])
def test_shift_invert(hermitian: bool, t: Any, rule: Any) -> None:
    M, S, v = stiff(hermitian)
    times = as_time(t)
    # The spaces of 40 vectors hold everything, which rule A refuses: a fixed depth before that.
    kind = ritz.Lanczos if hermitian else ritz.Arnoldi
    method = ritz.ShiftInvert(krylov=kind(34) if isinstance(rule, ritz.Adjoint) else None)
    info = compare(S, [M, v, times], v, times, 1e-8, method=method, gradient=rule)
    assert info.method == method and info.details["gamma"] == 0.1


def laplacian(n: int, values: Tensor) -> ritz.LinearOperator:
    """−D diag(values) Dᵀ of a path with fixed ends, sparse."""
    off = torch.arange(n - 1)
    row = torch.cat([torch.arange(n), off, off + 1])
    col = torch.cat([torch.arange(n), off + 1, off])
    entries = torch.cat([-(values[:-1] + values[1:]), values[1:-1], values[1:-1]])
    order = torch.argsort(row * n + col)
    crow = torch.zeros(n + 1, dtype=torch.long)
    crow[1:] = torch.bincount(row, minlength=n).cumsum(0)
    return ritz.operators.Sparse(crow, col[order], entries[order], (n, n), hermitian=True)


def test_auto_takes_the_resolvent_of_stiff_heat() -> None:
    n = 1000
    c = (1 + torch.rand(n + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    v = torch.sin(torch.linspace(0, 3, n, dtype=torch.float64)).requires_grad_()
    t = torch.tensor(1e4, dtype=torch.float64, requires_grad=True)
    A = laplacian(n, c)
    y, info = ritz.expm_multiply(A, v, t, return_info=True, on_failure="raise")
    assert isinstance(info.method, ritz.ShiftInvert) and info.depth < 40
    w, U = torch.linalg.eigh(A.to_dense())
    expected = U @ (torch.exp(t * w) * (U.mT @ v))
    assert float(((y - expected).norm() / expected.norm()).detach()) < 1e-8
    ours = torch.autograd.grad(y.square().sum(), [c, v, t], retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(expected.square().sum(), [c, v, t])):
        assert float(((a - b).norm() / b.norm()).detach()) < 1e-6
    mild, info = ritz.expm_multiply(A, v, 10.0, return_info=True)
    assert isinstance(info.method, ritz.Lanczos)
    assert isinstance(ritz.expm_multiply(A, v, -1e-3, return_info=True)[1].method, ritz.Lanczos)


def test_shift_invert_takes_a_solver_and_sums() -> None:
    n = 300
    A = laplacian(n, torch.ones(n + 1, dtype=torch.float64))
    v = torch.cos(torch.arange(n, dtype=torch.float64))
    shifted = 50.0 * A + ritz.operators.Diagonal(-torch.rand(n, dtype=torch.float64))
    expected = torch.matrix_exp(shifted.to_dense()) @ v

    def solver(A: Any, gamma: float) -> Any:
        M = torch.eye(n, dtype=torch.float64) - gamma * A.to_dense()
        return lambda X: torch.linalg.solve(M, X)

    for method in (ritz.ShiftInvert(), ritz.ShiftInvert(solver=solver), ritz.ShiftInvert(gamma=0.05)):
        torch.testing.assert_close(ritz.expm_multiply(shifted, v, method=method), expected, rtol=1e-7, atol=1e-9)


def test_shift_invert_refuses() -> None:
    _, S, v = stiff(True)
    A = ritz.aslinearoperator(S)
    for t in (1j, [-1.0, 1.0]):
        with pytest.raises(OperandError, match="expected real times of one sign"):
            ritz.expm_multiply(A, v, t, method=ritz.ShiftInvert())
    with pytest.raises(OperandError, match="cannot be unrolled"):
        ritz.expm_multiply(A, v, 1.0, method=ritz.ShiftInvert(), gradient=ritz.Unrolled())
    big = ritz.aslinearoperator(lambda x: -x, shape=3000, dtype=torch.float64, hermitian=True)
    with pytest.raises(OperandError, match="cannot factor"):
        ritz.expm_multiply(big, torch.ones(3000, dtype=torch.float64), 1.0, method=ritz.ShiftInvert())
    with pytest.raises(OperandError, match="expected .solve, solve_adjoint."):
        method = ritz.ShiftInvert(solver=lambda A, gamma: lambda X: X)
        ritz.expm_multiply(ritz.aslinearoperator(problem(False)[1]), v, 1.0, method=method)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_singular_resolvent_is_named(sparse: bool) -> None:
    M = torch.diag(torch.tensor([1.0, -1.0, -2.0], dtype=torch.float64))
    A = ritz.aslinearoperator(M.to_sparse_csr() if sparse else M)
    v = torch.ones(3, dtype=torch.float64)
    with pytest.raises(DomainError, match="singular at γ = 1: 1/γ is an eigenvalue"):
        ritz.expm_multiply(A, v, 1.0, method=ritz.ShiftInvert(gamma=1.0))
    torch.testing.assert_close(ritz.expm_multiply(A, v, 0.0, method=ritz.ShiftInvert()), v)
    for gamma in (float("nan"), 0.0, 1j):
        with pytest.raises(OperandError, match="gamma="):
            ritz.ShiftInvert(gamma=gamma)


def relative_to_dense(A: ritz.LinearOperator, v: Tensor, t: float, y: Tensor) -> float:
    w, U = torch.linalg.eigh(A.to_dense().detach())
    exact = U @ (torch.exp(t * w) * (U.mT @ v))
    return float((y.detach() - exact).norm() / exact.norm())


@pytest.mark.parametrize("stiffness", [1e4, 1e5, 1e6, 1e7])
def test_the_number_of_solves_does_not_grow_with_the_stiffness(stiffness: float) -> None:
    """Half of the line diffuses slowly, the other one as fast as the stiffness says."""
    n = 60
    scale = stiffness / 4
    values = scale * torch.ones(n + 1, dtype=torch.float64)
    values[: n // 2] *= 10 / scale  # slow and fast halves
    v = torch.sin(torch.linspace(0, 3, n, dtype=torch.float64))
    A = laplacian(n, values)
    y, info = ritz.expm_multiply(A, v, 1.0, method=ritz.ShiftInvert(), return_info=True, on_failure="raise")
    assert relative_to_dense(A, v, 1.0, y) < 1e-8
    assert info.depth <= 30


def test_a_solver_of_ones_own_inside_of_the_resolvent() -> None:
    n = 120
    c = (1 + torch.rand(n + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    v = torch.sin(torch.linspace(0, 3, n, dtype=torch.float64))
    A = 50.0 * laplacian(n, c)
    calls = []

    def by_conjugate_gradients(A: ritz.LinearOperator, gamma: float) -> Any:
        M = (ritz.operators.Identity(n, dtype=torch.float64) - gamma * A).declare(hermitian=True, psd=True)
        calls.append(gamma)
        return lambda X: ritz.solve(M, X, method=ritz.CG(rtol=1e-13))

    pair = lambda A, gamma: (by_conjugate_gradients(A, gamma),) * 2  # noqa: E731
    exact = torch.matrix_exp(A.to_dense()) @ v
    (wanted,) = torch.autograd.grad(exact.square().sum(), c, retain_graph=True)
    for solver in (by_conjugate_gradients, pair):
        y = ritz.expm_multiply(A, v, 1.0, method=ritz.ShiftInvert(solver=solver))
        (got,) = torch.autograd.grad(y.square().sum(), c, retain_graph=True)
        torch.testing.assert_close(y, exact, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    assert len(calls) == 2


def test_shift_invert_of_a_sparse_operator_that_is_not_hermitian() -> None:
    grid = ritz.expint.Grid((9, 8), border="dirichlet", spacing=0.1)
    c = torch.full((9, 8), 2.0, dtype=torch.float64, requires_grad=True)
    wind = torch.full((2, 9, 8), 3.0, dtype=torch.float64)
    A = ritz.expint.Diffusion(c, grid) - ritz.expint.Advection(list(wind), grid)
    v = torch.cos(torch.arange(72.0, dtype=torch.float64))
    y = ritz.expm_multiply(A, v, 0.1, method=ritz.ShiftInvert(), on_failure="raise")
    exact = torch.matrix_exp(0.1 * A.to_dense()) @ v
    torch.testing.assert_close(y, exact, rtol=1e-8, atol=1e-9)
    (got,), (wanted,) = (torch.autograd.grad(x.square().sum(), c) for x in (y, exact))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
