"""Defects that a review found in the newer solvers: sizes of A, transforms, adjoint preconditioners, reports."""

import pytest
import torch

import ritz
from ritz.errors import ConvergenceError, ConvergenceWarning, NonFiniteError
from ritz.result import Status
from ritz.solve import GMRES, LSMR, lstsq, solve

DOUBLE = {"dtype": torch.float64}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def well(n):
    return 3 * torch.eye(n, **DOUBLE) + normal(n, n, seed=3) / n**0.5


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-25), (torch.float32, 1e25), (torch.float64, 1e-170)])
@pytest.mark.parametrize(("m", "n"), [(12, 5), (5, 12)])
def test_least_squares_with_tiny_and_huge_operators(m, n, dtype, size):
    A, b = normal(m, n, dtype=dtype), normal(m, 2, dtype=dtype)
    x, info = lstsq(A * size, b * size, return_info=True)
    torch.testing.assert_close(x, torch.linalg.pinv(A.double()).to(dtype) @ b, rtol=2e-3, atol=2e-3)
    assert info.status is Status.CONVERGED


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_gradients_of_shortest_solutions_of_tiny_and_huge_right_hand_sides(size):
    A, b = normal(5, 12, dtype=torch.float32).requires_grad_(), normal(5, dtype=torch.float32)
    (got,) = torch.autograd.grad(lstsq(A, b * size, method=LSMR(rtol=1e-6)).sum() / size, A)
    B = A.detach().double().requires_grad_()
    (want,) = torch.autograd.grad((torch.linalg.pinv(B) @ b.double()).sum(), B)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_gmres_with_tiny_and_huge_operators(size):
    A, b = well(40).float() * size, normal(40).float()
    x, info = solve(A, b, method=GMRES(), return_info=True)
    _, plain = solve(A / size, b, method=GMRES(), return_info=True)
    assert info.status is Status.CONVERGED and info.depth == plain.depth > 3
    torch.testing.assert_close(x * size, torch.linalg.solve(A / size, b), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1e20])
def test_singular_values_of_tiny_and_huge_operators(size):
    A = normal(20, 8, dtype=torch.float32)
    U, S, Vh = ritz.svds(A * size, 3)
    torch.testing.assert_close(S / size, torch.linalg.svdvals(A)[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((U * (S / size)) @ Vh @ Vh.mT, A @ Vh.mT, rtol=1e-3, atol=1e-3)


def test_small_singular_values_are_as_good_as_rounding_allows():
    exact = 10.0 ** (-0.35 * torch.arange(20, **DOUBLE))
    Q, P = torch.linalg.qr(normal(40, 20))[0], torch.linalg.qr(normal(20, 20, seed=1))[0]
    U, S, Vh = ritz.svds((Q * exact) @ P.mT, 20)
    torch.testing.assert_close(S, exact, rtol=1e-6, atol=1e-14)
    for B in (U.mT @ U, Vh @ Vh.mT):
        torch.testing.assert_close(B, torch.eye(20, **DOUBLE), rtol=0, atol=1e-12)


def test_under_grad_of_torch_func():
    A, b = normal(12, 5), normal(12)
    square = well(12)
    for f, M in (
        (lambda M: lstsq(M, b).square().sum(), A),
        (lambda M: lstsq(M.mT @ M, b[:5], damp=0.1).square().sum(), A),
        (lambda M: solve(M, b, method=GMRES(rtol=1e-10)).square().sum(), square),
        (lambda M: ritz.svds(M, 2).S.sum(), A),
    ):
        leaf = M.clone().requires_grad_()
        (want,) = torch.autograd.grad(f(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(f)(M), want)
    torch.testing.assert_close(
        torch.func.grad(lambda c: lstsq(A, c).sum())(b), torch.linalg.pinv(A).sum(0), rtol=1e-5, atol=1e-6
    )


def test_products_that_return_expanded_tensors():
    A = ritz.aslinearoperator(lambda X: X.sum(0, keepdim=True), shape=(1, 6), dtype=torch.float64, block=True)
    torch.testing.assert_close(lstsq(A, torch.ones(1, **DOUBLE)), torch.full((6,), 1 / 6, **DOUBLE))


def test_the_backward_report_is_of_both_problems():
    Q, P = torch.linalg.qr(normal(60, 40))[0], torch.linalg.qr(normal(40, 40, seed=1))[0]
    A = ((Q * torch.logspace(0, -3, 40, **DOUBLE)) @ P.mT).requires_grad_()
    b = normal(60)
    x, info = lstsq(A, b, method=LSMR(rtol=1e-8, max_steps=4000), return_info=True)
    x.sum().backward()
    enough = info.backward.details["steps"][0]
    x, info = lstsq(A, b, method=LSMR(rtol=1e-8, max_steps=info.depth + 5), return_info=True)
    assert info.status is Status.CONVERGED and enough > info.depth
    short = LSMR(rtol=1e-8, max_steps=max(1, enough // 3))
    with pytest.raises(ConvergenceError):
        lstsq(A, b, method=short, on_failure="raise").sum().backward()


def test_a_preconditioner_goes_into_the_backward_solve_by_its_adjoint():
    n = 100
    M = (torch.triu(normal(n, n), 1) + torch.diag(torch.logspace(0, 2, n, **DOUBLE))).requires_grad_()
    L = M.detach()
    exact = lambda X: torch.linalg.solve(L, X)  # noqa: E731
    x, info = solve(M, normal(n), method=GMRES(rtol=1e-9), preconditioner=exact, return_info=True)
    x.sum().backward()
    assert info.depth == 1 and info.backward.depth == 1
    x, info = solve(M, normal(n), method=GMRES(rtol=1e-9, restart=n), preconditioner=lambda X: exact(X).detach(),
                    return_info=True)  # fmt: skip
    x.sum().backward()  # autograd does not see through it: without a preconditioner
    assert info.depth == 1 < info.backward.depth and info.backward.status is Status.CONVERGED
    with pytest.raises(NonFiniteError, match="the preconditioner's product has"):
        solve(L, normal(n), method=GMRES(), preconditioner=lambda X: X / 0.0)


def test_diagonals_and_reports_where_few_columns_are_all():
    M = normal(8, 8)
    for estimator in (ritz.XDiag(16), ritz.XDiag(40)):
        value, info = ritz.diagonal(M, estimator=estimator, return_info=True)
        torch.testing.assert_close(value, M.diagonal())
        assert not bool(info.standard_error.any())
    D = torch.diag(torch.cat([torch.logspace(3, 5, 4, **DOUBLE), torch.linspace(1e-4, 1, 96, **DOUBLE)]))
    method = ritz.Lanczos(rtol=1e-6, max_matvecs=12)
    with pytest.warns(ConvergenceWarning):
        _, info = ritz.trace(D, ritz.functions.sqrt, estimator=ritz.XTrace(8), method=method, return_info=True)
    assert not info.status.success and float(info.residual.max()) > 1e-6
    _, info = ritz.trace(M @ M.mT, estimator=ritz.XTrace(4), return_info=True)
    assert info.method == ritz.XTrace(4)
