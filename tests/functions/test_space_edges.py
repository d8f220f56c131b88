"""Adaptive spaces and their gradients at odd input: nested transforms, zero columns, overflow, singular operators."""

import pytest
import torch

import ritz
from ritz.expint import wave_multiply
from ritz.functions import exp, power
from ritz.operators import Diagonal

D = torch.float64
TWO = ritz.Lanczos(reorthogonalize=False, two_pass=True)
d = torch.linspace(0.1, 2.0, 10, dtype=D)


@pytest.mark.parametrize("kind", ["wave", "exp", "two-pass", "time"])
def test_gradients_of_an_outer_transform(kind):
    """Inside of an inner transform a tensor's requires_grad says nothing about an outer one."""
    b = torch.cos(torch.arange(10, dtype=D))

    def outer(x):
        def inner(e):
            same = e.detach() * 0 + 1
            if kind == "wave":
                return wave_multiply(Diagonal(d * e).declare(psd=True), x * same, None, 1.0)[0].sum()
            if kind == "time":
                return ritz.expm_multiply(Diagonal(d * e), b, -x[0] * same[0], method=ritz.Lanczos(10)).sum()
            method = TWO if kind == "two-pass" else ritz.Lanczos()
            return ritz.funm_multiply(exp, Diagonal(d * e), x * same, method=method).sum()

        return torch.func.vjp(inner, torch.ones(10, dtype=D))[0]

    exact = {"wave": torch.cos(d.sqrt()), "exp": d.exp(), "two-pass": d.exp()}
    got = torch.func.grad(outer)(torch.ones(10, dtype=D))
    if kind == "time":
        torch.testing.assert_close(got[0], -(d * torch.exp(-d) * b).sum())
    else:
        torch.testing.assert_close(got, exact[kind])


def test_a_starting_vector_that_overflows_its_norm():
    with pytest.raises(ritz.NonFiniteError, match="starting vector"):
        ritz.funm_multiply(exp, Diagonal(torch.linspace(1, 2, 16)), torch.full((16,), 3e38), method=ritz.Lanczos(5))
    big = torch.full((16,), 1e200, dtype=D)
    y = ritz.funm_multiply(exp, Diagonal(torch.linspace(1, 2, 16, dtype=D)), big, method=ritz.Lanczos())
    torch.testing.assert_close(y, torch.linspace(1, 2, 16, dtype=D).exp() * big)


@pytest.mark.parametrize("seed", range(6))
def test_gradient_in_the_vector_alone_of_a_singular_operator(seed):
    """x^0.6 has no slope at the eigenvalue zero, which only a gradient in A needs."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(60, 60, dtype=D, generator=g))[0]
    w = torch.linspace(0, 4, 60, dtype=D)
    M = Q @ torch.diag(w) @ Q.mT
    A = ritz.aslinearoperator((M + M.mT) / 2).declare(hermitian=True, psd=True)
    B = torch.randn(60, dtype=D, generator=g).requires_grad_()
    (grad,) = torch.autograd.grad(ritz.funm_multiply(power(0.6), A, B).sum(), B)
    torch.testing.assert_close(grad, Q @ (w**0.6 * Q.sum(0)), rtol=1e-7, atol=1e-7)


def test_two_pass_in_one_direction_only_is_refused_at_once():
    b = torch.ones(10, dtype=D)
    for method, backward in ((TWO, ritz.Lanczos(20)), (ritz.Lanczos(), TWO)):
        with pytest.raises(ritz.OperandError, match="two_pass in both or in none"):
            ritz.funm_multiply(exp, Diagonal(d), b, method=method, gradient=ritz.Frechet(method=backward))


def test_a_zero_column_does_not_deepen_the_space():
    slow = Diagonal(torch.linspace(0, 1e-4, 600, dtype=D)).declare(psd=True)
    u, v = torch.ones(600, dtype=D), torch.sin(torch.arange(600, dtype=D))
    depths = [wave_multiply(slow, u, v0, 3300.0, return_info=True)[1].depth for v0 in (1e-30 * v, 0 * v)]
    assert depths[0] == depths[1] < 50
    wrong = Diagonal(torch.linspace(-1e-14, 1e-14, 30, dtype=D)).declare(psd=True)
    with pytest.raises(ritz.DomainError, match=">= 0"):
        ritz.funm_multiply(
            ritz.functions.sqrt, wrong, torch.stack([torch.ones(30, dtype=D), torch.zeros(30, dtype=D)], 1)
        )


def test_no_columns_and_no_finite_exponential():
    none = torch.zeros(10, 0, dtype=D, requires_grad=True)
    A = Diagonal(d.clone().requires_grad_())
    for method in (TWO, ritz.Lanczos()):
        ritz.funm_multiply(exp, A, none, method=method).sum().backward()
        assert none.grad.shape == (10, 0)
    with pytest.raises(ritz.DomainError, match="scale"):
        ritz.expm_multiply(Diagonal(1e10 * d), torch.ones(10, dtype=D), 1e300, method=ritz.Lanczos())


def test_a_derivative_that_overflows_is_named():
    """e^700 is a number of float64, and times a cotangent of 1e200 it is not."""
    A = ritz.aslinearoperator(torch.diag(torch.linspace(0.0, 700.0, 30, dtype=D)).requires_grad_(), hermitian=False)
    y = ritz.expm_multiply(A, torch.ones(30, dtype=D), 1.0, method=ritz.Arnoldi(30))
    with pytest.raises(ritz.DomainError, match="derivative of f overflows"):
        (y * 1e200).sum().backward()
