"""Gradients in what a callable f closes over: the order of a fractional power, a rate, a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ritz
from ritz.errors import OperandError, SecondDerivativeError
from ritz.expint import Grid, Laplacian

D = torch.float64
L = Laplacian(Grid((6, 5)), negative=True, dtype=D)
w, U = torch.linalg.eigh(L.to_dense())
V = torch.randn(30, 2, dtype=D, generator=torch.Generator().manual_seed(0))
Z = torch.randn(30, 2, dtype=D, generator=torch.Generator().manual_seed(1))


def leaves() -> tuple[Tensor, Tensor]:
    return torch.tensor(0.6, dtype=D, requires_grad=True), torch.tensor(0.01, dtype=D, requires_grad=True)


def fractional(s: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.exp(-t * x.clamp(min=0) ** s)


def compare(got: Tensor, exact: Tensor, leaves: list[Tensor], tol: float) -> None:
    torch.testing.assert_close(got, exact, rtol=tol, atol=tol)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("with_vectors", [True, False], ids=["vectors too", "f alone"])
def test_multiply(with_vectors: bool) -> None:
    """Where nothing else asks for a gradient there is no rule to stand beside."""
    (s, t), v = leaves(), V.clone().requires_grad_(with_vectors)
    f = fractional(s, t)
    exact = U @ (f(w).unsqueeze(1) * (U.mT @ v))
    compare((ritz.funm_multiply(f, L, v) * Z).sum(), (exact * Z).sum(), [s, t, *[v] * with_vectors], 1e-8)


def test_the_derivative_is_that_of_the_computed_value() -> None:
    (s, t), method = leaves(), ritz.Lanczos(7)
    f = fractional(s, t)
    y, plain = (ritz.funm_multiply(f, L, V, method=method, gradient=g) for g in (ritz.Adjoint(), ritz.Unrolled()))
    compare((y * Z).sum(), (plain * Z).sum(), [s, t], 1e-10)
    assert float((y - U @ (f(w).unsqueeze(1) * (U.mT @ V))).detach().norm()) > 1e-3  # and not of the limit


def test_arnoldi() -> None:
    s, t = leaves()
    B = torch.randn(30, 30, dtype=D, generator=torch.Generator().manual_seed(2)) / 5
    got = ritz.funm_multiply(lambda x: s * torch.exp((1 + t) * x), B, V)
    compare((got * Z).sum(), (s * (torch.linalg.matrix_exp((1 + t) * B) @ V) * Z).sum(), [s, t], 1e-9)


def test_forms_traces_and_shifts() -> None:
    s, t = leaves()
    f = fractional(s, t)
    M = L.to_dense().requires_grad_()
    A = ritz.aslinearoperator(M, hermitian=True)
    squares = (U.mT @ V).square()
    compare(ritz.quadratic_form(f, A, V).sum(), (f(w).unsqueeze(1) * squares).sum(), [s, t], 1e-8)
    shifts = torch.tensor([0.0, 3.0], dtype=D)
    shifted = f(w.unsqueeze(1) + shifts).unsqueeze(2) * squares.unsqueeze(1)
    compare((ritz.quadratic_form(f, L, V, shifts=shifts) * Z[:2]).sum(), (shifted.sum(0) * Z[:2]).sum(), [s, t], 1e-8)
    got = ritz.quadratic_form(lambda x: torch.exp(-1j * t * x), L, V).imag.sum()
    compare(got, (torch.exp(-1j * t * w).imag.unsqueeze(1) * squares).sum(), [t], 1e-9)
    compare(ritz.trace(L, f, estimator=ritz.Hutchinson(30)), f(w).sum(), [s, t], 1e-8)


@pytest.mark.parametrize(
    "method", [ritz.Chebyshev(bounds=(0.0, 500.0)), ritz.Lanczos(reorthogonalize=False, two_pass=True)], ids=str
)
def test_methods_that_would_leave_it_out_refuse(method: Any) -> None:
    s, t = leaves()
    with pytest.raises(OperandError, match="f reads tensors that require grad"):
        ritz.funm_multiply(fractional(s, t), L, V, method=method)
    with torch.no_grad():
        y = ritz.funm_multiply(lambda x: torch.exp(-t * x), L, V, method=method)
        torch.testing.assert_close(y, U @ (torch.exp(-t * w).unsqueeze(1) * (U.mT @ V)), rtol=1e-7, atol=1e-7)


def test_second_derivatives_are_refused_by_name() -> None:
    """Those that mix f with A or the vectors too; a first one may keep its graph."""
    s, t = leaves()
    M, v = L.to_dense().requires_grad_(), V.clone().requires_grad_()
    A, f = ritz.aslinearoperator(M, hermitian=True), fractional(s, t)
    for y in (ritz.funm_multiply(f, A, v).square().sum(), ritz.quadratic_form(f, A, v).sum()):
        first = torch.autograd.grad(y, [s, M, v], create_graph=True)
        exact = torch.autograd.grad(y, [s, M, v], retain_graph=True)
        for a, b in zip(first, exact, strict=True):
            torch.testing.assert_close(a, b)
        for x, other in ((first[0], M), (first[0], s), (first[1], s), (first[2], t)):
            with pytest.raises(SecondDerivativeError, match="differentiated twice"):
                torch.autograd.grad(x.sum() + s**2, other, retain_graph=True, allow_unused=True)


def test_inside_of_torch_func() -> None:
    s, t = (x.detach() for x in leaves())
    got = torch.func.grad(lambda s: (ritz.funm_multiply(fractional(s, t), L, V) * Z).sum())(s)
    exact = torch.func.grad(lambda s: (U @ (fractional(s, t)(w).unsqueeze(1) * (U.mT @ V)) * Z).sum())(s)
    torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shifts", [None, torch.ones(1, dtype=D)], ids=["no shifts", "shifts"])
def test_an_f_that_changes_before_backward_is_noticed(shifts: Tensor | None) -> None:
    s, t = leaves()
    M, f = L.to_dense().requires_grad_(), fractional(s, t)
    A = ritz.aslinearoperator(M, hermitian=True)
    for y in (ritz.quadratic_form(f, A, V, shifts=shifts).sum(), ritz.funm_multiply(f, A, V).sum()):
        with torch.no_grad():
            s.mul_(1.1)
        with pytest.raises(RuntimeError, match="f has changed between the forward pass and backward"):
            torch.autograd.grad(y, M)


def test_functions_of_ones_own() -> None:
    class Scaled(ritz.functions.ScalarFunction):
        def __init__(self, s: Tensor) -> None:
            object.__setattr__(self, "s", s)

        def __call__(self, x: Tensor) -> Tensor:
            return torch.exp(-self.s * x / 100)

    s, _ = leaves()
    exact = U @ (torch.exp(-s * w / 100).unsqueeze(1) * (U.mT @ V))
    compare((ritz.funm_multiply(Scaled(s), L, V) * Z).sum(), (exact * Z).sum(), [s], 1e-8)
