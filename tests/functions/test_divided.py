"""Divided differences against 60-digit arithmetic, at every gap from exact ties to order one."""

import mpmath
import pytest
import torch

from ritz import functions as F
from ritz.errors import DomainError
from ritz.functions.divided import derivative, divided_difference
from ritz.functions.scalar import Exp, Phi, as_function

mpmath.mp.dps = 60
GAPS = (0.0, 1e-16, 1e-14, 1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 1.0)


def mp_phi(j, z):
    if abs(z) > 1:
        total = mpmath.exp(z)
        for i in range(j):
            total = (total - 1 / mpmath.factorial(i)) / z
        return total
    return mpmath.nsum(lambda i: z**i / mpmath.factorial(i + j), [0, 60])


def mp_phi_sum(j, z):
    return sum(mpmath.mpf(z) ** i / mpmath.factorial(i + j) for i in range(80)) if abs(z) <= 20 else mp_phi(j, z)


REAL = (-30.0, -2.0, -1e-3, 0.0, 1e-3, 0.7, 3.0, 30.0)
POSITIVE = (1e-30, 1e-8, 0.3, 1.0, 7.0, 1e8, 1e30)
#        function of ritz, the same in mpmath, points, tolerance
CASES = {
    "exp": (F.exp, mpmath.exp, (*REAL, -700.0, 700.0), 1e-13),
    "exp(-3x)": (Exp(-3.0), lambda x: mpmath.exp(-3 * x), REAL, 1e-13),
    "log": (F.log, mpmath.log, (*POSITIVE, 1e-300, 1e300), 1e-14),
    "sqrt": (F.sqrt, mpmath.sqrt, (*POSITIVE, 1e-300, 1e300), 1e-14),
    "rsqrt": (F.rsqrt, lambda x: 1 / mpmath.sqrt(x), (*POSITIVE, 1e-100, 1e100), 1e-14),
    "inverse": (F.inverse, lambda x: 1 / x, (-5.0, -1e-8, *POSITIVE, 1e-100, 1e100), 1e-14),
    "power(0)": (F.power(0), lambda x: x**0, REAL, 1e-14),
    "power(1)": (F.power(1), lambda x: x, REAL, 1e-14),
    "power(5)": (F.power(5), lambda x: x**5, REAL, 1e-13),
    "power(-2)": (F.power(-2), lambda x: x**-2, (-5.0, -1e-8, *POSITIVE, 1e-90, 1e90), 1e-13),
    "power(40)": (F.power(40), lambda x: x**40, (-3.0, 0.2, 1.0, 3.0), 1e-12),
    "power(2.5)": (F.power(2.5), lambda x: x ** mpmath.mpf(2.5), (*POSITIVE, 1e-100, 1e100), 1e-12),
    "power(-0.3)": (F.power(-0.3), lambda x: x ** mpmath.mpf(-0.3), (*POSITIVE, 1e-200, 1e200), 1e-12),
    "phi(0)": (F.phi(0), mpmath.exp, REAL, 1e-12),
    "phi(1)": (F.phi(1), lambda x: mp_phi_sum(1, x), REAL, 1e-12),
    "phi(3)": (F.phi(3), lambda x: mp_phi_sum(3, x), REAL, 1e-12),
    "phi(9)": (F.phi(9), lambda x: mp_phi_sum(9, x), REAL, 1e-12),
    "sin": (torch.sin, mpmath.sin, (-2.0, -1e-3, 0.0, 1e-9, 0.3, 20.0), 1e-12),
    "exp(-x²)": (lambda x: torch.exp(-x * x), lambda x: mpmath.exp(-x * x), (-2.0, -1e-6, 1e-9, 0.3, 1.5, 5.0), 1e-12),
    "x log x": (lambda x: x * torch.log(x), lambda x: x * mpmath.log(x), (1e-20, 1e-8, 0.3, 5.0, 1e8), 1e-12),
    "log as a callable": (lambda x: torch.log(x), mpmath.log, POSITIVE, 1e-12),
    "constant": (lambda x: 3 * torch.ones_like(x), lambda x: mpmath.mpf(3), REAL, 1e-14),
    "identity": (lambda x: x, lambda x: x, REAL, 1e-14),
}


