"""One run for all shifts: values on a grid, product counts, the fallback, and derivatives in the shifts."""

import pytest
import torch

import ritz
from ritz.result import Status
from ritz.solve import CG, MINRES, Direct, Jacobi, solve
from ritz.testing import laplacian_2d, problem

GRID = torch.logspace(-4, 4, 9, dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(A, b, shifts):
    eye = torch.eye(A.shape[0], dtype=A.dtype)
    return torch.stack([torch.linalg.solve(A + s * eye, b) for s in shifts])


@pytest.mark.parametrize(
    "name", ["spd_well", "spd_ill", "repeated", "complex_positive", "laplacian_2d", "rank_deficient"]
)
@pytest.mark.parametrize("method", [CG(rtol=1e-9), MINRES(rtol=1e-9), Direct()])
def test_against_dense_over_a_grid(name, method):
    p = problem(name)
    b = normal(p.n, 2, dtype=p.matrix.dtype)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    X, info = solve(ritz.aslinearoperator(p.matrix, psd=True), b, method=method, shifts=GRID[order], return_info=True)
    expected = dense(p.dense, b, GRID[order])
    assert X.shape == (9, p.n, 2) and info.residual.shape == (9, 2)
    assert info.status is Status.CONVERGED
    for i in range(9):
        residual = (b - (p.dense @ X[i] + GRID[order][i] * X[i])).norm(dim=0) / b.norm(dim=0)
        assert float(residual.max()) <= 1e-9
        torch.testing.assert_close(info.residual[i], residual, rtol=0.1, atol=1e-11)
        assert float((X[i] - expected[i]).norm() / expected[i].norm()) <= 1e-4


def test_vector_and_block_agree():
    A = ritz.aslinearoperator(problem("spd_well").matrix, psd=True)
    b = normal(16, 2)
    X = solve(A, b, method=CG(rtol=1e-12), shifts=GRID)
    x = solve(A, b[:, 1], method=CG(rtol=1e-12), shifts=GRID)
    assert x.shape == (9, 16) and solve(A, b[:, :0], method=CG(), shifts=GRID).shape == (9, 16, 0)
    torch.testing.assert_close(x, X[:, :, 1], rtol=1e-9, atol=1e-12)


def test_products_are_those_of_a_single_run():
    A = ritz.Counting(ritz.aslinearoperator(laplacian_2d(12), psd=True))
    b = normal(144)
    _, single = solve(A.shift(1e-3), b, method=CG(rtol=1e-8), return_info=True)
    shifts = (
        1e-3
        * torch.logspace(0, 5, 20, dtype=torch.float64)[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    )
    before = A.num_matvecs
    _, many = solve(A, b, method=CG(rtol=1e-8), shifts=shifts, return_info=True)
    # one product a step, as for the smallest shift alone, and one a shift for the recomputed residual
    assert many.details["steps of the shared run"] == single.depth
    assert many.num_matvecs == A.num_matvecs - before == single.depth + 20
    separate = sum(solve(A.shift(float(s)), b, method=CG(rtol=1e-8), return_info=True)[1].num_matvecs for s in shifts)
    assert many.num_matvecs < 0.5 * separate


def test_shifts_that_fail_their_check_are_continued():
    """float32 at condition 1e4 by shift: recurrences deceive themselves, residuals do not."""
    A = problem("spd_ill", n=200, condition=1e6).matrix.float()
    A = ritz.aslinearoperator(A, psd=True)
    shifts = torch.tensor([3e-3, 1e-1, 1.0])
    b = normal(200).float()
    X, info = solve(A, b, method=CG(rtol=1e-5), shifts=shifts, return_info=True, on_failure="ignore")
    assert info.depth > info.details["steps of the shared run"]
    for x, s, reported in zip(X, shifts, info.residual[:, 0]):
        x, D = x.double(), A.to_dense().double()
        true = float((b.double() - D @ x - float(s) * x).norm() / b.double().norm())
        assert true <= 3e-5 and float(reported) == pytest.approx(true, rel=0.5)


def test_an_indefinite_smallest_shift_does_not_spoil_the_others():
    p = problem("indefinite")
    b = normal(p.n)
    shifts = torch.tensor([0.0, 5.0, 8.0], dtype=torch.float64)
    X, info = solve(p.matrix, b, method=CG(), shifts=shifts, return_info=True, on_failure="ignore")
    assert info.details["status"] == (Status.NOT_POSITIVE, Status.CONVERGED, Status.CONVERGED)
    expected = dense(p.matrix, b, shifts)
    torch.testing.assert_close(X[1:], expected[1:], rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(X).all())


@pytest.mark.parametrize("method", [CG(rtol=1e-12), MINRES(rtol=1e-12), Direct()])
@pytest.mark.parametrize("name", ["spd_well", "complex_positive"])
def test_gradients_reach_matrix_right_hand_side_and_shifts(method, name):
    p = problem(name)
    weight = normal(4, p.n, 2, dtype=p.matrix.dtype, seed=5)
    start = (p.matrix, normal(p.n, 2, dtype=p.matrix.dtype), torch.tensor([0.3, 0.0, 2.0, 0.01], dtype=torch.float64))

    def gradients(run):
        leaves = [t.clone().requires_grad_() for t in start]
        loss = ((run(*leaves) * weight).abs() ** 2).sum()
        return torch.autograd.grad(loss, leaves)

    ours = gradients(lambda A, b, s: solve(ritz.aslinearoperator(A, psd=True), b, method=method, shifts=s))
    theirs = gradients(dense)
    for g, h in zip(ours, theirs):
        assert float((g - h).norm()) <= 1e-9 * float(h.norm())


def test_zero_columns_and_tiny_ones():
    A = ritz.aslinearoperator(problem("spd_well").matrix, psd=True)
    b = normal(16, 3)
    b[:, 0] = 0.0
    b[:, 1] *= 1e-30
    X = solve(A, b, method=CG(), shifts=GRID)
    assert torch.equal(X[:, :, 0], torch.zeros(9, 16, dtype=torch.float64))
    torch.testing.assert_close(X, dense(A.to_dense(), b, GRID), rtol=1e-4, atol=1e-36)


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"shifts": torch.tensor(1.0)}, "expected a real floating-point tensor"),
        ({"shifts": torch.tensor([1 + 1j])}, "expected a real floating-point tensor"),
        ({"shifts": [1.0], "preconditioner": Jacobi()}, "excludes preconditioner"),
        ({"shifts": [1.0], "x0": torch.zeros(16, dtype=torch.float64)}, "excludes preconditioner"),
    ],
)
def test_operands_are_checked(bad, words):
    with pytest.raises(ritz.errors.OperandError, match=words):
        solve(problem("spd_well").matrix, normal(16), method=CG(), **bad)


def test_nonsymmetric_shifts_are_refused():
    with pytest.raises(ritz.errors.OperandError, match="Hermitian"):
        solve(problem("nonsymmetric").matrix, normal(16), shifts=[1.0])
