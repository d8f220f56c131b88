"""Profiles k(r²): values against the textbook in r, derivatives against autograd, everything finite at 0."""

import math

import mpmath
import pytest
import torch

from ritz.errors import OperandError
from ritz.kernels import Gaussian, GeneralMaternProfile, MaternProfile, RationalQuadraticProfile

PROFILES = [
    Gaussian(),
    MaternProfile(nu=0.5),
    MaternProfile(nu=1.5),
    MaternProfile(nu=2.5),
    RationalQuadraticProfile(alpha=0.7),
    RationalQuadraticProfile(alpha=300.0),
    *(GeneralMaternProfile(nu=nu) for nu in (0.3, 1.0, 1.2, 2.0, 3.5, 50.0)),
]


def textbook(profile, r):
    if isinstance(profile, Gaussian):
        return math.exp(-r * r / 2)
    if isinstance(profile, RationalQuadraticProfile):
        return (1 + r * r / (2 * profile.alpha)) ** -profile.alpha
    a = math.sqrt(2 * profile.nu) * r
    if isinstance(profile, GeneralMaternProfile):
        with mpmath.workdps(30):
            nu = mpmath.mpf(profile.nu)
            return float(2 ** (1 - nu) / mpmath.gamma(nu) * a**nu * mpmath.besselk(nu, a)) if a else 1.0
    return {0.5: 1.0, 1.5: 1 + a, 2.5: 1 + a + a * a / 3}[profile.nu] * math.exp(-a)


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_values(profile):
    r = [0.0, 1e-9, 1e-3, 0.3, 1.0, 4.0, 30.0]
    got = profile(torch.tensor(r, dtype=torch.float64).square())
    torch.testing.assert_close(got, torch.tensor([textbook(profile, x) for x in r], dtype=torch.float64))


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_derivatives_are_those_of_the_values(profile):
    r2 = torch.tensor([0.0, 1e-4, 0.2, 1.0, 9.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(profile(r2).sum(), r2, create_graph=True)
    torch.testing.assert_close(profile.derivative(r2.detach()), first.detach(), rtol=1e-9, atol=0)
    (second,) = torch.autograd.grad(first.sum(), r2)
    torch.testing.assert_close(profile.second(r2.detach()), second, rtol=1e-6, atol=0)
    assert bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())


def test_slopes_at_coincident_points():
    zero = torch.zeros(1, dtype=torch.float64)
    slopes = [float(p.derivative(zero)) for p in PROFILES]
    # RBF −1/2; Matérn: k = 1 − a²/2 + … for 3/2 and 1 − a²/6 + … for 5/2 with a² = 2ν r²; the subgradient 0 for 1/2
    # and −ν/(2(ν − 1)) for any ν > 1, as for 3/2 and 5/2; rational quadratic: −1/2 as for the RBF kernel that it mixes
    general = [0.0, 0.0, -1.2 / 0.4, -2 / 2, -3.5 / 5, -50 / 98]
    assert slopes == pytest.approx([-0.5, 0.0, -1.5, -5 / 6, -0.5, -0.5, *general])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_in_place_forms_equal_the_others(profile, dtype):
    r2 = torch.tensor([0.0, 1e-6, 0.1, 1.0, 7.0, 1e3, 1e6], dtype=dtype)

    def tile():
        return profile.clamp_(profile.scale * r2), torch.full_like(r2, math.nan)

    k = profile.values_(*tile())
    slope, again = profile.slopes_(*tile())
    tol = {"rtol": 1e-5 if dtype == torch.float32 else 1e-13, "atol": 1e-31}
    torch.testing.assert_close(k, profile(r2), **tol)
    torch.testing.assert_close(again, profile(r2), **tol)
    torch.testing.assert_close(slope * profile.scale, profile.derivative(r2), **tol)


def test_clamped_tiles_hold_no_subnormal_numbers():
    for profile in PROFILES:
        t = torch.linspace(0, 1e5, 10_001) * profile.scale
        k = profile.values_(profile.clamp_(t), torch.empty_like(t))
        assert float(k.min()) > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_general_smoothness_agrees_with_the_closed_forms(nu):
    general, closed = GeneralMaternProfile(nu=nu), MaternProfile(nu=nu)
    r2 = torch.cat([torch.zeros(1), torch.logspace(-20, 2.5, 2001)]).double()
    for ours, theirs in [
        (general(r2), closed(r2)),
        (general.derivative(r2), closed.derivative(r2)),
        (general.second(r2), closed.second(r2)),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("nu", [0.4, 1.2, 3.3])
def test_every_order_of_the_general_smoothness(nu):
    # d/dt of a^ν K_ν(a) lowers ν; here by differences in mpmath
    profile = GeneralMaternProfile(nu=nu)
    r2 = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    y = profile(r2)
    for order in range(1, 4):
        (y,) = torch.autograd.grad(y.sum(), r2, create_graph=True)
        with mpmath.workdps(60):
            f = lambda s: (
                mpmath.mpf(2) ** (1 - nu)
                / mpmath.gamma(nu)
                * (2 * nu * s) ** (nu / mpmath.mpf(2))
                * (mpmath.besselk(nu, mpmath.sqrt(2 * nu * s)))
            )
            want = [float(mpmath.diff(f, mpmath.mpf(v), order)) for v in r2.tolist()]
        assert y.tolist() == pytest.approx(want, rel=1e-11)


def test_smooth_limit_and_long_tail():
    r2 = torch.linspace(0, 16, 100, dtype=torch.float64)
    assert float((GeneralMaternProfile(nu=50.0)(r2) - Gaussian()(r2)).abs().max()) < 0.01
    torch.testing.assert_close(RationalQuadraticProfile(alpha=1e9)(r2), Gaussian()(r2), rtol=1e-6, atol=1e-9)
    far = RationalQuadraticProfile(alpha=1e-3)
    t = far.clamp_(far.scale * torch.tensor([1e30, 3e38]))
    assert bool(torch.isfinite(torch.stack(far.slopes_(t, torch.empty_like(t)))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.05, 1.0, 30.0])
def test_shape_slope_of_the_rational_quadratic(alpha, dtype):
    r2 = torch.tensor([0.0, 1e-6, 0.1, 1.0, 7.0, 1e3], dtype=torch.float64)
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    want = torch.stack([torch.autograd.grad((1 + v / (2 * a)) ** -a, a)[0] for v in r2])
    profile = RationalQuadraticProfile(alpha=alpha)
    t = profile.clamp_((profile.scale * r2).to(dtype))
    kept = t.clone()
    (got,) = profile.shape_slopes(t)
    assert torch.equal(t, kept)
    torch.testing.assert_close(
        got.double(), want, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-7 * t[3].item()
    )


def test_other_smoothness_is_refused():
    with pytest.raises(OperandError, match="nu=2"):
        MaternProfile(nu=2.0)
    for nu in (0.0, -1.0, 51.0, math.nan):
        with pytest.raises(OperandError, match="0 < nu"):
            GeneralMaternProfile(nu=nu)
    for alpha in (0.0, math.inf):
        with pytest.raises(OperandError, match="alpha"):
            RationalQuadraticProfile(alpha=alpha)
