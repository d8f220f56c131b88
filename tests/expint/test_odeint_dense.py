"""The solution as a function of time, and outputs between the steps."""

import math

import numpy as np
import pytest
import torch

import ritz
from ritz import Arnoldi, OperandError
from ritz.errors import SecondDerivativeError
from ritz.expint.interpolate import DenseOutput
from ritz.expint.odeint import odeint
from ritz.expint.steppers import ETDRK4, EXPRB43, EXPRB53, ExponentialEuler
from ritz.testing import check_gradient

from .systems import FORCE, Y0, A, D, N, by_scipy, driven, reference, relative, with_linear

INSIDE = tuple(np.linspace(0, 0.5, 52))
ORDERS = [
    (ExponentialEuler(), True, 1, [8, 16, 32]),
    (ExponentialEuler(), False, 2, [8, 16, 32]),
    (ETDRK4(), True, 4, [8, 12, 18]),
    (EXPRB43(), False, 4, [8, 12, 18]),
    (EXPRB53(), False, 5, [8, 12, 18]),
]


@pytest.mark.parametrize("method, linear, order, steps", ORDERS, ids=[f"{type(m).__name__}-{k}" for m, k, *_ in ORDERS])
def test_order_between_the_steps(method, linear, order, steps):
    """The largest error over times that are no ends of steps."""
    truth, errors = reference(driven, *INSIDE), []
    for number in steps:
        func, given = (driven, A) if linear else (with_linear(driven), None)
        solution = odeint(func, Y0, [0.0, 0.5], linear=given, method=method, num_steps=number, dense=True)
        rows = solution(torch.tensor(INSIDE, dtype=D))
        errors.append(float((rows - truth).norm(dim=1).max()))
    found = -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
    assert abs(found - order) < 0.2, errors


@pytest.mark.parametrize("krylov", [ritz.Auto(), Arnoldi(rtol=1e-12)], ids=["matrix", "krylov"])
def test_it_passes_through_the_steps(krylov):
    times = [0.0, 0.3, 0.5]
    solution, info = odeint(driven, Y0, times, linear=A, num_steps=2, dense=True, return_info=True, krylov=krylov)
    rows = odeint(driven, Y0, times, linear=A, num_steps=2, krylov=krylov)
    assert isinstance(solution, DenseOutput) and solution.steps == info.times == [0.15, 0.3, 0.4, 0.5]
    assert (solution.start, solution.end) == (0.0, 0.5) and "4 steps" in repr(solution)
    assert relative(solution(torch.tensor([0.5, 0.0, 0.3], dtype=D)), rows[[2, 0, 1]]) < 1e-10
    assert solution(0.3).shape == (N,) and relative(solution(0.3), rows[1]) < 1e-10


def test_outputs_of_adaptive_steps_lie_between_them():
    """The times do not change the steps, and the values there are as good as the ends."""
    times = tuple(np.linspace(0, 0.5, 11))
    y, info = odeint(driven, Y0, times, linear=A, rtol=1e-6, atol=1e-8, return_info=True)
    _, few = odeint(driven, Y0, [0.0, 0.5], linear=A, rtol=1e-6, atol=1e-8, return_info=True)
    assert few.times == info.times and not set(times[1:-1]) & set(info.times)
    assert relative(y, reference(driven, *times)) < 1e-6
    solution = odeint(driven, Y0, times, linear=A, rtol=1e-6, atol=1e-8, dense=True)
    assert relative(solution(torch.tensor(times, dtype=D)), y) < 1e-12


def test_backwards():
    there = reference(driven, 0.0, 0.2, 0.5)
    solution = odeint(with_linear(driven), there[-1], [0.5, 0.0], rtol=1e-7, atol=1e-9, dense=True)
    assert relative(solution(torch.tensor([0.2, 0.0, 0.5], dtype=D)), there[[1, 0, 2]]) < 1e-5


