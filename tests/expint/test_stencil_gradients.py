"""Gradients of differential operators in their coefficients, against autograd through matrices built by loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.expint import stencil_oracles as oracle
from torch import Tensor, nn

import ritz
from ritz.expint.grid import Grid
from ritz.expint.stencils import Advection, Diffusion, Hamiltonian, WaveOperator

D, C = torch.float64, torch.complex128
GRIDS = {
    "1d": Grid(6, border="dirichlet"),
    "2d neumann": Grid((3, 4), lengths=(1.0, 2.0)),
    "2d dirichlet periodic": Grid((4, 3), border=("dirichlet", "periodic")),
    "3d": Grid((2, 3, 2), spacing=(0.5, 0.8, 1.0), border=("neumann", "periodic", "dirichlet")),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return (draw(*shape, seed=seed).abs() + 0.1).requires_grad_()


def tensor_field(grid: Grid) -> Tensor:
    d = grid.ndim
    L = draw(*grid.shape, d, d)
    K = (L @ L.mT + 0.1 * torch.eye(d, dtype=D)).movedim((-2, -1), (0, 1)).contiguous()
    return K.requires_grad_()


def laplacian(grid: Grid) -> Tensor:
    return oracle.diffusion_of_nodes(grid, [torch.ones(grid.shape, dtype=D)] * grid.ndim)


def spread(values: list[Tensor], grid: Grid) -> list[Tensor]:
    return [v.expand(grid.shape) for v in values]


Case = tuple[list[Tensor], Callable[..., ritz.LinearOperator], Callable[..., Tensor]]


def cases(grid: Grid) -> dict[str, Case]:
    """Tensors, the operator of them, and its matrix."""
    shape, axes = grid.shape, range(grid.ndim)
    nodes = lambda c, mean=oracle.arithmetic: oracle.diffusion_of_nodes(grid, spread(c, grid), mean)
    vectors = [draw(*shape, seed=a).requires_grad_() for a in axes]
    numbers = [draw(1, seed=a).reshape(()).requires_grad_() for a in axes]
    column = lambda t: t.expand(shape).reshape(-1)
    hamiltonian = lambda V, m: torch.diag(column(V)) - laplacian(grid) / (2 * m)
    wave = lambda c: -torch.diag(column(c)) @ laplacian(grid) @ torch.diag(column(c))
    return {
        "number": ([positive()], lambda c, **k: Diffusion(c, grid, **k), lambda c: nodes([c] * grid.ndim)),
        "nodes": ([positive(*shape)], lambda c, **k: Diffusion(c, grid, **k), lambda c: nodes([c] * grid.ndim)),
        "harmonic": (
            [positive(*shape)],
            lambda c, **k: Diffusion(c, grid, mean="harmonic", negative=True, **k),
            lambda c: -nodes([c] * grid.ndim, oracle.harmonic),
        ),
        "axes": (
            [positive(*shape, seed=a) if a != 1 else positive() for a in axes],
            lambda *c, **k: Diffusion(list(c), grid, **k),
            lambda *c: nodes(list(c)),
        ),
        "tensor": (
            [tensor_field(grid)],
            lambda K, **k: Diffusion(K, grid, **k),
            lambda K: oracle.diffusion_of_tensor(grid, (K + K.transpose(0, 1)) / 2),
        ),
        "upwind": (
            vectors,
            lambda *v, **k: Advection(v, grid, **k),
            lambda *v: oracle.advection(grid, list(v), "upwind"),
        ),
        "central": (
            numbers,
            lambda *v, **k: Advection(v, grid, "central", **k),
            lambda *v: oracle.advection(grid, spread(list(v), grid), "central"),
        ),
        "hamiltonian": (
            [draw(*shape).requires_grad_(), positive()],
            lambda V, m, **k: Hamiltonian(V, grid, m, **k),
            hamiltonian,
        ),
        "potential number": (
            [draw(1).reshape(()).requires_grad_()],
            lambda V, **k: Hamiltonian(V, grid, **k),
            lambda V: hamiltonian(V, 1.0),
        ),
        "wave": ([positive(*shape)], lambda c, **k: WaveOperator(c, grid, **k), wave),
        "speed number": ([positive()], lambda c, **k: WaveOperator(c, grid, **k), wave),
    }


def agree(value: Tensor, truth: Tensor, tensors: list[Tensor], rtol: float = 1e-10) -> None:
    assert abs(value - truth) <= rtol * abs(truth)
    found = torch.autograd.grad(value, tensors, retain_graph=True)
    wanted = torch.autograd.grad(truth, tensors, retain_graph=True)
    for g, w in zip(found, wanted, strict=True):
        assert g.dtype == w.dtype and w.norm() > 0
        assert (g - w).norm() <= rtol * w.norm()


def real_part(weights: Tensor, y: Tensor) -> Tensor:
    product = (weights.conj() * y).sum()
    return product.real if product.is_complex() else product


names = pytest.mark.parametrize("name", cases(GRIDS["1d"]).keys())


@names
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_product(grid: Grid, name: str) -> None:
    tensors, operator, matrix = cases(grid)[name]
    X, W = draw(grid.size, 3, seed=5), draw(grid.size, 3, seed=6)
    agree(real_part(W, operator(*tensors) @ X), real_part(W, matrix(*tensors) @ X), tensors)


@names
def test_a_product_with_complex_vectors(name: str) -> None:
    grid = GRIDS["2d dirichlet periodic"]
    tensors, operator, matrix = cases(grid)[name]
    X, W = draw(grid.size, 2, seed=5, dtype=C), draw(grid.size, 2, seed=6, dtype=C)
    M = matrix(*tensors).to(C)
    agree(real_part(W, operator(*tensors, dtype=C) @ X), real_part(W, M @ X), tensors)
    agree(real_part(W, operator(*tensors, dtype=C).mH @ X), real_part(W, M.mH @ X), tensors)


@names
@pytest.mark.parametrize("grid", ["2d neumann", "3d"])
def test_an_exponential(grid: str, name: str) -> None:
    tensors, operator, matrix = cases(GRIDS[grid])[name]
    v, w, t = draw(GRIDS[grid].size, seed=5), draw(GRIDS[grid].size, seed=6), torch.tensor(0.02, dtype=D)
    t.requires_grad_()
    value = w @ ritz.expm_multiply(operator(*tensors), v, t)
    agree(value, w @ (torch.linalg.matrix_exp(t * matrix(*tensors)) @ v), [*tensors, t])


@names
def test_the_assembled_matrix(name: str) -> None:
    grid = GRIDS["2d dirichlet periodic"]
    tensors, operator, matrix = cases(grid)[name]
    W = draw(grid.size, grid.size, seed=6)
    agree((W * operator(*tensors).assemble().to_dense()).sum(), (W * matrix(*tensors)).sum(), tensors)
    if name != "central":  # whose diagonal is zero here
        agree((W.diagonal() * operator(*tensors).diagonal()).sum(), (W * matrix(*tensors)).diagonal().sum(), tensors)


@pytest.mark.parametrize("border", ["dirichlet", "neumann", "periodic"])
def test_a_network_as_coefficient(border: str) -> None:
    grid = Grid((3, 4), lengths=(1.0, 0.7), border=border)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1), nn.Softplus()).double()
    parameters = list(network.parameters())
    v, w = draw(12, seed=5), draw(12, seed=6)
    value = w @ ritz.expm_multiply(Diffusion(network, grid), v, 0.05)
    M = oracle.diffusion_of_function(grid, network)
    agree(value, w @ (torch.linalg.matrix_exp(0.05 * M) @ v), parameters)


def test_a_network_as_potential_and_as_speed() -> None:
    grid = GRIDS["2d neumann"]
    network = nn.Sequential(nn.Linear(2, 1), nn.Softplus()).double()
    x = torch.tensor([oracle.position(grid, i) for i in oracle.nodes(grid)], dtype=D)
    w, v, lap = draw(12, seed=5), draw(12, seed=6), laplacian(grid)
    H = torch.diag(network(x).reshape(-1)) - lap / 2
    agree(w @ (Hamiltonian(network, grid) @ v), w @ (H @ v), list(network.parameters()))
    c = torch.diag(network(x).reshape(-1))
    agree(w @ (WaveOperator(network, grid) @ v), -w @ (c @ lap @ c @ v), list(network.parameters()))


def test_coefficients_that_are_computed_from_each_other() -> None:
    grid = GRIDS["2d neumann"]
    c = positive(*grid.shape)
    v, w = draw(12, seed=5), draw(12, seed=6)
    M = oracle.diffusion_of_nodes(grid, [c, 3 * c**2])
    agree(w @ (Diffusion([c, 3 * c**2], grid) @ v), w @ M @ v, [c])
    value = w @ ritz.expm_multiply(Diffusion([c, 3 * c**2], grid), v, 0.02)
    agree(value, w @ torch.linalg.matrix_exp(0.02 * M) @ v, [c])


def test_schroedinger_evolution_keeps_the_norm_and_has_gradients() -> None:
    grid = Grid((4, 3), border=("dirichlet", "periodic"))
    V = draw(4, 3).requires_grad_()
    psi, w = draw(12, seed=1, dtype=C), draw(12, seed=2, dtype=C)
    H = Hamiltonian(V, grid, dtype=C)
    later = ritz.expm_multiply(H, psi, -0.3j)
    assert abs(later.norm() - psi.norm()) < 1e-12
    M = torch.diag(V.reshape(-1)) - laplacian(grid) / 2
    truth = torch.linalg.matrix_exp(-0.3j * M) @ psi
    agree(real_part(w, later), real_part(w, truth), [V])
    real = ritz.expm_multiply(Hamiltonian(V, grid), psi.real, -0.3j)
    agree(real_part(w, real), real_part(w, torch.linalg.matrix_exp(-0.3j * M) @ psi.real.to(C)), [V])


def test_transforms_of_torch() -> None:
    grid = GRIDS["2d dirichlet periodic"]
    c, v, w = positive(*grid.shape).detach(), draw(12, seed=5), draw(12, seed=6)
    f = lambda c: (w @ (Diffusion(c, grid) @ v)) ** 2
    g = lambda c: (w @ (oracle.diffusion_of_nodes(grid, [c, c]) @ v)) ** 2
    wanted = torch.autograd.functional.jacobian(g, c)
    assert torch.allclose(torch.func.grad(f)(c), wanted)
    A = Diffusion(c, grid)
    assert torch.allclose(torch.func.vmap(lambda x: A @ x)(torch.stack([v, w])), torch.stack([A @ v, A @ w]))
    h = lambda c: w @ ritz.expm_multiply(Diffusion(c, grid), v, 0.01)
    (wanted,) = torch.autograd.grad(h(c.requires_grad_()), c)
    assert torch.allclose(torch.func.grad(h)(c.detach()), wanted)


def test_training_in_place_recovers_a_coefficient() -> None:
    grid = Grid((5, 5))
    c_true = 1 + 0.5 * torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=D)
    U = draw(25, 6)
    target = ritz.expm_multiply(Diffusion(c_true, grid), U, 0.01)
    log_c = torch.zeros(5, 5, dtype=D, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_c], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (ritz.expm_multiply(Diffusion(log_c.exp(), grid), U, 0.01) - target).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert (log_c.detach().exp() - c_true).abs().max() < 0.02