def mp_divided(f, a, b):
    with mpmath.workdps(90):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        if a == b:
            h = abs(a) * mpmath.mpf(10) ** -25 if a else mpmath.mpf(10) ** -72  # central difference
            a, b = a + h, b - h
        return (f(a) - f(b)) / (a - b)


def pairs(points):
    """Every point with partners at relative gaps on both sides, and with absolute ones around zero."""
    for x in points:
        for gap in GAPS:
            for sign in (1, -1):
                step = gap * (abs(x) if x else 1e-3)
                yield x, x + sign * 0.9 * step


@pytest.mark.parametrize("case", CASES)
def test_against_many_digits(case):
    f, reference, points, tol = CASES[case]
    f = as_function(f)
    positive = all(p > 0 for p in points)
    some = [(a, b) for a, b in pairs(points) if not positive or b > 0]
    if case.startswith(("inverse", "power(-2)")):
        some = [(a, b) for a, b in some if b != 0 and a * b > 0 or abs(a - b) > abs(a)]
    a, b = (torch.tensor(x, dtype=torch.float64) for x in zip(*some, strict=True))
    found = f.divided_difference(a, b)
    for x, y, d in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        true = mp_divided(reference, x, y)
        if abs(true) > 1.7e308:
            assert abs(d) == float("inf")
            continue
        # a sum that truly cancels (odd parts of f at −x and x) is measured against its terms
        terms = max(abs(true), abs(mp_divided(reference, x, x)) * (1 if x * y > 0 else 0), mpmath.mpf(1e-270))
        assert abs(d - true) <= tol * terms, f"f[{x}, {y}] = {d}, expected {mpmath.nstr(true, 17)}"
    torch.testing.assert_close(found, f.divided_difference(b, a), rtol=tol, atol=0)  # symmetric


@pytest.mark.parametrize("case", ["exp", "log", "sqrt", "inverse", "power(2.5)", "phi(1)", "exp(-x²)"])
def test_far_apart(case):
    """Pairs of points of one sign, many magnitudes apart: no overflow on the way to a finite result."""
    f, reference, points, tol = CASES[case]
    f = as_function(f)
    points = [p for p in points if abs(p) < 1e150]
    for x in points:
        for y in points:
            found = float(
                f.divided_difference(torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64))
            )
            true = mp_divided(reference, x, y)
            assert abs(found - true) <= 1e-11 * max(abs(true), mpmath.mpf(1e-300)), (x, y, found, true)


@pytest.mark.parametrize(
    ("z", "w"), [(0.3 + 1j, 0.3 + 1j), (1 + 2j, 1 + 2.0001j), (-2000j, 3j), (5 - 1j, -800 + 2j), (300 + 1j, -400 - 2j)]
)
def test_complex_exponentials(z, w):
    """Complex arguments, also where sinh of half the gap would overflow."""
    a, b = (torch.tensor([x], dtype=torch.complex128) for x in (z, w))
    found = F.exp.divided_difference(a, b).item()
    true = (
        mpmath.exp(z)
        if z == w
        else (mpmath.exp(mpmath.mpc(z)) - mpmath.exp(mpmath.mpc(w))) / (mpmath.mpc(z) - mpmath.mpc(w))
    )
    assert abs(found - complex(true)) <= 1e-12 * abs(complex(true))
    torch.testing.assert_close(divided_difference(torch.exp, a, b), F.exp.divided_difference(a, b), rtol=1e-11, atol=0)


@pytest.mark.parametrize("scale", [1j, 0.5 - 2j, -3.0])
def test_scaled_exponentials_at_real_arguments(scale):
    x = torch.tensor([-3.0, -1e-9, 0.0, 1e-9, 0.4, 0.4 + 1e-12, 2.0], dtype=torch.float64)
    found = Exp(scale).divided_difference(x.unsqueeze(1), x.unsqueeze(0))
    for i, a in enumerate(x.tolist()):
        for j, b in enumerate(x.tolist()):
            s = mpmath.mpc(scale)
            true = s * mpmath.exp(s * a) if a == b else (mpmath.exp(s * a) - mpmath.exp(s * b)) / (mpmath.mpf(a) - b)
            assert abs(complex(found[i, j]) - complex(true)) < 1e-13 * abs(complex(true))


