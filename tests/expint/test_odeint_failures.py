import math
import warnings

import numpy as np
import pytest
import torch

import ritz
from ritz import Arnoldi, ConvergenceError, ConvergenceWarning, Lanczos, NonFiniteError, OperandError
from ritz.expint.odeint import odeint
from ritz.expint.steppers import ETDRK4, EXPRB43, EXPRB53, ExponentialEuler
from ritz.operators import Diagonal
from ritz.result import Status

from .systems import Y0, A, D, autonomous, driven, relative

ONE = torch.ones(1, dtype=D)
f = autonomous
WRONG = [
    ("neither func nor linear", {"func": None}),
    ("ETDRK4 came without linear", {"method": ETDRK4(), "num_steps": 2}),
    ("give num_steps=", {"method": ExponentialEuler()}),
    ("give num_steps=", {"method": ETDRK4(), "linear": A}),
    ("one or the other", {"num_steps": 2, "rtol": 1e-3}),
    ("num_steps=0", {"num_steps": 0}),
    ("num_steps=1.5", {"num_steps": 1.5}),
    ("rtol=2", {"rtol": 2}),
    ("rtol=0", {"rtol": 0.0}),
    ("atol=-1", {"atol": -1.0}),
    ("atol=nan", {"atol": math.nan}),
    ("method='dopri5'", {"method": "dopri5"}),
    ("on_failure", {"on_failure": "explode"}),
    ("strictly", {"t": [0.0, 1.0, 1.0]}),
    ("strictly", {"t": [0.0, 1.0, 0.5]}),
    ("t has shape", {"t": torch.zeros(2, 2)}),
    ("t has shape", {"t": torch.zeros(0)}),
    ("t is", {"t": torch.tensor([0j, 1 + 0j])}),
    ("y0 is torch.int64", {"y0": torch.arange(4)}),
    ("y0 is complex", {"y0": Y0 + 0j}),
    ("func returned shapes", {"func": lambda t, y: y[:2]}),
    ("func returned a float", {"func": lambda t, y: 1.0}),
    ("with keys .'b'.; expected those of y0, .'a'.", {"y0": {"a": Y0}, "func": lambda t, y: {"b": y["a"]}}),
    ("func returned a tuple of 1 where y0 has a tuple of 2", {"y0": (Y0, Y0), "func": lambda t, y: (y[0],)}),
    ("func returned a tuple of 1 where y0 has a Tensor", {"func": lambda t, y: (y,)}),
    ("func returned torch.float32", {"func": lambda t, y: y.float()}),
    ("linear is an operator of shape", {"linear": torch.eye(3, dtype=D)}),
    ("linear is an operator of shape", {"linear": torch.eye(4)}),
    ("does not linearise", {"linear": A, "method": ETDRK4(), "num_steps": 1, "jacobian": lambda t, y: A}),
    ("jacobian.t, y. is an operator of shape", {"jacobian": lambda t, y: torch.eye(3, dtype=D)}),
    ("differs from a difference quotient", {"jacobian": lambda t, y: torch.eye(4, dtype=D)}),
    ("depends on t where autograd does not see it", {"func": lambda t, y: y * math.sin(float(t.detach()))}),
    (
        "depends on y where autograd does not see it",
        {"func": lambda t, y: torch.from_numpy(np.sin(y.detach().numpy()))},
    ),
    ("gradient=3", {"gradient": 3}),
    ("krylov='lanczos'", {"krylov": "lanczos"}),
]


@pytest.mark.parametrize("words, change", WRONG, ids=[w for w, _ in WRONG])
def test_wrong_arguments(words, change):
    arguments = {"func": f, "y0": Y0, "t": [0.0, 1.0]} | change
    with pytest.raises(OperandError, match=words):
        odeint(arguments.pop("func"), arguments.pop("y0"), arguments.pop("t"), **arguments)


def test_not_finite_operands():
    with pytest.raises(NonFiniteError, match="y0"):
        odeint(f, Y0 * math.nan, [0.0, 1.0])
    with pytest.raises(NonFiniteError, match="t has"):
        odeint(f, Y0, [0.0, math.inf])


@pytest.mark.parametrize("num_steps", [None, 3])
def test_not_finite_from_the_start(num_steps):
    with pytest.raises(NonFiniteError, match=r"func\(t, y\) at t = 0 has 1 NaN"):
        odeint(lambda t, y: torch.log(y - 2), ONE, [0.0, 1.0], num_steps=num_steps)


def test_a_smaller_step_may_stay_inside_of_the_domain():
    """y' = −√y from 1: y = (1 − t/2)², which a long step would leave."""
    y = odeint(lambda t, y: -torch.sqrt(y), ONE, [0.0, 1.9], method=EXPRB43(first_step=1.9), rtol=1e-6)
    assert relative(y[-1], ONE * 0.05**2) < 1e-3


