"""Profiles k(r²): values against the textbook in r, derivatives against autograd, everything finite at 0."""

import math

import pytest
import torch

from ritz.errors import OperandError
from ritz.kernels import Gaussian, MaternProfile

PROFILES = [Gaussian(), MaternProfile(nu=0.5), MaternProfile(nu=1.5), MaternProfile(nu=2.5)]


def textbook(profile, r):
    if isinstance(profile, Gaussian):
        return math.exp(-r * r / 2)
    a = math.sqrt(2 * profile.nu) * r
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
    assert slopes == pytest.approx([-0.5, 0.0, -1.5, -5 / 6])


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


def test_other_smoothness_is_refused():
    with pytest.raises(OperandError, match="nu=2"):
        MaternProfile(nu=2.0)
