"""Differential operators on grids: matrices against loops, products, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.expint import stencil_oracles as oracle
from torch import Tensor

import ritz
from ritz.errors import DomainError, NonFiniteError, OperandError
from ritz.expint.grid import Grid
from ritz.expint.stencils import Advection, Diffusion, Hamiltonian, Laplacian, WaveOperator
from ritz.operators import Diagonal, Sparse

D, C = torch.float64, torch.complex128
BORDERS = ("dirichlet", "neumann", "periodic")
GRIDS = {
    **{f"1d {b}": Grid(5, lengths=1.5, border=b) for b in BORDERS},
    **{f"2d {a} {b}": Grid((3, 4), lengths=(1.0, 2.0), border=(a, b)) for a, b in itertools.product(BORDERS, BORDERS)},
    "3d mixed": Grid((3, 2, 3), spacing=(0.5, 1.0, 0.7), border=BORDERS),
    "3d neumann": Grid((2, 3, 3), spacing=0.6, border="neumann"),
    "3d dirichlet": Grid((3, 2, 2), spacing=(0.5, 0.8, 1.0), border="dirichlet"),
    "3d periodic": Grid((3, 3, 3), spacing=(0.5, 0.8, 1.0), border="periodic"),
    "two nodes, one node": Grid((2, 1), border=("periodic", "neumann")),
    "a node that is its own neighbour": Grid((3, 1), border=("dirichlet", "periodic")),
}
on_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


class Draw:
    """Random coefficients from one seed."""

    def __init__(self, grid: Grid, seed: int = 0) -> None:
        self.grid, self.generator = grid, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape or self.grid.shape, generator=self.generator, dtype=D)

    def positive(self) -> Tensor:
        return torch.rand(self.grid.shape, generator=self.generator, dtype=D) + 0.1

    def tensor(self) -> Tensor:
        """Positive definite at every node."""
        d = self.grid.ndim
        L = self.normal(*self.grid.shape, d, d)
        return (L @ L.mT + 0.1 * torch.eye(d, dtype=D)).movedim((-2, -1), (0, 1)).contiguous()


def same(A: ritz.LinearOperator, M: Tensor) -> None:
    """Products, the assembled matrix and the diagonal against a dense matrix."""
    n, size = M.shape[0], M.abs().max()
    assert (A.to_dense() - M).abs().max() <= 1e-13 * size
    assert (A.assemble().to_dense() - M).abs().max() <= 1e-13 * size
    assert (A.diagonal() - M.diagonal()).abs().max() <= 1e-13 * size
    x = torch.linspace(-1, 2, n, dtype=D)
    assert (A @ x - M @ x).abs().max() <= 1e-12 * size
    assert (A.mH @ x - M.mT @ x).abs().max() <= 1e-12 * size


def semidefinite(M: Tensor, grid: Grid) -> None:
    """Symmetric, negative semidefinite; rows sum to zero at nodes away from Dirichlet borders."""
    assert torch.equal(M, M.mT)
    assert torch.linalg.eigvalsh(M).max() <= 1e-13 * M.abs().max()
    if "dirichlet" not in grid.border:
        assert M.sum(1).abs().max() <= 1e-13 * M.abs().max()
    else:
        assert torch.linalg.eigvalsh(M).max() < 0


# -- matrices ---------------------------------------------------------------------------------------------------------


@on_grids
@pytest.mark.parametrize("mean", ["arithmetic", "harmonic"])
def test_diffusion_with_node_values(grid: Grid, mean: str) -> None:
    c = Draw(grid).positive()
    M = oracle.diffusion_of_nodes(grid, [c] * grid.ndim, getattr(oracle, mean))
    A = Diffusion(c, grid, mean=mean)
    assert A.hermitian and not A.psd
    same(A, M)
    semidefinite(A.to_dense(), grid)
    negative = Diffusion(c, grid, mean=mean, negative=True)
    assert negative.psd
    same(negative, -M)


@on_grids
def test_diffusion_along_axes(grid: Grid) -> None:
    draw = Draw(grid)
    given = [draw.positive() if axis == 1 else torch.tensor(1.0 + axis, dtype=D) for axis in range(grid.ndim)]
    M = oracle.diffusion_of_nodes(grid, [c.expand(grid.shape) for c in given])
    same(Diffusion(given, grid), M)


@on_grids
def test_diffusion_with_a_tensor(grid: Grid) -> None:
    K = Draw(grid).tensor()
    A = Diffusion(K, grid)
    same(A, oracle.diffusion_of_tensor(grid, K))
    semidefinite(A.to_dense(), grid)


@on_grids
def test_a_diagonal_tensor_is_the_five_point_stencil(grid: Grid) -> None:
    c = [Draw(grid, seed).positive() for seed in range(grid.ndim)]
    K = torch.diag_embed(torch.stack(c, -1)).movedim((-2, -1), (0, 1)).contiguous()
    same(Diffusion(K, grid), oracle.diffusion_of_nodes(grid, c))


@pytest.mark.parametrize("b", [(0.6, 0.8), (0.0, 1.0)])
def test_a_singular_tensor_diffuses_along_one_direction_only(b: tuple[float, float]) -> None:
    grid, along = Grid((4, 4)), torch.tensor(b, dtype=D)
    M = Diffusion(torch.outer(along, along)[:, :, None, None].expand(2, 2, 4, 4).contiguous(), grid).to_dense()
    semidefinite(M, grid)
    if b[0] == 0:
        assert torch.equal(M, Diffusion([0.0, 1.0], grid, dtype=D).to_dense())


@on_grids
def test_diffusion_with_a_function(grid: Grid) -> None:
    c = lambda x: 1 + (x * torch.arange(1, grid.ndim + 1, dtype=D)).sum(1) ** 2
    same(Diffusion(c, grid, dtype=D), oracle.diffusion_of_function(grid, c))
    column = Diffusion(lambda x: c(x).unsqueeze(1), grid, dtype=D)
    assert torch.equal(column.to_dense(), Diffusion(c, grid, dtype=D).to_dense())


@on_grids
def test_laplacian(grid: Grid) -> None:
    M = oracle.diffusion_of_nodes(grid, [torch.ones(grid.shape, dtype=D)] * grid.ndim)
    same(Laplacian(grid, dtype=D), M)
    assert Laplacian(grid).dtype == torch.get_default_dtype()


@on_grids
@pytest.mark.parametrize("scheme", ["upwind", "central"])
def test_advection(grid: Grid, scheme: str) -> None:
    draw = Draw(grid)
    v = [draw.normal() for _ in range(grid.ndim)]
    A = Advection(v, grid, scheme)
    same(A, oracle.advection(grid, v, scheme))
    if "dirichlet" not in grid.border:
        assert A.to_dense().sum(1).abs().max() <= 1e-13 * max(float(A.to_dense().abs().max()), 1.0)


def test_advection_takes_one_number_or_a_tensor_with_a_leading_axis() -> None:
    line, plane = GRIDS["1d periodic"], GRIDS["2d neumann periodic"]
    along = torch.linspace(-1, 1, 5, dtype=D)
    for given in (along, [along], along.unsqueeze(0)):
        same(Advection(given, line), oracle.advection(line, [along], "upwind"))
    assert torch.equal(Advection(2.0, line, dtype=D).to_dense(), Advection([2.0], line, dtype=D).to_dense())
    v = torch.tensor([1.0, -2.0], dtype=D)
    expected = oracle.advection(plane, [x.expand(plane.shape) for x in v], "upwind")
    for given in (v, (1.0, -2.0), v[:, None, None].expand(2, *plane.shape)):
        same(Advection(given, plane, dtype=D), expected)


@on_grids
def test_hamiltonian(grid: Grid) -> None:
    V = Draw(grid).normal()
    lap = oracle.diffusion_of_nodes(grid, [torch.ones(grid.shape, dtype=D)] * grid.ndim)
    same(Hamiltonian(V, grid, 2.5), -lap / 5 + torch.diag(V.reshape(-1)))
    harmonic = Hamiltonian(lambda x: (x**2).sum(1) / 2, grid, dtype=D)
    places = torch.tensor([oracle.position(grid, i) for i in oracle.nodes(grid)], dtype=D)
    same(harmonic, -lap / 2 + torch.diag((places**2).sum(1) / 2))


@on_grids
def test_wave_operator(grid: Grid) -> None:
    c = Draw(grid).positive()
    lap = oracle.diffusion_of_nodes(grid, [torch.ones(grid.shape, dtype=D)] * grid.ndim)
    S = WaveOperator(c, grid)
    assert S.psd
    same(S, -torch.diag(c.reshape(-1)) @ lap @ torch.diag(c.reshape(-1)))
    algebra = Diagonal(c.reshape(-1)) @ Laplacian(grid, negative=True, dtype=D) @ Diagonal(c.reshape(-1))
    assert torch.allclose(S.to_dense(), algebra.to_dense())


def test_where_the_unknowns_and_the_faces_are() -> None:
    grid = Grid((2, 3), lengths=(3.0, 3.0), border=("dirichlet", "neumann"))
    assert grid.h == (1.0, 1.0) and grid.size == 6 and grid.ndim == 2
    nodes = [[1, 0.5], [1, 1.5], [1, 2.5], [2, 0.5], [2, 1.5], [2, 2.5]]
    assert grid.coordinates(dtype=D).tolist() == nodes
    assert grid.face_shape(0) == (3, 3) and grid.face_shape(1) == (2, 2)
    assert grid.faces(0, dtype=D)[::3].tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5]]
    assert grid.faces(1, dtype=D).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    ring = Grid(4, lengths=2.0, border="periodic")
    assert ring.coordinates(dtype=D).squeeze(1).tolist() == [0, 0.5, 1.0, 1.5]
    assert ring.faces(0, dtype=D).squeeze(1).tolist() == [0.25, 0.75, 1.25, 1.75]
    assert Grid(4, spacing=0.5, border="periodic") == ring and hash(Grid((4,), lengths=2.0, border="periodic")) == hash(
        ring
    )


# -- products ---------------------------------------------------------------------------------------------------------


def operators(grid: Grid, dtype: torch.dtype) -> dict[str, ritz.LinearOperator]:
    draw = Draw(grid)
    grad = lambda x: x.requires_grad_()
    return {
        "diffusion": Diffusion(grad(draw.positive()), grid, dtype=dtype),
        "minus diffusion": Diffusion(grad(draw.normal(1).reshape(()) ** 2), grid, negative=True, dtype=dtype),
        "harmonic": Diffusion([grad(draw.positive()) for _ in grid.shape], grid, mean="harmonic", dtype=dtype),
        "function": Diffusion(lambda x: (x**2).sum(1) + 1, grid, dtype=dtype),
        "tensor": Diffusion(grad(draw.tensor()), grid, dtype=dtype),
        "upwind": Advection([grad(draw.normal()) for _ in grid.shape], grid, dtype=dtype),
        "central": Advection([grad(draw.normal(1).reshape(())) for _ in grid.shape], grid, "central", dtype=dtype),
        "hamiltonian": Hamiltonian(grad(draw.normal()), grid, grad(draw.positive().sum().detach()), dtype=dtype),
        "wave": WaveOperator(grad(draw.positive()), grid, dtype=dtype),
    }


CHECKED = ("1d dirichlet", "2d neumann periodic", "2d periodic dirichlet", "3d mixed", "two nodes, one node")


@pytest.mark.parametrize("name", operators(GRIDS["1d neumann"], D).keys())
@pytest.mark.parametrize("grid", CHECKED)
def test_the_contract(grid: str, name: str) -> None:
    dtypes = (D, C) if grid == "2d neumann periodic" else (D,)
    for dtype in dtypes:
        ritz.testing.check_operator(operators(GRIDS[grid], dtype)[name])


@pytest.mark.parametrize("name", operators(GRIDS["1d neumann"], D).keys())
def test_blocks_of_either_layout_and_complex_vectors(name: str) -> None:
    grid = Grid((7, 6), border=("neumann", "periodic"))
    A, Ac = operators(grid, D)[name], operators(grid, C)[name]
    M = A.to_dense().detach()
    X = torch.randn(42, 5, generator=torch.Generator().manual_seed(0), dtype=D)
    for block in (X, X.mT.contiguous().mT, X[:, ::2], X.flip(0)):
        assert torch.allclose((A @ block).detach(), M @ block)
        assert torch.allclose((A @ block[:, 0]).detach(), M @ block[:, 0])
    Z = torch.complex(X, X.flip(1))
    for block in (Z, Z.conj(), Z[:, :1]):
        assert torch.allclose((Ac @ block).detach(), M.to(C) @ block)
        assert torch.allclose((Ac.mH @ block).detach(), M.mT.to(C) @ block)


def test_single_precision() -> None:
    grid = Grid((16, 16), border="periodic")
    c = Draw(grid).positive()
    x = torch.randn(256, 2, dtype=D)
    A, B = Diffusion(c, grid), Diffusion(c.float(), grid)
    assert B.dtype == torch.float32
    assert (B @ x.float() - A @ x).abs().max() < 1e-5 * float((A @ x).abs().max())


def test_advection_and_diffusion_add_up() -> None:
    grid = GRIDS["2d dirichlet periodic"]
    draw = Draw(grid)
    c, v = draw.positive(), [draw.normal(), draw.normal()]
    A = Diffusion(c, grid) + Advection(v, grid)
    M = oracle.diffusion_of_nodes(grid, [c, c]) + oracle.advection(grid, v, "upwind")
    x = draw.normal(grid.size)
    assert torch.allclose(A @ x, M @ x) and torch.allclose(A.mH @ x, M.mT @ x)
    y = ritz.expm_multiply(A, x, 0.1)
    assert torch.allclose(y, torch.linalg.matrix_exp(0.1 * M) @ x)


def test_the_assembled_matrix_goes_to_a_direct_solver() -> None:
    grid = Grid((4, 5), border=("dirichlet", "periodic"))
    c = Draw(grid).positive().requires_grad_()
    S = Diffusion(c, grid, negative=True).assemble()
    assert isinstance(S, Sparse) and S.hermitian and S.psd
    b = torch.linspace(0, 1, 20, dtype=D)
    x = ritz.solve(S, b)
    M = -oracle.diffusion_of_nodes(grid, [c, c])
    want = torch.linalg.solve(M, b)
    assert torch.allclose(x, want, rtol=1e-5)
    (found,) = torch.autograd.grad(x.square().sum(), c)
    (truth,) = torch.autograd.grad(want.square().sum(), c)
    assert torch.allclose(found, truth, rtol=1e-4)


def test_threads_share_an_operator() -> None:
    grid = Grid((40, 40))
    A = Diffusion(Draw(grid).positive(), grid)
    X = torch.randn(1600, 32, dtype=D)
    want = A @ X
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for j, y in enumerate(pool.map(lambda j: A @ X[:, j], range(32))):
                assert torch.allclose(y, want[:, j])


def test_inference_mode_leaves_nothing_behind() -> None:
    grid = Grid((5, 5))
    A = Diffusion(Draw(grid).positive(), grid)
    x = torch.randn(25, dtype=D)
    with torch.inference_mode():
        inside = A @ x
    y = x.clone().requires_grad_()
    (A @ y).sum().backward()
    assert torch.equal(A @ x, inside) and torch.allclose(y.grad, A @ torch.ones(25, dtype=D))


def test_a_change_in_place_is_followed_and_checked() -> None:
    grid = GRIDS["2d neumann neumann"]
    draw = Draw(grid)
    c, x = draw.positive().requires_grad_(), draw.normal(grid.size)
    A, v = Diffusion(c, grid), [draw.normal(), draw.normal()]
    B = Advection(v, grid)
    before, across = (A @ x).detach(), B.mH @ x
    with torch.no_grad():
        c.mul_(2)
    v[0].zero_()
    assert torch.allclose((A @ x).detach(), 2 * before)
    assert not torch.allclose(B.mH @ x, across)
    assert torch.allclose(B.mH @ x, oracle.advection(grid, v, "upwind").mT @ x)
    with torch.no_grad():
        c[0, 0] = -0.5
    with pytest.raises(DomainError, match="negative diffusion: coefficient has 1 negative among 12"):
        A @ x


# -- refusals ---------------------------------------------------------------------------------------------------------

LINE, PLANE = Grid(4), Grid((3, 4))
BAD = {
    "shape": (lambda: Grid((3, 0)), OperandError, "expected one, two or three integers >= 1"),
    "axes": (lambda: Grid((2, 2, 2, 2)), OperandError, "expected one, two or three integers"),
    "no border": (lambda: Grid(3, border=None), OperandError, "got border=None"),
    "border": (lambda: Grid(3, border="open"), OperandError, "got border='open'; expected 'dirichlet'"),
    "borders": (lambda: Grid((3, 3), border=("neumann",)), OperandError, "one for all axes or one each"),
    "lengths": (lambda: Grid((3, 3), lengths=(1.0, -1.0)), OperandError, "got lengths=.*positive number, or 2"),
    "spacing": (lambda: Grid(3, spacing=0.0), OperandError, "got spacing=0.0"),
    "lengths and spacing": (lambda: Grid(3, lengths=2.0, spacing=0.1), OperandError, "expected one of the two"),
    "no grid": (lambda: Laplacian((3, 3)), OperandError, "grid is a tuple; expected a Grid"),
    "negative": (lambda: Diffusion(-1.0, LINE), DomainError, "negative diffusion: coefficient has 1 negative"),
    "one of two": (lambda: Diffusion([1.0, -1.0], PLANE), DomainError, r"coefficient\[1\] has 1 negative"),
    "NaN": (lambda: Diffusion(torch.tensor([1.0, math.nan, 1.0, 1.0]), LINE), NonFiniteError, "coefficient has 1 NaN"),
    "NaN of a function": (lambda: Diffusion(lambda x: x[:, 0] / 0 - 1 / x[:, 0] * 0, LINE), NonFiniteError, "NaN or"),
    "a shape": (lambda: Diffusion(torch.ones(4, 3), PLANE), OperandError, r"coefficient has shape \(4, 3\); expected"),
    "how many": (lambda: Diffusion([1.0], PLANE), OperandError, "1 coefficients on a grid of 2 axes"),
    "a tensor": (lambda: Diffusion(torch.ones(2, 2, 4, 3), PLANE), OperandError, r"expected a tensor at every node"),
    "no tensor": (lambda: Diffusion("1", LINE), OperandError, "coefficient is a str; expected a real number"),
    "complex": (lambda: Diffusion(torch.ones(4, dtype=C), LINE), OperandError, "expected a real floating-point dtype"),
    "integers": (lambda: Diffusion(torch.ones(4, dtype=torch.long), LINE), OperandError, "is torch.int64; expected"),
    "a dtype": (lambda: Diffusion(torch.ones(4), LINE, dtype=D), OperandError, "dtype=torch.float64 came with a coef"),
    "two dtypes": (
        lambda: Diffusion([torch.ones(3, 4), torch.ones(3, 4, dtype=D)], PLANE),
        OperandError,
        "convert one",
    ),
    "a mean": (lambda: Diffusion(1.0, LINE, mean="geometric"), OperandError, "mean='geometric'; expected"),
    "mean of a function": (
        lambda: Diffusion(lambda x: x[:, 0], LINE, mean="harmonic"),
        OperandError,
        "values at the n",
    ),
    "a return": (
        lambda: Diffusion(lambda x: x.new_ones(3, 2), LINE),
        OperandError,
        r"returned a tensor of shape \(3, 2",
    ),
    "asymmetric": (
        lambda: Diffusion(torch.tensor([[1.0, 0.5], [0.0, 1.0]])[:, :, None, None].expand(2, 2, 3, 4), PLANE),
        OperandError,
        "expected a symmetric tensor",
    ),
    "indefinite": (
        lambda: Diffusion(torch.tensor([[1.0, 2.0], [2.0, 1.0]])[:, :, None, None].expand(2, 2, 3, 4), PLANE),
        DomainError,
        "not positive semidefinite at 12 of 12 nodes",
    ),
    "a scheme": (lambda: Advection(1.0, LINE, "downwind"), OperandError, "scheme='downwind'; expected 'upwind'"),
    "velocities": (lambda: Advection((1.0,), PLANE), OperandError, "velocity has 1 entries on a grid of 2 axes"),
    "one velocity": (lambda: Advection(1.0, PLANE), OperandError, "velocity has float on a grid of 2 axes"),
    "mass": (lambda: Hamiltonian(1.0, LINE, -1.0), DomainError, "mass = -1; expected a positive number"),
    "masses": (lambda: Hamiltonian(1.0, LINE, torch.ones(4)), OperandError, "mass has shape"),
    "potential": (lambda: Hamiltonian(torch.full((4,), math.inf), LINE), NonFiniteError, "potential has 4 NaN or Inf"),
    "speed": (lambda: WaveOperator(torch.tensor([1.0, 1.0, -2.0, 1.0]), LINE), DomainError, "negative wave speed"),
}


@pytest.mark.parametrize("make, error, words", BAD.values(), ids=BAD.keys())
def test_what_is_refused(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
