"""Least squares against dense pseudo-inverses: values, gradients in everything, steps, bad input."""

import pytest
import torch

import ritz
from ritz.errors import ConvergenceWarning, NonFiniteError, OperandError, SecondDerivativeError
from ritz.result import Status
from ritz.solve import LSMR, lstsq

TIGHT = LSMR(rtol=1e-12, max_steps=2000)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix(m, n, dtype=torch.float64):
    U, _, Vh = torch.linalg.svd(normal(m, n, seed=m + n, dtype=dtype), full_matrices=False)
    return (U * torch.linspace(1.0, 5.0, min(m, n), dtype=torch.float64).to(dtype)) @ Vh


def dense(A, b, damp=0.0):
    """The minimiser by the pseudo-inverse of the damped problem."""
    n = A.shape[1]
    if not isinstance(damp, torch.Tensor) and damp == 0:
        return torch.linalg.pinv(A) @ b
    return torch.linalg.solve(A.mH @ A + damp**2 * torch.eye(n, dtype=A.dtype), A.mH @ b)


SHAPES = [(30, 12), (12, 12), (12, 30), (5, 1), (1, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.7])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_values(m, n, damp, dtype):
    A, b = matrix(m, n, dtype), normal(m, 3, dtype=dtype)
    x, info = lstsq(A, b, method=TIGHT, damp=damp, return_info=True)
    torch.testing.assert_close(x, dense(A, b, damp), rtol=1e-9, atol=1e-10)
    assert info.status is Status.CONVERGED
    residual = (A.mH @ (b - A @ x) - damp**2 * x).norm(dim=0) / (A.mH @ b).norm(dim=0)
    assert float(residual.max()) <= 1.1e-12
    torch.testing.assert_close(
        info.details["residual_norm"], (b - A @ x).norm(dim=0) / b.norm(dim=0), rtol=1e-6, atol=1e-12
    )
    assert lstsq(A, b[:, 0], damp=damp).shape == (n,) and lstsq(A, b[:, :0]).shape == (n, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.7])
@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.parametrize(("m", "n"), [(30, 12), (12, 12), (12, 30)])
def test_gradients(m, n, columns, damp, dtype):
    A, b = matrix(m, n, dtype).requires_grad_(), normal(m, *columns, dtype=dtype).requires_grad_()
    w = normal(n, *columns, seed=5, dtype=dtype)

    def loss(x):
        return (w.conj() * x).sum().real + (x.abs() ** 4).sum()

    x, info = lstsq(A, b, method=TIGHT, damp=damp, return_info=True)
    got = torch.autograd.grad(loss(x), (A, b))
    expected = torch.autograd.grad(loss(dense(A, b, damp)), (A, b))
    for g, h in zip(got, expected):
        assert float((g - h).norm()) <= 1e-8 * float(h.norm())
    assert info.backward.status is Status.CONVERGED and info.backward.num_matvecs > 0


def test_gradient_in_the_damping_and_through_callables():
    M, b, w = matrix(20, 8), normal(20), normal(8, seed=3)
    damp = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    A = ritz.aslinearoperator(lambda X: M @ (theta * X), shape=(20, 8), dtype=torch.float64, block=True)
    got = torch.autograd.grad(w @ lstsq(A, b, method=TIGHT, damp=damp), (damp, theta))
    expected = torch.autograd.grad(w @ dense(theta * M, b, damp), (damp, theta))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_hidden_tensors_go_the_slower_way():
    M, b, w = matrix(20, 8), normal(20), normal(8, seed=3)

    def check(m, n, P):
        theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        hidden = theta * P  # computed outside of the product, beside theta itself
        A = ritz.aslinearoperator(
            lambda X: hidden @ X + 0 * theta * (P @ X), shape=(m, n), dtype=torch.float64, block=True
        )
        c, v = b[:m], (w if n == 8 else normal(20, seed=4))
        (got,) = torch.autograd.grad(v @ lstsq(A, c, method=TIGHT), theta)
        (expected,) = torch.autograd.grad(v @ dense(theta * P, c), theta)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)

    check(20, 8, M)
    check(8, 20, M.mT)


def test_of_lower_rank_the_shortest_solution():
    M = matrix(20, 6) @ matrix(6, 10)
    b = normal(20, 2)
    x, info = lstsq(M, b, method=LSMR(rtol=1e-10), return_info=True)
    torch.testing.assert_close(x, torch.linalg.pinv(M, rtol=1e-10) @ b, rtol=1e-6, atol=1e-8)
    assert info.status is Status.CONVERGED


def test_the_normal_residual_is_the_smallest_in_the_krylov_space():
    A, b = matrix(30, 12), normal(30)
    powers = [A.mT @ b]
    for steps in range(1, 6):
        K = torch.linalg.qr(torch.stack(powers, 1)).Q
        y = torch.linalg.lstsq(A.mT @ A @ K, (A.mT @ b).unsqueeze(1)).solution
        x = lstsq(A, b, method=LSMR(rtol=0.0, max_steps=steps), on_failure="ignore")
        torch.testing.assert_close(x, (K @ y).squeeze(1), rtol=1e-7, atol=1e-9)
        powers.append(A.mT @ (A @ K[:, -1]))


def test_products_and_columns_that_leave():
    counted = ritz.Counting(ritz.aslinearoperator(matrix(30, 12)))
    b = normal(30, 2)
    b[:, 0] = 0.0
    x, info = lstsq(counted, b, return_info=True)
    steps = info.details["steps"]
    assert steps[0] == 0 < steps[1] and not bool(x[:, 0].any())
    assert counted.num_matvecs == info.num_matvecs
    # Two a step and one to start its recurrence; the normal right-hand sides of both, and two to check.
    assert info.num_matvecs == 2 * steps[1] + 1 + 2 + 2


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_single_precision_and_scales(scale):
    A, b = matrix(40, 15).float(), normal(40, 2).float()
    x, info = lstsq(A, b * scale, return_info=True)
    assert info.status is Status.CONVERGED
    torch.testing.assert_close(x / scale, dense(A, b), rtol=5e-3, atol=5e-3)


def test_what_was_missed_is_told_and_bad_input_refused():
    A, b = matrix(30, 12), normal(30)
    with pytest.warns(ConvergenceWarning, match="lstsq by LSMR.* at shape \\(30, 12\\)"):
        _, info = lstsq(A, b, method=LSMR(max_steps=2), return_info=True)
    assert info.status is Status.MAX_STEPS and info.depth == 2
    for options, error, words in (
        ({"b": normal(12)}, OperandError, r"b has shape \(12,\); expected \(30,\)"),
        ({"b": b / 0.0}, NonFiniteError, "b has 30 NaN or Inf"),
        ({"damp": -1.0}, OperandError, "damp=-1.0; expected one real number >= 0"),
        ({"damp": torch.ones(2)}, OperandError, "expected one real number"),
        ({"method": ritz.CG()}, OperandError, r"expected LSMR\(...\)"),
    ):
        with pytest.raises(error, match=words):
            lstsq(**{"A": A, "b": b} | options)
    leaf = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(lstsq(leaf, b).sum(), leaf, create_graph=True)
    with pytest.raises(SecondDerivativeError):
        grad.sum().backward()
