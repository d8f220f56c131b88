"""One run for every function: traces, log-determinant curves and the density, against dense eigenvalues."""

from __future__ import annotations

import pytest
import torch

import ritz
from ritz.errors import OperandError
from ritz.stochastic import spectral_measure

DOUBLE = {"dtype": torch.float64}


def made(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, **DOUBLE))[0]
    lam = torch.cat([torch.tensor([50.0, 30.0], **DOUBLE), torch.rand(n - 2, generator=generator, **DOUBLE) ** 3])
    M = (Q * lam) @ Q.mT
    return 0.5 * (M + M.mT), lam


@pytest.mark.parametrize("estimator", [ritz.Hutchinson(20), ritz.Deflated(20, 20), ritz.Hutchinson(200)])
def test_traces_of_many_functions_from_one_run(estimator):
    M, lam = made()
    counted = ritz.Counting(ritz.aslinearoperator(M, psd=True))
    measure = spectral_measure(counted, estimator=estimator, method=ritz.Lanczos(200))
    spent = counted.num_matvecs
    for f in (torch.log1p, torch.sqrt, lambda x: x, lambda x: torch.exp(-x)):
        value, error = measure.trace(f)
        exact = f(lam).sum()
        assert abs(float(value - exact)) <= 4 * float(error) + 1e-6 * float(exact)
    assert counted.num_matvecs == spent == measure.info.num_matvecs
    if measure.exact:
        torch.testing.assert_close(measure.trace(torch.log1p)[0], torch.log1p(lam).sum())


def test_log_determinants_are_those_of_logdet_and_differentiable_in_the_shifts():
    M, _ = made()
    A = ritz.aslinearoperator(M, psd=True)
    sigma = torch.tensor([0.05, 1.0], requires_grad=True, **DOUBLE)
    for estimator in (ritz.Hutchinson(10), ritz.Deflated(20, 10)):
        method = ritz.Lanczos(60)
        value, error = spectral_measure(A, estimator=estimator, method=method).logdet(sigma)
        want, info = ritz.logdet(A, shifts=sigma, estimator=estimator, method=method, return_info=True)
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(error, info.standard_error)
        got, expected = (torch.autograd.grad(v.sum(), sigma)[0] for v in (value, want))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("estimator", [ritz.Hutchinson(200), ritz.Deflated(20, 40)])
def test_density_is_the_smoothed_histogram(estimator):
    M, lam = made()
    grid, density, error, info = ritz.spectral_density(
        ritz.aslinearoperator(M, psd=True), width=1.0, estimator=estimator, method=ritz.Lanczos(80), return_info=True
    )
    exact = torch.exp(-0.5 * (lam - grid.unsqueeze(1)).square()).sum(1) / (2 * torch.pi) ** 0.5
    assert bool(((density - exact).abs() <= 5 * error + 1e-4 * exact.max()).all())
    assert float(torch.trapezoid(density, grid)) == pytest.approx(200, rel=1e-2)
    assert info.num_matvecs > 0 and grid.shape == density.shape == error.shape == (200,)


def test_adaptive_depth_waits_for_the_function():
    M, lam = made()
    A = ritz.aslinearoperator(M, psd=True)
    shallow, deep = (
        spectral_measure(A, method=ritz.Lanczos(rtol=1e-6), f=lambda x, s=s: torch.log(x + s)).info.depth
        for s in (10.0, 1e-3)
    )
    assert shallow < deep


def test_bad_input():
    M, _ = made()
    for call, message in [
        (lambda: spectral_measure(torch.randn(5, 5)), "Hermitian"),
        (lambda: spectral_measure(M, method=ritz.Lanczos()), "is adaptive, and no f says"),
        (lambda: ritz.spectral_density(M, width=-1.0), "width=-1.0"),
    ]:
        with pytest.raises(OperandError, match=message):
            call()
