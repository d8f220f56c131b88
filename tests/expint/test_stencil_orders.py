"""Orders of convergence of differential operators on grids, and their known eigenfunctions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ritz
from ritz.expint.grid import Grid
from ritz.expint.stencils import Advection, Diffusion, Laplacian

D = torch.float64
BORDERS = ("dirichlet", "neumann", "periodic")


def slope(error: Callable[[int], float], sizes: tuple[int, ...]) -> float:
    """The order p of an error ~ n^(-p), fitted in log n."""
    x, y = torch.tensor(sizes, dtype=D).log(), torch.tensor([error(n) for n in sizes], dtype=D).log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def gradient_of(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0]


def divergence(flux: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    F = flux(x)
    return torch.stack(
        [torch.autograd.grad(F[:, a].sum(), x, retain_graph=True)[0][:, a] for a in range(F.shape[1])]
    ).sum(0)


def error_of_solve(
    A: ritz.LinearOperator, u: Callable, Lu: Callable[[Tensor], Tensor], power: float = math.inf
) -> float:
    """The norm (max, or root mean square) of u_h − u where (1 − A) u_h = u − L u."""
    x = A.grid.coordinates(dtype=D).requires_grad_()
    f = (u(x) - Lu(x)).detach()
    found = torch.linalg.solve(torch.eye(A.shape[0], dtype=D) - A.to_dense(), f)
    return float((found - u(x)).detach().norm(power)) / (A.shape[0] ** 0.5 if power == 2 else 1)


SMOOTH = {  # satisfies the border's condition on [0, 1]
    "dirichlet": lambda x: torch.sin(math.pi * x) * torch.exp(x),
    "neumann": lambda x: torch.cos(math.pi * x) + torch.cos(2 * math.pi * x),
    "periodic": lambda x: torch.exp(torch.sin(2 * math.pi * x)),
}


def wavy(x: Tensor) -> Tensor:
    return 1 + 0.5 * torch.sin(2 * math.pi * x).prod(1)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("kind", ["function", "node values", "harmonic"])
def test_diffusion_is_of_second_order(border: str, kind: str) -> None:
    u = lambda x: SMOOTH[border](x[:, 0])

    def error(n: int) -> float:
        grid = Grid(n, border=border)
        values = wavy(grid.coordinates(dtype=D))
        mean = "harmonic" if kind == "harmonic" else "arithmetic"
        A = Diffusion(wavy, grid, dtype=D) if kind == "function" else Diffusion(values, grid, mean=mean)
        return error_of_solve(A, u, lambda x: divergence(lambda y: wavy(y)[:, None] * gradient_of(u, y), x))

    assert abs(slope(error, (24, 48, 96, 192)) - 2) < 0.2


@pytest.mark.parametrize("border", [("dirichlet", "dirichlet"), ("dirichlet", "periodic"), ("periodic", "periodic")])
def test_a_varying_tensor_is_of_second_order(border: tuple[str, str]) -> None:
    u = lambda x: SMOOTH[border[0]](x[:, 0]) * SMOOTH[border[1]](x[:, 1])

    def K(x: Tensor) -> Tensor:
        angle = 1 + 0.2 * torch.sin(2 * math.pi * (x[:, 0] + x[:, 1]))
        b = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
        return b[:, :, None] * b[:, None, :] + 0.2 * torch.eye(2, dtype=D)

    def error(n: int) -> float:
        shape = [m - (b == "dirichlet") for m, b in zip((n, n + 1), border)]
        grid = Grid(shape, border=border)
        values = K(grid.coordinates(dtype=D)).permute(1, 2, 0).reshape(2, 2, *grid.shape)
        flux = lambda y: (K(y) @ gradient_of(u, y)[:, :, None]).squeeze(2)
        return error_of_solve(Diffusion(values, grid), u, lambda x: divergence(flux, x), power=2)

    assert abs(slope(error, (14, 21, 31)) - 2) < 0.2


def test_a_tensor_lets_nothing_through_a_neumann_border() -> None:
    # u with K∇u·n = 0 at x = 0 and x = 1, though ∂u/∂x is not
    k = torch.tensor([[1.0, 0.6], [0.6, 0.9]], dtype=D)
    tilt = float(k[0, 1] / k[0, 0])
    u = lambda x: torch.cos(2 * math.pi * (x[:, 1] - tilt * x[:, 0])) * torch.cos(math.pi * x[:, 0])

    def error(n: int) -> float:
        grid = Grid((n, n), border=("neumann", "periodic"))
        A = Diffusion(k[:, :, None, None].expand(2, 2, n, n).contiguous(), grid)
        return error_of_solve(A, u, lambda x: divergence(lambda y: gradient_of(u, y) @ k, x))

    assert abs(slope(error, (16, 24, 32)) - 2) < 0.2


@pytest.mark.parametrize("scheme, order", [("upwind", 1), ("central", 2)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_order_of_advection(scheme: str, order: int, sign: float) -> None:
    v, u = lambda x: sign * (1 + 0.3 * torch.sin(2 * math.pi * x[:, 0])), lambda x: SMOOTH["periodic"](x[:, 0])

    def error(n: int) -> float:
        grid = Grid(n, border="periodic")
        A = Advection(v(grid.coordinates(dtype=D)), grid, scheme)
        return error_of_solve(A, u, lambda x: -v(x) * gradient_of(u, x)[:, 0])

    assert abs(slope(error, (64, 128, 256, 384)) - order) < 0.2


@pytest.mark.parametrize("border", BORDERS)
def test_laplacian_has_the_known_eigenfunctions(border: str) -> None:
    grid = Grid((6, 5), lengths=(1.0, 2.0), border=border)
    x = grid.coordinates(dtype=D)
    L = torch.tensor(grid.lengths, dtype=D)
    waves = {"dirichlet": torch.sin(math.pi * x / L), "neumann": torch.cos(math.pi * x / L)}
    v = waves.get(border, torch.cos(2 * math.pi * x / L)).prod(1)
    h = torch.tensor(grid.h, dtype=D)
    angle = math.pi * h / L * (2 if border == "periodic" else 1) / 2
    value = -((2 / h * torch.sin(angle)) ** 2).sum()
    A = Laplacian(grid, dtype=D)
    assert (A @ v - value * v).abs().max() < 1e-11
