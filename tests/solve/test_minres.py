"""MINRES: indefinite, singular and shared block products."""

import numpy as np
import pytest
import torch

import ritz
from ritz.result import Status
from ritz.solve import MINRES, solve
from ritz.solve.minres import iterate
from ritz.solve.system import System
from ritz.testing import problem

HERMITIAN = ("one_by_one", "spd_well", "indefinite", "repeated", "clustered", "identity_multiple", "complex_positive")
HERMITIAN += ("complex_indefinite", "laplacian_1d", "laplacian_2d", "laplacian_3d")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name", HERMITIAN)
def test_against_dense(name):
    p = problem(name)
    b = normal(p.n, 3, dtype=p.matrix.dtype)
    x, info = solve(p.matrix, b, method=MINRES(rtol=1e-9), return_info=True)
    expected = torch.linalg.solve(p.dense, b)
    residual = (b - p.dense @ x).norm(dim=0) / b.norm(dim=0)
    assert info.status is Status.CONVERGED
    assert float(residual.max()) <= 1e-9
    torch.testing.assert_close(info.residual, residual, rtol=0.1, atol=1e-12)
    assert float((x - expected).norm() / expected.norm()) <= 1e-9 * float(torch.linalg.cond(p.dense))


def test_residual_is_the_smallest_in_the_krylov_space():
    """The definition of the method: after m steps ‖b − A x‖ = min over the span of b, Ab, …, A^(m−1) b."""
    p = problem("indefinite")
    b = normal(p.n)
    powers = [b / b.norm()]
    for m in range(1, 6):
        AK = p.matrix @ torch.linalg.qr(torch.stack(powers, 1)).Q
        least = b - AK @ torch.linalg.lstsq(AK, b.unsqueeze(1)).solution.squeeze(1)
        x = solve(p.matrix, b, method=MINRES(max_steps=m), on_failure="ignore")
        assert float((b - p.matrix @ x).norm()) == pytest.approx(float(least.norm()), rel=1e-10)
        powers.append(p.matrix @ powers[-1] / (p.matrix @ powers[-1]).norm())


def test_products_are_one_a_step_and_one_to_check():
    A = ritz.Counting(ritz.aslinearoperator(problem("indefinite", n=60).matrix))
    _, info = solve(A, normal(60), method=MINRES(), return_info=True)
    assert A.num_matvecs == info.num_matvecs == info.depth + 1


def test_finished_columns_leave_the_block():
    d = torch.cat([torch.linspace(-50.0, -1.0, 30), torch.linspace(1.0, 40.0, 30)]).double()
    A = ritz.Counting(ritz.aslinearoperator(torch.diag(d)))
    b = normal(60, 2)
    b[:, 0] = 0.0
    b[7, 0] = 2.0
    _, info = solve(A, b, method=MINRES(), return_info=True)
    one, many = info.details["steps"]
    assert one == 1 and many > 10 and A.num_matvecs == one + many + 2


def test_singular_consistent_gives_the_smallest_solution():
    p = problem("rank_deficient")
    b = p.matrix @ normal(p.n, 2)
    x = solve(p.matrix, b, method=MINRES(rtol=1e-10))
    expected = torch.linalg.pinv(p.matrix) @ b
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)


def test_singular_inconsistent_stops_near_least_squares():
    p = problem("rank_deficient")
    b = normal(p.n, 2)
    x, info = solve(p.matrix, b, method=MINRES(), return_info=True, on_failure="ignore")
    least = b - p.matrix @ torch.linalg.pinv(p.matrix, rtol=1e-10) @ b
    assert info.status is Status.STAGNATED and info.depth < 20
    torch.testing.assert_close((b - p.matrix @ x).norm(dim=0), least.norm(dim=0), rtol=1e-6, atol=0.0)


def test_preconditioner_saves_products():
    n = 120
    scale = torch.logspace(0, 3, n, dtype=torch.float64)
    inner = problem("indefinite", n=n).matrix
    A = ritz.aslinearoperator(scale.unsqueeze(1) * inner * scale, hermitian=True)
    b = normal(n, 2)
    _, plain = solve(A, b, method=MINRES(), return_info=True, on_failure="ignore")
    P = lambda X: X / (scale**2).unsqueeze(1)
    x, better = solve(A, b, method=MINRES(), preconditioner=P, return_info=True)
    assert better.num_matvecs < 0.5 * plain.num_matvecs
    assert float(((b - A @ x).norm(dim=0) / b.norm(dim=0)).max()) <= 1e-6


def test_residual_norm_with_preconditioner_is_the_plain_one():
    """The stop is by ‖b − A x‖₂, although MINRES minimises in the norm of P⁻¹: one pass, no second start."""
    A = torch.diag(torch.logspace(0, 3, 50, dtype=torch.float64)) + problem("indefinite", n=50).matrix
    b = normal(50)
    P = lambda X: X / torch.logspace(0, 4, 50, dtype=torch.float64).unsqueeze(1)
    for rtol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        x, info = solve(A, b, method=MINRES(rtol=rtol), preconditioner=P, return_info=True)
        assert info.num_matvecs == info.depth + 1  # not too early
        limited = MINRES(rtol=rtol, max_steps=info.depth - 1)
        y, before = solve(A, b, method=limited, preconditioner=P, return_info=True, on_failure="ignore")
        assert float(before.residual) > rtol  # nor too late


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_right_hand_side_does_not_matter(scale):
    A = ritz.aslinearoperator(problem("indefinite").matrix.float(), hermitian=True)
    b = normal(16, 2).float()
    torch.testing.assert_close(
        solve(A, scale * b, method=MINRES()) / scale, solve(A, b, method=MINRES()), rtol=1e-3, atol=1e-4
    )


def test_residual_that_is_carried_along_is_the_true_one():
    A = torch.diag(torch.logspace(0, 3, 50, dtype=torch.float64)) + problem("indefinite", n=50).matrix
    b = normal(50, 2)
    R = b.clone()
    P = lambda X: X / torch.logspace(0, 4, 50, dtype=torch.float64).unsqueeze(1)
    done = iterate(System(lambda X: A @ X, P), R, np.zeros(2), 6)  # R is overwritten
    torch.testing.assert_close(R, b - A @ done.X, rtol=1e-9, atol=1e-9)


def test_preconditioner_must_be_definite():
    with pytest.raises(ritz.errors.DomainError, match="preconditioner is not positive definite"):
        solve(problem("indefinite").matrix, normal(16), method=MINRES(), preconditioner=lambda X: -X)
