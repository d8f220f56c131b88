"""GMRES against dense solves and its definition: restarts, stagnation, singular systems, preconditioners, gradients."""

import pytest
import torch

import ritz
from ritz.errors import ConvergenceWarning, OperandError
from ritz.result import Status
from ritz.solve import GMRES, solve
from ritz.solve.gmres import _Cycle
from ritz.solve.system import System
from ritz.testing import problem

GENERAL = ("nonsymmetric", "nonsymmetric_nonnormal", "complex_general", "complex_symmetric")
NAMES = (*GENERAL, "one_by_one", "spd_well", "indefinite", "repeated", "identity_multiple", "complex_positive")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def well(n, seed=3, dtype=torch.float64):
    """Eigenvalues in a disk around 3: GMRES converges, and no symmetry helps."""
    return 3 * torch.eye(n, dtype=dtype) + normal(n, n, seed=seed, dtype=dtype) / n**0.5


@pytest.mark.parametrize("name", NAMES)
def test_against_dense(name):
    p = problem(name)
    b = normal(p.n, 3, dtype=p.matrix.dtype)
    x, info = solve(p.matrix, b, method=GMRES(rtol=1e-9, restart=p.n), return_info=True)
    expected = torch.linalg.solve(p.dense, b)
    residual = (b - p.dense @ x).norm(dim=0) / b.norm(dim=0)
    assert info.status is Status.CONVERGED and info.depth <= p.n + 1
    assert float(residual.max()) <= 1e-9
    torch.testing.assert_close(info.residual, residual, rtol=0.1, atol=1e-12)
    assert float((x - expected).norm() / expected.norm()) <= 1e-9 * float(torch.linalg.cond(p.dense))


def least(A, r, m):
    """Correction of smallest residual in the span of r, Ar, …, A^(m−1) r, by dense least squares."""
    powers = [r / r.norm()]
    for _ in range(m - 1):
        basis = torch.linalg.qr(torch.stack(powers, 1)).Q
        powers.append(A @ basis[:, -1])
    K = torch.linalg.qr(torch.stack(powers, 1)).Q
    return K @ torch.linalg.lstsq(A @ K, r.unsqueeze(1)).solution.squeeze(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("steps", "restart"), [(1, 30), (4, 30), (7, 7), (11, 4), (12, 3)])
def test_it_is_its_definition_restarts_included(steps, restart, dtype):
    A, b = well(40, dtype=dtype), normal(40, dtype=dtype)
    x = torch.zeros_like(b)
    for start in range(0, steps, restart):
        x = x + least(A, b - A @ x, min(restart, steps - start))
    got = solve(A, b, method=GMRES(rtol=0.0, max_steps=steps, restart=restart), on_failure="ignore")
    torch.testing.assert_close(got, x, rtol=1e-8, atol=1e-10)


def test_the_basis_stays_orthonormal_where_one_pass_loses_it():
    d = torch.logspace(-6, 6, 60, dtype=torch.float64)
    M = torch.diag(d) + torch.diag(torch.ones(59, dtype=torch.float64), 1)
    cycle = _Cycle(normal(60, 1), 40)
    for _ in range(40):
        cycle.extend(System(lambda X: M @ X))
    V = cycle._V[0, :41]
    torch.testing.assert_close(V @ V.mT, torch.eye(41, dtype=torch.float64), rtol=0.0, atol=1e-13)


def test_products_are_one_a_step_one_a_restart_and_one_to_check():
    A = ritz.Counting(ritz.aslinearoperator(well(200)))
    _, info = solve(A, normal(200), method=GMRES(rtol=1e-8), return_info=True)
    assert A.num_matvecs == info.num_matvecs == info.depth + 1 and info.depth < 30
    A = ritz.Counting(ritz.aslinearoperator(well(200)))
    _, info = solve(A, normal(200), method=GMRES(rtol=1e-8, restart=5), return_info=True)
    assert A.num_matvecs == info.depth + 1 + (info.depth - 1) // 5 and info.status is Status.CONVERGED


def test_finished_columns_leave_the_block():
    d = torch.linspace(1.0, 40.0, 60, dtype=torch.float64)
    M = torch.diag(d) + torch.diag(torch.ones(59, dtype=torch.float64), 1)
    b = normal(60, 2)
    b[:, 0] = 0.0
    b[0, 0] = 2.0  # an eigenvector
    A = ritz.Counting(ritz.aslinearoperator(M))
    x, info = solve(A, b, method=GMRES(restart=60), return_info=True)
    steps = info.details["steps"]
    assert steps[0] == 1 < steps[1] and A.num_matvecs == sum(steps) + 2
    torch.testing.assert_close(x[:, 0], b[:, 0])


def test_a_cycle_that_gains_nothing_ends_as_stagnated():
    shift = torch.roll(torch.eye(12, dtype=torch.float64), 1, 0)
    b = torch.zeros(12, dtype=torch.float64)
    b[0] = 1.0
    with pytest.warns(ConvergenceWarning, match="solve by GMRES"):
        x, info = solve(shift, b, method=GMRES(restart=5), return_info=True)
    assert info.status is Status.STAGNATED and info.depth == 5 and float(info.residual) == 1.0
    x, info = solve(shift, b, method=GMRES(restart=12), return_info=True)
    assert info.status is Status.CONVERGED and float((shift @ x - b).norm()) < 1e-12


