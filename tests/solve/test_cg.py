"""Conjugate gradients: values, per-column stopping, products, warm start, honest failure."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import ritz
from ritz.result import Status
from ritz.solve import CG, Jacobi, RandomlyPivotedCholesky, solve
from ritz.testing import laplacian_2d, problem, suitesparse

DEFINITE = ("one_by_one", "spd_well", "spd_ill", "repeated", "clustered", "identity_multiple", "hilbert")
DEFINITE += ("complex_positive", "laplacian_1d", "laplacian_2d", "laplacian_3d", "laplacian_coo")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def true_residual(A, x, b):
    dense = A.to_dense()
    return (b - dense @ x).norm(dim=0) / b.norm(dim=0)


@pytest.mark.parametrize("name", DEFINITE)
def test_against_dense(name):
    p = problem(name)
    b = normal(p.n, 3, dtype=p.matrix.dtype)
    condition = float(torch.linalg.cond(p.dense))
    rtol = max(1e-8, 1e-16 * condition)  # b − A x cannot be brought below about eps·‖A‖·‖x‖
    x, info = solve(p.matrix, b, method=CG(rtol=rtol, max_steps=5000), return_info=True)
    expected = torch.linalg.solve(p.dense, b)
    residual = true_residual(p.dense, x, b)
    assert info.status is Status.CONVERGED
    assert float(residual.max()) <= 1.1 * rtol
    torch.testing.assert_close(info.residual, residual.to(torch.float64), rtol=0.1, atol=0.1 * rtol)
    assert float((x - expected).norm() / expected.norm()) <= rtol * condition


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-6), (torch.complex128, 1e-6)])
def test_default_tolerance_by_dtype(dtype, bound):
    name = "complex_positive" if dtype.is_complex else "spd_well"
    A = problem(name, n=40, condition=50.0).matrix.to(dtype)
    b = normal(A.shape[0], 2, dtype=dtype)
    x, info = solve(ritz.aslinearoperator(A, psd=True), b, method=CG(), return_info=True)
    assert x.dtype == dtype and info.method.rtol == bound
    residual = true_residual(A.to(torch.complex128), x.to(torch.complex128), b.to(torch.complex128))
    assert float(residual.max()) <= 1.1 * bound
    assert float(residual.max()) > 1e-3 * bound  # and not far more than was asked for


def test_as_many_steps_as_scipy():
    A = suitesparse("1138_bus")
    S = scipy.sparse.csr_matrix((A.values().numpy(), A.col_indices().numpy(), A.crow_indices().numpy()), shape=A.shape)
    b = normal(A.shape[0])
    steps = []
    y, code = scipy.sparse.linalg.cg(S, b.numpy(), rtol=1e-6, maxiter=9000, callback=lambda _: steps.append(1))
    x, info = solve(A, b, method=CG(), return_info=True)
    assert code == 0 and info.status is Status.CONVERGED
    assert info.depth <= 1.1 * len(steps)
    np.testing.assert_allclose(x.numpy(), y, rtol=1e-2, atol=1e-3 * np.abs(y).max())


def test_products_are_one_a_step_and_one_to_check():
    A = ritz.Counting(ritz.aslinearoperator(laplacian_2d(10), psd=True))
    _, info = solve(A, normal(100), method=CG(), return_info=True)
    assert A.num_matvecs == info.num_matvecs == info.depth + 1


def test_finished_columns_leave_the_block():
    d = torch.linspace(1.0, 100.0, 60, dtype=torch.float64)
    A = ritz.Counting(ritz.aslinearoperator(torch.diag(d), psd=True))
    b = normal(60, 3)
    b[:, 0] = 0.0
    b[5, 0] = 1.0  # an eigenvector: one step
    b[:, 1] = 0.0
    b[[3, 50], 1] = 1.0  # two eigenvectors: two steps
    _, info = solve(A, b, method=CG(rtol=1e-8), return_info=True)
    one, two, many = info.details["steps"]
    assert (one, two) == (1, 2) and many > 10
    assert A.num_matvecs == one + two + many + 3


def test_tolerances_have_scipys_meaning():
    A = problem("spd_ill", n=30, condition=1e4).matrix
    b = 1e3 * normal(30)
    loose, info = solve(A, b, method=CG(rtol=1e-12, atol=1.0), return_info=True)
    assert 1e-3 < float((b - A @ loose).norm()) <= 1.0
    tight = solve(A, b, method=CG(rtol=1e-12, atol=1e-30))
    assert float((b - A @ tight).norm()) <= 1.1e-12 * float(b.norm())
    assert torch.equal(solve(A, b, method=CG(rtol=0.0, atol=1e6)), torch.zeros(30, dtype=torch.float64))


def test_warm_start_saves_products():
    A = ritz.aslinearoperator(laplacian_2d(12), psd=True)
    b = normal(144)
    x, cold = solve(A, b, method=CG(), return_info=True)
    near = x + 1e-4 * x.norm() * normal(144, seed=1) / 12
    y, warm = solve(A, b, method=CG(), x0=near, return_info=True)
    assert warm.num_matvecs < 0.8 * cold.num_matvecs
    assert float((b - A @ y).norm() / b.norm()) <= 1e-6
    again, done = solve(A, b, method=CG(), x0=x, return_info=True)
    assert done.num_matvecs == 1 and done.depth == 0
    torch.testing.assert_close(again, x, rtol=1e-12, atol=0.0)


def test_exact_preconditioner_needs_one_step():
    A = laplacian_2d(8)
    L = torch.linalg.cholesky(A.to_dense())
    P = lambda X: torch.cholesky_solve(X, L)
    _, info = solve(A, normal(64, 2), method=CG(rtol=1e-10), preconditioner=P, return_info=True)
    assert info.depth == 1 and info.num_matvecs == 4


@pytest.mark.parametrize("preconditioner", [Jacobi()])
def test_preconditioner_saves_products(preconditioner):
    A = suitesparse("1138_bus")
    b = normal(A.shape[0], 1)
    _, plain = solve(A, b, method=CG(), return_info=True)
    x, better = solve(A, b, method=CG(), preconditioner=preconditioner, return_info=True)
    assert better.num_matvecs < 0.5 * plain.num_matvecs
    assert float(true_residual(A, x, b).max()) <= 1e-6


def test_low_rank_preconditioner_saves_products():
    points = torch.linspace(0, 1, 300, dtype=torch.float64).unsqueeze(1)
    K = torch.exp(-0.5 * torch.cdist(points, points) ** 2 / 0.05**2)
    A = ritz.aslinearoperator(K, psd=True).shift(1e-3)
    b = normal(300)
    _, plain = solve(A, b, method=CG(), return_info=True)
    _, better = solve(A, b, method=CG(), preconditioner=RandomlyPivotedCholesky(40), return_info=True)
    assert better.depth <= 6 < plain.depth / 5


def test_every_claim_is_checked_by_a_product():
    """float32 at condition 1e3: the recurrence's residual goes on falling long after b − A x has stopped."""
    A = problem("spd_ill", n=200, condition=1e3).matrix.float()
    b = normal(200).float()
    A = ritz.aslinearoperator(A, psd=True)
    x, info = solve(A, b, method=CG(rtol=1e-8), return_info=True, on_failure="ignore")
    true = float(true_residual(A.to_dense().double(), x.double().unsqueeze(1), b.double().unsqueeze(1)))
    assert info.status is Status.STAGNATED
    assert true > 1e-8 and float(info.residual) == pytest.approx(true, rel=0.5)


