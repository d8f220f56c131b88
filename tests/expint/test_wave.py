"""cos(t√A) and sin(t√A)/√A against eigenvectors, reversal in time, energy, and the founding study's stored fields."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ritz
from ritz.errors import DomainError, OperandError, SecondDerivativeError
from ritz.expint import FirstOrder, wave_multiply

N = 30


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    M = torch.randn(N, N, dtype=dtype, generator=g)
    M = (M @ M.mH / N).requires_grad_()
    u, v = (torch.randn(N, 2, dtype=dtype, generator=g).requires_grad_() for _ in range(2))
    return M, (M + M.mH) / 2, u, v


def dense(S: Tensor, u: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """By the first-order system, which knows nothing of square roots."""
    zero, eye = torch.zeros_like(S), torch.eye(len(S), dtype=S.dtype)
    E = torch.matrix_exp(t * torch.cat([torch.cat([zero, eye], 1), torch.cat([-S, zero], 1)]))
    y = E @ torch.cat([u, v])
    return y[: len(S)], y[len(S) :]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("t", [2.3, -1.1, 0.0])
@pytest.mark.parametrize("wanted", ["both", "u", "v"])
def test_against_the_system(t: float, wanted: str, dtype: torch.dtype) -> None:
    M, S, u, v = problem(dtype)
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, N, 2, dtype=dtype, generator=torch.Generator().manual_seed(5))
    g[0] *= wanted != "v"
    g[1] *= wanted != "u"

    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        return ((g[0].conj() * pair[0]).sum() + (g[1].conj() * pair[1]).sum()).real

    expected = dense(S, u, v, time)
    found, info = wave_multiply(ritz.aslinearoperator(S, hermitian=True), u, v, time, return_info=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(loss(found), [M, u, v, time], retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(loss(expected), [M, u, v, time]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.norm() + 1e-3))
    assert info.num_matvecs == 4 * info.depth
    assert info.backward.num_matvecs == (4 if wanted == "both" else 2) * info.backward.depth


def test_first_order_system() -> None:
    M, S, u, v = problem()
    K = (-S + 0.1 * torch.triu(torch.ones_like(S))).detach().requires_grad_()
    A = FirstOrder(ritz.aslinearoperator(K))
    ritz.testing.check_operator(A)
    y = torch.cat([u, v]).detach()
    zero, eye = torch.zeros_like(K), torch.eye(N, dtype=torch.float64)
    exact = torch.matrix_exp(1.3 * torch.cat([torch.cat([zero, eye], 1), torch.cat([K, zero], 1)])) @ y
    found = ritz.expm_multiply(A, y, 1.3)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    (g,), (h,) = (torch.autograd.grad(z.square().sum(), K) for z in (found, exact))
    torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-7)
    with pytest.raises(OperandError, match="expected a square one"):
        FirstOrder(torch.ones(2, 3))


def test_no_velocity_and_one_column() -> None:
    M, S, u, v = problem()
    A = ritz.aslinearoperator(S, hermitian=True)
    expected = dense(S, u, torch.zeros_like(v), torch.tensor(1.5))
    for a, b in zip(wave_multiply(A, u[:, 0], t=1.5), expected, strict=True):
        torch.testing.assert_close(a, b[:, 0], rtol=1e-9, atol=1e-9)
    (g,) = torch.autograd.grad(wave_multiply(A, u, None, 1.5)[0].square().sum(), M, retain_graph=True)
    (h,) = torch.autograd.grad(expected[0].square().sum(), M)
    torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_energy_over_many_steps(steps: int) -> None:
    g = torch.Generator().manual_seed(1)
    M = torch.randn(12, 12, dtype=torch.float64, generator=g)
    S = M @ M.mT
    A = ritz.aslinearoperator(S, hermitian=True, psd=True)
    u, v = torch.randn(2, 12, dtype=torch.float64, generator=g)

    def energy() -> float:
        return float(0.5 * v @ v + 0.5 * u @ S @ u)

    before, first = energy(), (u, v)
    with torch.no_grad():
        for _ in range(steps):
            u, v = wave_multiply(A, u, v, 0.3, method=ritz.Lanczos(12))
    assert abs(energy() / before - 1) < 1e-10
    w, U = torch.linalg.eigh(S)
    s, t = w.clamp(min=0).sqrt(), 0.3 * steps
    exact = U @ (torch.cos(t * s) * (U.T @ first[0]) + t * torch.sinc(t * s / torch.pi) * (U.T @ first[1]))
    torch.testing.assert_close(u, exact, rtol=1e-6, atol=1e-6)


def test_singular_operator_drifts() -> None:
    A = ritz.aslinearoperator(torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64)), hermitian=True)
    one = torch.ones(2, dtype=torch.float64)
    u, v = wave_multiply(A, 0 * one, one, 3.0)
    torch.testing.assert_close(
        u, torch.tensor([3.0, 0.0], dtype=torch.float64) + torch.sin(3 * torch.tensor([0.0, 1.0])).double()
    )
    torch.testing.assert_close(v[0], one[0])


def test_refusals() -> None:
    _, S, u, v = problem()
    A = ritz.aslinearoperator(S, hermitian=True)
    with pytest.raises(DomainError, match="expected a positive semidefinite one"):
        wave_multiply(-1.0 * A, u, v, 1.0)
    with pytest.raises(OperandError, match="expected a Hermitian positive semidefinite operator"):
        wave_multiply(ritz.aslinearoperator(S.triu(), hermitian=False), u, v, 1.0)
    with pytest.raises(OperandError, match="expected a real time"):
        wave_multiply(A, u, v, 1j)
    with pytest.raises(OperandError, match="expected the same shape"):
        wave_multiply(A, u, v[:, 0], 1.0)
    with pytest.raises(OperandError, match=r"gradient=Frechet\(\) only"):
        wave_multiply(A, u, v, 1.0, gradient=ritz.Adjoint())  # type: ignore[arg-type]
    with pytest.raises(OperandError, match=r"takes Lanczos"):
        wave_multiply(A, u, v, 1.0, method=ritz.Arnoldi())
    (g,) = torch.autograd.grad(wave_multiply(A, u, v, 1.0)[0].sum(), u, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="differentiated twice"):
        g.sum().backward()
