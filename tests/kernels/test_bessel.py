"""log K_ν against mpmath's arithmetic of 30 digits, its derivatives, and the table that tiles read."""

import math

import mpmath
import pytest
import torch

from ritz.errors import OperandError
from ritz.kernels.bessel import log_bessel_k, log_power_bessel_k
from ritz.kernels.table import LARGEST, SMALLEST, LogTable

ORDERS = [0.0, 0.05, 0.5, 0.73, 1.0, 2.0, 3.3, 12.2, 25.0, 50.0, -1.7]
X = [*(10.0**e for e in range(-12, 5)), 0.37, 2.2, 7.7, 33.0, 123.0, 777.0]


def exact(nu, x):
    with mpmath.workdps(30):
        return float(mpmath.log(mpmath.besselk(nu, mpmath.mpf(x))))


@pytest.mark.parametrize("nu", ORDERS)
def test_log_bessel_k(nu):
    got = log_bessel_k(nu, torch.tensor(X, dtype=torch.float64))
    for g, x in zip(got.tolist(), X):
        want = exact(nu, x)
        assert abs(g - want) < 1e-15 * (100 + abs(want))
    single = log_bessel_k(nu, torch.tensor(X, dtype=torch.float32))
    torch.testing.assert_close(single, log_bessel_k(nu, torch.tensor(X).double()).float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("nu", [0.0, 0.3, 2.0, 7.5])
def test_derivatives(nu):
    x = torch.tensor([1e-3, 0.2, 1.0, 6.0, 80.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(log_bessel_k(nu, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    for v, g, h in zip(x.tolist(), first.tolist(), second.tolist()):
        with mpmath.workdps(40):
            v, step = mpmath.mpf(v), mpmath.mpf(v) * mpmath.mpf(10) ** -9
            below, at, above = (mpmath.log(mpmath.besselk(nu, v + i * step)) for i in (-1, 0, 1))
            want = float((above - below) / (2 * step)), float((above - 2 * at + below) / step**2)
        assert g == pytest.approx(want[0], rel=1e-12) and h == pytest.approx(want[1], rel=1e-8)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, on the first forward mode
def test_derivatives_under_torch_func():
    x = torch.tensor([0.2, 1.0, 6.0], dtype=torch.float64)
    f = lambda x: log_bessel_k(1.3, x)
    want = torch.autograd.functional.jacobian(f, x).diagonal()
    for transform in (torch.func.grad, lambda f: torch.func.jacfwd(f)):
        torch.testing.assert_close(torch.func.vmap(transform(f))(x), want)


def test_power_form_down_to_zero():
    # a^ν K_ν(a) → 2^{ν−1} Γ(ν)
    for nu in (0.2, 1.0, 3.5, 50.0):
        got = log_power_bessel_k(nu, torch.tensor([0.0, 1e-300], dtype=torch.float64))
        want = (nu - 1) * math.log(2) + math.lgamma(nu)
        assert got[0].item() == pytest.approx(want, rel=1e-14, abs=1e-14)
        assert got[1].item() == pytest.approx(want, rel=1e-14, abs=1e-14)


def test_shapes_and_arguments():
    assert log_bessel_k(1.0, torch.ones(0, 3)).shape == (0, 3)
    assert log_bessel_k(1.0, torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(OperandError, match="floating"):
        log_bessel_k(1.0, torch.ones(2, dtype=torch.long))
    with pytest.raises(OperandError, match="nu=nan"):
        log_bessel_k(math.nan, torch.ones(2))


def test_table_interpolates_to_rounding():
    functions = [lambda t: (1 + t).log(), lambda t: (1 + t).rsqrt()]
    table = LogTable(functions)
    t = torch.logspace(-35, 5.9, 5003, dtype=torch.float64)
    t = torch.cat([t, torch.tensor([SMALLEST, 1.0, LARGEST], dtype=torch.float64)])
    for i, f in enumerate(functions):
        torch.testing.assert_close(table(i, *table.locate(t)), f(t), rtol=0, atol=1e-13)
        single = t.float()
        torch.testing.assert_close(table(i, *table.locate(single)), f(single), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_outside_of_the_domain(bad):
    x = torch.tensor([1.0, bad], dtype=torch.float64)
    for call in (lambda x: log_bessel_k(0.5, x), torch.func.vmap(lambda x: log_bessel_k(0.5, x))):
        with pytest.raises(OperandError, match="1 entries .* the first is"):
            call(x)
