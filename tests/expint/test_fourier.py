"""Fourier operators against discrete transforms by matrices, and against the stencils that they diagonalise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ritz
from ritz.errors import NonFiniteError, OperandError
from ritz.expint.fourier import Fourier, laplacian_symbol
from ritz.expint.grid import Grid
from ritz.expint.stencils import Laplacian

D, C = torch.float64, torch.complex128
GRIDS = {
    "odd": Grid(5, lengths=2.0, border="periodic"),
    "even": Grid(6, border="periodic"),
    "2d": Grid((3, 4), lengths=(1.0, 2.0), border="periodic"),
    "3d": Grid((2, 3, 2), border="periodic"),
}
on_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def matrix(symbol: Tensor) -> Tensor:
    """F⁻¹ diag(s) F from the definition of the transform."""
    F = torch.ones(1, 1, dtype=C)
    for n in symbol.shape:
        k = torch.arange(n, dtype=D)
        F = torch.kron(F, torch.exp(-2j * math.pi * k[:, None] * k / n))
    return F.conj().mT @ torch.diag(symbol.reshape(-1).to(C)) @ F / symbol.numel()


def draw(*shape: int, dtype: torch.dtype = D, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def symbols(grid: Grid) -> dict[str, Tensor]:
    return {
        "laplacian": laplacian_symbol(grid, dtype=D),
        "minus laplacian": -laplacian_symbol(grid, False, dtype=D),
        "real": draw(*grid.shape),
        "complex": draw(*grid.shape, dtype=C),
        "of a real convolution": torch.fft.fftn(draw(*grid.shape)),
    }


@on_grids
@pytest.mark.parametrize("name", symbols(GRIDS["odd"]).keys())
def test_the_matrix_and_the_contract(grid: Grid, name: str) -> None:
    s = symbols(grid)[name]
    M = matrix(s)
    keeps_real = bool(M.imag.abs().max() < 1e-12 * M.abs().max())
    A = Fourier(s.clone().requires_grad_(), grid)
    assert A.dtype == (D if keeps_real else C)
    assert A.psd is (True if name == "minus laplacian" else None)
    for dtype, truth in ((D, M.real), (C, M)):
        A = Fourier(s.clone().requires_grad_(), grid, dtype=dtype)
        assert torch.allclose(A.to_dense().detach(), truth)
        ritz.testing.check_operator(A)


@on_grids
def test_the_symbol_of_the_stencil(grid: Grid) -> None:
    A = Fourier(laplacian_symbol(grid, spectral=False, dtype=D), grid)
    want = Laplacian(grid, dtype=D).to_dense()
    assert (A.to_dense() - want).abs().max() < 1e-12 * want.abs().max()


def test_spectral_derivatives_are_exact() -> None:
    grid = Grid((9, 8), lengths=(1.0, 3.0), border="periodic")
    x = grid.coordinates(dtype=D)
    u = torch.cos(2 * math.pi * (3 * x[:, 0] - 2 * x[:, 1] / 3)) + 1
    A = Fourier(laplacian_symbol(grid, dtype=D), grid)
    assert torch.allclose(A @ u, -((2 * math.pi) ** 2) * (9 + 4 / 9) * (u - 1))


@on_grids
def test_functions_are_exact_and_differentiable(grid: Grid) -> None:
    s = -symbols(grid)["minus laplacian"] / 10
    s = s.clone().requires_grad_()
    A, v, w = Fourier(s, grid), draw(grid.size, seed=1), draw(grid.size, seed=2)
    E = A.apply_function(lambda s: torch.exp(0.3 * s))
    assert E.dtype == D and E.psd
    exact = torch.linalg.matrix_exp(0.3 * matrix(s)) @ v.to(C)
    assert torch.allclose(E @ v, exact.real)
    krylov = ritz.expm_multiply(A, v, 0.3)
    grads = [torch.autograd.grad(w @ y, s)[0] for y in (E @ v, exact.real, krylov)]
    assert (grads[0] - grads[1]).norm() <= 1e-10 * grads[1].norm()
    assert (grads[2] - grads[1]).norm() <= 1e-9 * grads[1].norm()
    unitary = A.apply_function(lambda s: torch.exp(-1j * s))
    assert unitary.dtype == C
    psi = draw(grid.size, dtype=C)
    assert torch.allclose((unitary @ psi).norm(), psi.norm())
    assert Fourier(s, grid, dtype=C).apply_function(torch.exp).dtype == C


@on_grids
@pytest.mark.parametrize("name", symbols(GRIDS["odd"]).keys())
@pytest.mark.parametrize("dtype", [D, C])
def test_gradients_in_the_symbol(grid: Grid, name: str, dtype: torch.dtype) -> None:
    s = symbols(grid)[name].clone().requires_grad_()
    X, W = draw(grid.size, 2, dtype=dtype), draw(grid.size, 2, dtype=dtype, seed=1)
    A, M = Fourier(s, grid, dtype=dtype), matrix(s)
    dense = M if dtype == C else M.real
    for product, truth in ((A @ X, dense @ X), (A.mH @ X, dense.mH @ X)):
        found, wanted = (
            torch.autograd.grad((W.conj() * y).sum().real, s, retain_graph=True)[0] for y in (product, truth)
        )
        assert (found - wanted).norm() <= 1e-10 * wanted.norm()


def test_a_change_in_place_is_followed() -> None:
    grid = GRIDS["2d"]
    s = symbols(grid)["real"]
    s = s + s.flip(0, 1).roll((1, 1), (0, 1))
    A, v = Fourier(s, grid), draw(grid.size)
    before = A @ v
    s.mul_(3)
    assert torch.allclose(A @ v, 3 * before)


def test_what_is_refused() -> None:
    grid = GRIDS["2d"]
    with pytest.raises(OperandError, match=r"no Fourier symbol; expected border='periodic'"):
        Fourier(torch.ones(3), Grid(3))
    with pytest.raises(
        OperandError, match=r"symbol has shape \(4, 3\); expected a tensor of the grid's shape \(3, 4\)"
    ):
        Fourier(torch.ones(4, 3), grid)
    with pytest.raises(OperandError, match="dtype=torch.float64 came with a symbol in torch.float32"):
        Fourier(torch.ones(3, 4), grid, dtype=D)
    with pytest.raises(NonFiniteError, match="symbol has 12 NaN or Inf"):
        Fourier(torch.full((3, 4), math.nan), grid)
    with pytest.raises(OperandError, match="no Fourier symbol"):
        laplacian_symbol(Grid((3, 3), border=("periodic", "neumann")))