def test_singular_systems():
    Q = torch.linalg.qr(normal(20, 20)).Q
    M = Q @ torch.diag(torch.cat([torch.zeros(3, dtype=torch.float64), torch.arange(1.0, 18.0).double()])) @ Q.mT
    M = M + 1e-300  # not known to be Hermitian
    A = ritz.aslinearoperator(M, hermitian=False)
    b = M @ normal(20)
    x, info = solve(A, b, method=GMRES(restart=20), return_info=True)
    assert info.status is Status.CONVERGED and float((M @ x - b).norm() / b.norm()) <= 1e-6
    outside = b + Q[:, 0]
    x, info = solve(A, outside, method=GMRES(restart=20), return_info=True, on_failure="ignore")
    assert info.status is Status.STAGNATED and bool(torch.isfinite(x).all())
    assert 0.99 < float((M @ x - outside).norm()) < 1.01  # 1 is the least there is, up to the rounding of M
    assert float(x.norm()) < 1e12
    zero, info = solve(torch.zeros(4, 4, dtype=torch.float64), normal(4), method=GMRES(), return_info=True,
                       on_failure="ignore")  # fmt: skip
    assert info.status is Status.STAGNATED and not bool(zero.any())


def test_preconditioners_stand_on_the_right_and_need_no_symmetry():
    n = 80
    d = torch.logspace(0, 5, n, dtype=torch.float64)
    M = torch.diag(d) + torch.triu(normal(n, n), 1) / n
    b = normal(n, 2)
    plain, info = solve(M, b, method=GMRES(), return_info=True, on_failure="ignore")
    better, fewer = solve(M, b, method=GMRES(), preconditioner=lambda X: X / d.unsqueeze(1), return_info=True)
    assert fewer.depth < 0.5 * info.depth
    residual = (b - M @ better).norm(dim=0) / b.norm(dim=0)
    torch.testing.assert_close(fewer.residual, residual, rtol=1e-3, atol=1e-14)  # that of the system itself
    exact, once = solve(M, b, method=GMRES(), preconditioner=lambda X: torch.linalg.solve(M, X), return_info=True)
    assert once.depth == 1 and float((M @ exact - b).norm()) < 1e-8


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_go_by_the_adjoint(dtype, preconditioned):
    A, b = well(30, dtype=dtype).requires_grad_(), normal(30, 2, dtype=dtype).requires_grad_()
    w, d = normal(30, 2, seed=9, dtype=dtype), A.detach().diagonal()
    options = {"preconditioner": lambda X: X / d.unsqueeze(1)} if preconditioned else {}
    x, info = solve(A, b, method=GMRES(rtol=1e-12, restart=7), return_info=True, **options)
    loss = (w.conj() * x).sum().real + x.abs().square().sum()
    got = torch.autograd.grad(loss, (A, b))
    y = torch.linalg.solve(A, b)
    expected = torch.autograd.grad((w.conj() * y).sum().real + y.abs().square().sum(), (A, b))
    for g, h in zip(got, expected):
        assert float((g - h).norm()) <= 1e-9 * float(h.norm())
    assert info.backward.status is Status.CONVERGED and info.backward.num_matvecs > 0


def test_callables_have_an_adjoint_by_their_vjp():
    M = well(30)
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    A = ritz.aslinearoperator(lambda X: M @ X + theta * X.roll(1, 0), shape=30, dtype=torch.float64, block=True)
    b = normal(30)
    value = solve(A, b, method=GMRES(rtol=1e-12)).square().sum()
    (got,) = torch.autograd.grad(value, theta)
    other = theta.detach().clone().requires_grad_()
    dense = M + other * torch.roll(torch.eye(30, dtype=torch.float64), 1, 0)
    (expected,) = torch.autograd.grad(torch.linalg.solve(dense, b).square().sum(), other)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_shifts_run_as_columns_of_their_own():
    A, b, sigma = well(25), normal(25, 2), torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64, requires_grad=True)
    x = solve(A, b, method=GMRES(rtol=1e-12), shifts=sigma)
    eye = torch.eye(25, dtype=torch.float64)
    expected = torch.stack([torch.linalg.solve(A + s * eye, b) for s in sigma])
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-11)
    (got,) = torch.autograd.grad(x.square().sum(), sigma, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), sigma)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_single_precision_and_scales_of_the_right_hand_side(scale):
    A, b = well(50).float(), normal(50, 2).float() * scale
    x, info = solve(A, b, method=GMRES(), return_info=True)
    assert info.status is Status.CONVERGED and float(info.residual.max()) <= 1e-4
    torch.testing.assert_close(x / scale, torch.linalg.solve(A, b / scale), rtol=1e-3, atol=1e-3)


def test_a_first_guess_helps():
    A, b = well(60), normal(60)
    x, info = solve(A, b, method=GMRES(), return_info=True)
    _, again = solve(A, b, method=GMRES(), x0=x + 1e-9 * normal(60), return_info=True)
    assert again.depth < info.depth


def test_settings_that_make_no_sense():
    for bad in (0, -1, 2.5):
        with pytest.raises(OperandError, match="GMRES\\(restart="):
            GMRES(restart=bad)
    with pytest.raises(OperandError, match="0 <= rtol < 1"):
        GMRES(rtol=1.0)