def test_not_finite_where_no_smaller_step_helps():
    def g(t, y):
        return torch.where(t < 0.5, -y, y * math.nan)

    with pytest.raises(NonFiniteError, match="cannot pass t = 0.5"):
        odeint(g, ONE, [0.0, 1.0])
    with pytest.raises(NonFiniteError, match="NaN"):
        odeint(g, ONE, [0.0, 1.0], num_steps=4)


def test_a_solution_that_ends():
    """y' = y²: infinite at t = 1."""
    times = [0.0, 0.5, 2.0]
    with pytest.warns(
        ConvergenceWarning, match=r"step size fell to .* at t = (1|1\.00\d*|0\.99\d*) .*values from there on are NaN"
    ):
        y, info = odeint(lambda t, y: y**2, ONE, times, rtol=1e-2, atol=1e-2, return_info=True)
    assert info.status is Status.STAGNATED and not info.status.success
    assert y[1].item() == pytest.approx(2, rel=0.05) and bool(torch.isnan(y[2]))
    y0 = ONE.clone().requires_grad_()
    options = {"method": EXPRB43(max_steps=40), "on_failure": "ignore", "checkpoints": 4}
    y = odeint(lambda t, y: y**2, y0, times, rtol=1e-2, atol=1e-2, **options)
    assert bool(torch.isnan(y[2]))
    (g,) = torch.autograd.grad(y[1].sum(), y0)
    assert float(g) == pytest.approx(4, rel=0.1)  # y(t) = y0/(1 − t y0)


def test_step_limit():
    method = EXPRB53(max_steps=3)
    with pytest.raises(ConvergenceError, match="max_steps = 3 were made"):
        odeint(driven, Y0, [0.0, 1.0], linear=A, method=method, on_failure="raise")
    with pytest.warns(ConvergenceWarning, match="3 steps accepted, 0 rejected by EXPRB53"):
        y, info = odeint(driven, Y0, [0.0, 1.0], linear=A, method=method, return_info=True)
    assert info.status is Status.MAX_STEPS and info.accepted == 3 and bool(torch.isnan(y[-1]).all())


def test_an_expanding_system_that_overflows():
    with pytest.raises((NonFiniteError, ritz.DomainError)):
        odeint(None, ONE, [0.0, 1000.0], linear=torch.eye(1, dtype=D))
    with pytest.raises((NonFiniteError, ritz.DomainError)):
        odeint(lambda t, y: 1000 * y, ONE, [0.0, 10.0], num_steps=1)


def test_krylov_spaces_that_miss_their_tolerance():
    """Fixed steps say so; adaptive ones become shorter."""
    n = 120
    grid = torch.arange(n, dtype=D)
    B = -400.0 * torch.diag(grid / n) + 50 * torch.diag(torch.ones(n - 1, dtype=D), 1)
    g, y0 = (lambda t, y: torch.sin(y)), torch.cos(grid)
    few = Arnoldi(max_matvecs=2, rtol=1e-12)
    with pytest.warns(ConvergenceWarning):
        _, info = odeint(g, y0, [0.0, 1.0], linear=B, num_steps=1, krylov=few, return_info=True)
    assert not info.status.success


def test_failures_of_small_krylov_spaces_reject_the_step(monkeypatch):
    """What a step does when a space misses: shorten, and say nothing."""
    from ritz.expint import products

    true, limit = products.phi_multiply, 0.2

    def short_sighted(J, vectors, **options):
        value, info = true(J, vectors, **options)
        if abs(J.scalar) > limit:
            info.status = Status.MAX_STEPS
            warnings.warn("missed", ConvergenceWarning, stacklevel=2)
        return value, info

    monkeypatch.setattr(products, "phi_multiply", short_sighted)
    method = EXPRB43(first_step=0.5)
    with warnings.catch_warnings(record=True) as said:
        y, info = odeint(f, Y0, [0.0, 0.5], linear=A, rtol=1e-3, krylov=Arnoldi(), method=method, return_info=True)
    assert not said
    assert info.rejected > 0 and info.status.success and np.diff([0, *info.times]).max() <= limit
    assert relative(y[-1], odeint(f, Y0, [0.0, 0.5], linear=A, rtol=1e-7)[-1]) < 1e-3


def test_warnings_of_the_backward_pass_are_not_swallowed():
    """The adaptive search holds back what its own products say, not what backward says."""
    y, g = Y0.clone().requires_grad_(), lambda t, u: u - u**3
    jacobian = lambda t, u: Diagonal(1 - 3 * u**2)
    gradient = ritz.Frechet(method=Lanczos(max_matvecs=1, rtol=1e-13))
    out = odeint(g, y, [0.0, 0.5], linear=A, jacobian=jacobian, rtol=1e-3, krylov=Lanczos(), gradient=gradient)
    with pytest.warns(ConvergenceWarning, match="backward"):
        out[-1].sum().backward()
