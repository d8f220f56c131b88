"""cos(t√A) and sin(t√A)/√A against the first-order system; reversal in time, energy, norm over many steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ritz
from ritz.errors import DomainError, OperandError, SecondDerivativeError
from ritz.expint import FirstOrder, Grid, Hamiltonian, WaveOperator, wave_multiply

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


@pytest.mark.parametrize("t", [40.0, -25.0])
def test_long_times_go_in_pieces(t: float) -> None:
    M, S, u, v = problem()
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    A, method = ritz.aslinearoperator(S, hermitian=True), ritz.Lanczos(max_matvecs=14)
    found, info = wave_multiply(A, u, v, time, method=method, return_info=True, on_failure="raise")
    expected = dense(S, u, v, time)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    g = torch.randn(2, N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours, theirs = (
        torch.autograd.grad((g[0] * y[0] + g[1] * y[1]).sum(), [M, u, v, time], retain_graph=True)
        for y in (found, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * float(b.norm()))
    assert info.depth <= 14 and info.details["substeps"] > 2
    assert info.num_matvecs > info.details["substeps"] * 4  # what was too short is counted
    with pytest.raises(ritz.errors.ConvergenceError, match="the wave: step limit reached"):
        wave_multiply(A, u, v, time, method=ritz.Lanczos(max_matvecs=1), on_failure="raise")


def test_large_operators_take_the_plain_recurrence() -> None:
    grid = Grid((33, 33), border="neumann")
    c = (1 + 0.3 * torch.rand(33, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    u, v = torch.randn(2, 33 * 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for method in (ritz.Auto(), ritz.Lanczos()):
        pair, info = wave_multiply(WaveOperator(c, grid), u, v, 0.5, method=method, return_info=True)
        assert info.method.reorthogonalize is (method != ritz.Auto())
        found.append((*pair, *torch.autograd.grad(pair[0].square().sum() + pair[1] @ u, c)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.detach().norm()))


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


def test_backwards_in_time_comes_home() -> None:
    S = WaveOperator(1 + 0.3 * torch.rand(12, 12, dtype=torch.float64), Grid((12, 12), border="neumann"))
    u, v = torch.randn(2, 144, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    there = wave_multiply(S, u, v, 0.7)
    home = wave_multiply(S, *there, -0.7)
    torch.testing.assert_close(home, (u, v), rtol=1e-8, atol=1e-8)


def test_no_operator_at_all() -> None:
    u, v = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    d = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    end = wave_multiply(ritz.operators.Diagonal(d).declare(hermitian=True, psd=True), u, v, 2.0)
    torch.testing.assert_close(end, (u + 2 * v, v))
    (grad,) = torch.autograd.grad(end[0].sum(), d)
    torch.testing.assert_close(grad, -2 * u - 8 / 6 * v)  # of cos 2√x and sin(2√x)/√x at zero


@pytest.mark.parametrize("steps", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_truncated_spaces_keep_energy_and_norm(steps: int) -> None:
    """Spaces of a tenth of the length: what is lost a step is the tolerance, and it does not pile up beyond that."""
    grid = Grid((8, 8), border="neumann", spacing=1.0)
    x = grid.coordinates(dtype=torch.float64)
    S = WaveOperator((1 + 0.3 * torch.sin(x[:, 0])).reshape(8, 8), grid)
    u, v = torch.sin(x[:, 0]), torch.cos(x[:, 1])
    energy = lambda u, v: 0.5 * (v @ v + u @ (S @ u)).item()  # noqa: E731
    first = energy(u, v)
    H = Hamiltonian(torch.cos(x[:, 1]).reshape(8, 8), grid, dtype=torch.complex128)
    psi = torch.polar(torch.ones(64, dtype=torch.float64), x[:, 0])
    method = ritz.Lanczos(rtol=1e-13, max_matvecs=24)
    depths = set()
    for _ in range(steps):
        (u, v), info = wave_multiply(S, u, v, 0.3, method=method, return_info=True)
        psi, other = ritz.expm_multiply(H, psi, -0.3j, method=method, return_info=True)
        depths |= {info.depth, other.depth}
    assert max(depths) < 30
    assert abs(energy(u, v) / first - 1) < 1e-13 * steps
    assert abs(torch.linalg.vector_norm(psi).item() / 8 - 1) < 1e-13 * steps