def test_linear_systems():
    solution = odeint(None, Y0, [1.0, 3.0], linear=A, dense=True)
    assert relative(solution(2.2), torch.matrix_exp(1.2 * A) @ Y0) < 1e-12
    # A stiff, oscillating part is exact between the steps too, however long they are.
    K = torch.tensor([[0.0, 300.0], [-300.0, 0.0]], dtype=D)
    f = lambda t, y: torch.ones(2, dtype=D)
    solution = odeint(
        f, torch.ones(2, dtype=D), [0.0, 1.0], linear=K, method=ExponentialEuler(), num_steps=1, dense=True
    )
    shift = torch.linalg.solve(K, torch.ones(2, dtype=D))
    assert relative(solution(0.777), torch.matrix_exp(0.777 * K) @ (1 + shift) - shift) < 1e-10


def test_gradients():
    def value(y, force, s):
        f = lambda t, u: torch.sin(3 * t) * force + torch.exp(-t) * torch.sin(u) * torch.roll(u, 1)
        return odeint(f, y, [0.0, 0.5], linear=A, num_steps=2, dense=True)(s)

    check_gradient(value, Y0, FORCE, torch.tensor([0.1, 0.31, 0.44], dtype=D), directions=2)
    s = torch.tensor(0.2, dtype=D, requires_grad=True)
    solution = odeint(driven, Y0, [0.0, 0.5], linear=A, rtol=1e-7, atol=1e-9, dense=True)
    (g,) = torch.autograd.grad(solution(s).sum(), s)
    rate = with_linear(driven)(s.detach(), solution(s.detach())).sum()
    assert float(g) == pytest.approx(float(rate), rel=1e-6)


def test_a_second_derivative_is_refused_with_krylov_spaces():
    s, y0 = torch.tensor(0.2, dtype=D, requires_grad=True), Y0.clone().requires_grad_()
    y = odeint(driven, y0, [0.0, 0.5], linear=A, num_steps=1, dense=True, krylov=Arnoldi())(s)
    (g,) = torch.autograd.grad(y.sum(), s, create_graph=True)
    for x in (s, y0):
        with pytest.raises(SecondDerivativeError):
            torch.autograd.grad(g, x, retain_graph=True)


def test_tuples_and_shapes():
    s0 = (torch.tensor([[0.3, 1.2]], dtype=D), torch.zeros(1, 2, dtype=D))
    solution = odeint(lambda t, s: (s[1], -torch.sin(s[0])), s0, [0.0, 1.0], num_steps=4, dense=True)
    q, p = solution(torch.tensor([0.5, 0.9, 0.1], dtype=D))
    assert q.shape == p.shape == (3, 1, 2)
    assert solution(0.5)[0].shape == (1, 2) and torch.equal(solution(0.5)[1], p[0])


def test_it_does_not_extrapolate():
    solution = odeint(driven, Y0, [0.0, 0.5], linear=A, num_steps=1, dense=True)
    for s in (-0.1, 0.6, torch.tensor([0.1, 0.500001])):
        with pytest.raises(OperandError, match="not extrapolated"):
            solution(s)
    for s in (torch.zeros(1, 1), 1j, "x"):
        with pytest.raises(OperandError):
            solution(s)
    with pytest.raises(OperandError, match="two"):
        odeint(driven, Y0, [0.0], linear=A, dense=True)


def test_a_solution_that_ends_early_is_there_up_to_its_end():
    with pytest.warns(ritz.ConvergenceWarning, match="max_steps"):
        solution = odeint(driven, Y0, [0.0, 0.5], linear=A, method=EXPRB43(max_steps=3), dense=True)
    assert 0 < solution.end < 0.5
    assert relative(solution(solution.end), by_scipy(with_linear(driven), Y0, (0.0, solution.end))[-1]) < 1e-6
    assert math.isfinite(float(solution(solution.end / 2).sum()))
