"""Traces with a Krylov space taken out: exact where nothing is left, smaller and true errors, derivatives."""

from __future__ import annotations

import pytest
import torch

import ritz
from ritz.errors import OperandError

DOUBLE = {"dtype": torch.float64}


def decaying(n: int = 300, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix like a Gauss–Newton matrix: a few large eigenvalues, and a long tail near zero."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=dtype))[0]
    lam = 1e3 * torch.exp(-0.12 * torch.arange(n, **DOUBLE)) + 1e-4
    M = (Q * lam) @ Q.mH
    return 0.5 * (M + M.mH), lam


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_curve_of_log_determinants_is_inside_its_errors(dtype):
    M, lam = decaying(dtype=torch.complex128 if dtype.is_complex else torch.float64)
    sigma = torch.tensor([1e-2, 1.0, 100.0], **DOUBLE)
    exact = torch.log(lam + sigma.unsqueeze(1)).sum(1)
    A = ritz.aslinearoperator(M.to(dtype), psd=True)
    plain, before = ritz.logdet(A, shifts=sigma, estimator=ritz.Hutchinson(10), return_info=True)
    value, info = ritz.logdet(A, shifts=sigma, estimator=ritz.Deflated(100, 10), return_info=True)
    assert bool(((value - exact).abs() < 4 * info.standard_error + 1e-3 * exact.abs()).all())
    assert bool((info.standard_error < 0.4 * before.standard_error).all())
    # Most of it is in the part that is known exactly.
    assert bool((info.details["deflated"][-1].abs() > 0.9 * (exact[-1] - 300 * sigma[-1].log()).abs()).all())
    assert info.num_matvecs > 200
    single = ritz.logdet(A.shift(1.0), estimator=ritz.Deflated(100, 10))
    assert abs(float(single - exact[1])) < 4 * float(info.standard_error[1]) + 1e-2


def test_standard_errors_are_true():
    """|error| ≤ 2 standard errors for about 92 % of seeds (a t-distribution of 9 degrees of freedom)."""
    M, lam = decaying(120)
    exact = torch.log(lam + 1.0).sum()
    A = ritz.aslinearoperator(M, psd=True)
    scores = []
    for seed in range(60):
        value, info = ritz.logdet(
            A, shifts=[1.0], estimator=ritz.Deflated(20, 10, seed=seed, extra=4), return_info=True
        )
        scores.append(float((value - exact) / info.standard_error))
    inside = sum(abs(s) <= 2 for s in scores) / len(scores)
    assert inside >= 0.83, scores  # 92 % less two and a half standard deviations of the count
    assert abs(sum(scores) / len(scores)) < 0.45


def test_small_matrices_are_exact():
    M, lam = decaying(90)
    value, info = ritz.trace(
        M, ritz.functions.sqrt, estimator=ritz.Deflated(80, 5, block=10, extra=10), return_info=True
    )
    torch.testing.assert_close(value, lam[:90].sqrt().sum())
    assert float(info.standard_error) == 0.0


def test_derivatives_are_those_of_the_estimate_with_the_space_held():
    """Against the exact derivative within sampling error; exact for the part that a scaling and shifts see."""
    M, lam = decaying()
    t = torch.tensor(1.2, requires_grad=True, **DOUBLE)
    sigma = torch.tensor([0.1, 5.0], requires_grad=True, **DOUBLE)
    A = t * ritz.aslinearoperator(M, psd=True)
    w = torch.tensor([1.0, -2.0], **DOUBLE)
    value = ritz.logdet(A, shifts=sigma, estimator=ritz.Deflated(200, 10))
    got = torch.autograd.grad((w * value).sum(), (t, sigma))
    exact = (w * torch.log(t * lam + sigma.unsqueeze(1)).sum(1)).sum()
    want = torch.autograd.grad(exact, (t, sigma))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)


def test_gradient_in_a_dense_matrix():
    M, lam = decaying(150)
    A = M.clone().requires_grad_()
    op = ritz.aslinearoperator(A, psd=True)
    value = ritz.logdet(op, shifts=[1.0], estimator=ritz.Deflated(100, 10, extra=4))
    (g,) = torch.autograd.grad(value.sum(), A)
    want = torch.linalg.inv(M + torch.eye(150, **DOUBLE))
    # f'(A) where the spectrum is large is exact; the rest is an average over probes
    w, U = torch.linalg.eigh(M)
    top = U[:, w > 2.0]
    torch.testing.assert_close(top.mT @ g @ top, top.mT @ want @ top, rtol=1e-6, atol=1e-8)
    assert abs(float(torch.trace(g) - torch.trace(want))) / float(torch.trace(want)) < 0.01


def test_bad_input():
    M, _ = decaying(200)
    for call, message in [
        (lambda: ritz.Deflated(0), "columns=0"),
        (lambda: ritz.Deflated(25, block=10), "block must divide"),
        (lambda: ritz.trace(M, estimator=ritz.Deflated(20)), "needs a function f of a Hermitian operator"),
        (lambda: ritz.trace(torch.randn(300, 300), ritz.functions.exp, estimator=ritz.Deflated(20)), "Hermitian"),
        (lambda: ritz.logdet(M, estimator=ritz.Deflated(20), gradient=ritz.Adjoint()), "expected Frechet"),
    ]:
        with pytest.raises(OperandError, match=message):
            call()