@pytest.mark.parametrize("j", [0, 1, 2, 5, 12])
def test_phi_values(j):
    x = torch.tensor(
        [-700.0, -50.0, -13.01, -6.0, -1.0, -1e-8, 0.0, 1e-8, 0.999, 1.001, 2.0, 12.99, 13.01, 40.0, 500.0],
        dtype=torch.float64,
    )
    for z, found in zip(x.tolist(), F.phi(j)(x).tolist(), strict=True):
        with mpmath.workdps(80):
            true = mp_phi(j, mpmath.mpf(z)) if abs(z) > 20 else mp_phi_sum(j, z)
        assert abs(found - true) <= 2e-13 * abs(true), (z, found, true)
    H = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, V = torch.linalg.eig(H)
    expected = (V @ (Phi(j)(w).unsqueeze(-1) * torch.linalg.inv(V))).real
    torch.testing.assert_close(Phi(j).matrix(H), expected, rtol=1e-11, atol=1e-13)


def test_generic_rule_never_loses_to_the_quotient_around_zero():
    """A tiny operator: relative gaps are large, and f hardly changes (1 − 1e-18)."""
    x = torch.tensor([-1e-9, -3e-10, 2e-10, 1e-9], dtype=torch.float64)
    found = divided_difference(lambda x: torch.exp(-x * x), x.unsqueeze(1), x.unsqueeze(0))
    torch.testing.assert_close(found, -(x.unsqueeze(1) + x.unsqueeze(0)), rtol=1e-6, atol=1e-24)


def test_a_jump_between_two_eigenvalues():
    """A spectral projector: slope zero on either side, the quotient across."""
    x = torch.tensor([-1.0, -0.9, 0.8, 1.0], dtype=torch.float64)
    for step in (lambda x: (x > 0).double(), lambda x: x > 0):
        found = as_function(step).divided_difference(x.unsqueeze(1), x.unsqueeze(0))
        expected = torch.tensor(
            [[0, 0, 1 / 1.8, 0.5], [0, 0, 1 / 1.7, 1 / 1.9], [1 / 1.8, 1 / 1.7, 0, 0], [0.5, 1 / 1.9, 0, 0]]
        )
        torch.testing.assert_close(found, expected.double(), atol=1e-7, rtol=1e-7)


def test_derivatives():
    x = torch.tensor([0.3, 2.0], dtype=torch.float64)
    z = torch.tensor([0.3 + 1j, -2.0 + 0.5j], dtype=torch.complex128)
    torch.testing.assert_close(derivative(torch.sin, x), x.cos())
    torch.testing.assert_close(derivative(torch.sin, z), z.cos())
    torch.testing.assert_close(derivative(lambda x: torch.exp(1j * x), x), 1j * torch.exp(1j * x))
    for f in (F.exp, F.log, F.sqrt, F.rsqrt, F.inverse, F.power(3), F.power(-1.5), F.phi(2)):
        torch.testing.assert_close(f.derivative(x), derivative(f, x))


@pytest.mark.parametrize("points", [[0.7], [0.7, 0.7, 0.7], [0.1, 0.2, 0.9]])
def test_a_callable_that_autograd_cannot_see_is_refused(points):
    """Also where all eigenvalues agree, so that its values look like those of a constant."""
    x = torch.tensor(points, dtype=torch.float64)
    hidden = lambda x: torch.from_numpy(__import__("numpy").exp(x.detach().numpy()))
    with pytest.raises(DomainError, match="autograd could not give it.*write f in torch"):
        divided_difference(hidden, x, x)
    with pytest.raises(DomainError, match="numpy"):
        divided_difference(lambda x: torch.from_numpy(x.numpy() ** 2), x, x)


@pytest.mark.parametrize(
    ("f", "match"),
    [
        ("log", "f is 'log'; expected a function from ritz.functions"),
        (F.ScalarFunction, "expected a function from"),
        (F.power, r"power itself; give its argument: ritz.functions.power\(2\)"),
        (F.phi, "phi itself"),
        (3.0, "f is 3.0"),
    ],
)
def test_what_is_no_function(f, match):
    with pytest.raises(DomainError, match=match):
        as_function(f)


def test_functions_are_values():
    assert F.power(2.5) == F.power(2.5) != F.power(2) and hash(F.phi(1)) == hash(F.phi(1))
    assert as_function(torch.log) is F.log and as_function(F.exp) is F.exp
    for make, bad in ((F.power, "2"), (F.power, float("nan")), (F.phi, -1), (F.phi, 1.5)):
        with pytest.raises(DomainError, match="expected a"):
            make(bad)