@pytest.mark.parametrize("name", ["indefinite", "complex_indefinite"])
def test_indefinite_is_reported(name):
    p = problem(name)
    b = normal(p.n, 2, dtype=p.matrix.dtype)
    A = ritz.aslinearoperator(p.matrix, psd=True)  # a false promise
    with pytest.warns(ritz.errors.ConvergenceWarning, match="not positive definite.*MINRES"):
        x, info = solve(A, b, method=CG(), return_info=True)
    assert info.status is Status.NOT_POSITIVE
    assert bool(torch.isfinite(x.abs()).all())


@pytest.mark.parametrize("name", ["rank_deficient", "zero"])
def test_singular_and_inconsistent_stagnates(name):
    p = problem(name)
    x, info = solve(p.matrix, normal(p.n, 2), method=CG(), return_info=True, on_failure="ignore")
    assert info.status is Status.STAGNATED
    assert bool(torch.isfinite(x).all()) and float(info.residual.max()) <= 1.0


def test_singular_but_consistent_is_solved():
    p = problem("rank_deficient")
    b = p.matrix @ normal(p.n, 2)
    x, info = solve(p.matrix, b, method=CG(), return_info=True)
    expected = torch.linalg.pinv(p.matrix) @ b
    assert float((x - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_of_the_right_hand_side_does_not_matter(scale, dtype):
    A = problem("spd_well", n=30).matrix.to(dtype)
    A = ritz.aslinearoperator(A, psd=True)
    b = normal(30, 2).to(dtype)
    x, info = solve(A, scale * b, method=CG(), return_info=True)
    y, other = solve(A, b, method=CG(), return_info=True)
    assert info.depth == other.depth
    torch.testing.assert_close(x / scale, y, rtol=1e-3, atol=1e-4)


def test_zero_columns_cost_nothing():
    A = ritz.Counting(ritz.aslinearoperator(problem("spd_well").matrix, psd=True))
    with torch.no_grad():  # with gradients, one product looks for captured tensors
        x, info = solve(A, torch.zeros(16, 2, dtype=torch.float64), method=CG(), return_info=True)
    assert torch.equal(x, torch.zeros(16, 2, dtype=torch.float64))
    assert A.num_matvecs == 0 and info.depth == 0 and info.status is Status.CONVERGED
    b = normal(16, 3)
    b[:, 1] = 0.0
    mixed = solve(A, b, method=CG(rtol=1e-10))
    assert torch.equal(mixed[:, 1], torch.zeros(16, dtype=torch.float64))
    torch.testing.assert_close(mixed[:, [0, 2]], solve(A, b[:, [0, 2]], method=CG(rtol=1e-10)))


def test_defaults_of_the_step_limit():
    limit = lambda n: CG().resolve(ritz.operators.identity(n, dtype=torch.float64)).max_steps
    assert [limit(n) for n in (1, 10, 11, 1000, 10**6)] == [100, 100, 110, 10_000, 10_000]


@pytest.mark.parametrize("settings", [{"rtol": -1e-3}, {"rtol": 1.0}, {"atol": -1.0}, {"max_steps": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ritz.errors.OperandError, match="CG"):
        CG(**settings)


def test_indefinite_preconditioner_is_refused():
    with pytest.raises(ritz.errors.DomainError, match="preconditioner is not positive definite"):
        solve(problem("spd_well").matrix, normal(16), method=CG(), preconditioner=lambda X: -X)
