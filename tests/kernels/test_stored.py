"""What is kept of a kernel matrix, what products and columns need besides, and when Auto() keeps one."""

from contextlib import contextmanager

import pytest
import torch
from tests.kernels.formulas import direct, points
from tests.memory import peak_of

from ritz.kernels import (
    RBF,
    Linear,
    Matern,
    NumbaTiles,
    Periodic,
    RationalQuadratic,
    Scale,
    Stored,
    Tiles,
    for_iteration,
)
from ritz.kernels import columns as columns_module
from ritz.kernels.torch_tiles import multiply
from ritz.kernels.upper import UpperTiles
from ritz.methods import Auto

SUMS = {
    "one": lambda: Matern(1.5, 3),
    "scaled": lambda: 2.0 * (0.7 * RationalQuadratic(3)),
    "sum": lambda: RBF() + 0.5 * Matern(2.5) + 3.0 * Periodic(3, period_length=4.0),
}


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_choice_for_repeated_products():
    for size, dtype in ((16_384, torch.float32), (11_585, torch.float64)):
        assert for_iteration(1, 1, dtype) == for_iteration(size, size, dtype) == Stored()
        assert for_iteration(size + 1, size, dtype) == for_iteration(size, size + 1, dtype) == Auto()


# -- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 11])
@pytest.mark.parametrize("number", [1, 2])
def test_products_with_a_matrix_of_many_tiles(k, number):
    """Larger than a tile in both directions, with ragged edges; the symmetric case reads one half only."""
    generator = torch.Generator().manual_seed(0)
    K, V = (torch.randn(1300, m, generator=generator, dtype=torch.float64) for m in (1100, k))
    square = torch.randn(1300, 1300, generator=generator, dtype=torch.float64)
    square = square + square.mT
    with threads(number):
        torch.testing.assert_close(multiply(square, V, same=True), square @ V)
        torch.testing.assert_close(multiply(K.mT, V, same=False), K.mT @ V)
        torch.testing.assert_close(multiply(K, V[:1100], same=False), K @ V[:1100])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("tiles", [Tiles(16), NumbaTiles(16), Tiles()], ids=str)
def test_upper_tiles_stand_for_the_whole_matrix(name, tiles, number):
    kernel, X = SUMS[name]().double(), points(75)
    K, want = kernel(X, backend=Stored(tiles)), direct(kernel, X, X).detach()
    V = torch.linspace(-1, 1, 75 * 7, dtype=torch.float64).view(75, 7)
    with threads(number), torch.no_grad():
        torch.testing.assert_close(K @ V, want @ V)
        torch.testing.assert_close(K.matrix(), want)
        assert isinstance(K._current(), UpperTiles)


def test_a_matrix_that_is_not_made_by_square_tiles_is_kept_whole():
    X = points(30)
    for kernel, Z in ((RBF() + Linear(), None), (RBF() * Matern(1.5), None), (RBF(), points(20, seed=1))):
        K = kernel.double()(X, Z, backend=Stored(Tiles(8)))
        want = direct(kernel, X, X if Z is None else Z).detach()
        torch.testing.assert_close(K.matrix(), want)
        assert K.matrix() is K.matrix()
        V = torch.ones(want.shape[1], 2, dtype=torch.float64)
        torch.testing.assert_close((K @ V).detach(), want @ V)


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [Tiles(), NumbaTiles()], ids=str)
@pytest.mark.parametrize("lengthscale", [1.0, 0.01])  # distances in float32, and in float64
def test_workspace(backend, lengthscale):
    n = 5000  # the matrix would take 100 MB
    X, v = torch.rand(n, 3).requires_grad_(True), torch.rand(n, 11)
    kernel = RationalQuadratic(lengthscale=lengthscale)
    assert peak_of(lambda: (kernel(X, backend=backend) @ v).sum().backward()) < 12 * 2**20


@pytest.mark.parametrize("name", SUMS)
def test_stored_holds_one_half_of_the_matrix(name):
    n = 3000
    kernel, X, v = SUMS[name](), torch.rand(n, 3), torch.rand(n, 4)
    with torch.no_grad():
        peak = peak_of(lambda: kernel(X, backend=Stored(NumbaTiles())) @ v)
    assert 2 * n * n <= peak < 2 * n * (n + 512) + 8 * 2**20


def test_stored_holds_one_copy_of_a_rectangular_matrix():
    n = 2000
    X, Z, v = torch.rand(n, 3), torch.rand(n, 3), torch.rand(n, 4)
    with torch.no_grad():
        peak = peak_of(lambda: RBF()(X, Z, backend=Stored(NumbaTiles())) @ v)
    assert 4 * n * n <= peak < 4 * n * n + 8 * 2**20


@pytest.mark.parametrize("kernel", [Matern(1.5, 3), Scale(RBF()) * Matern(2.5)], ids=["one", "product"])
def test_columns_leave_nothing_of_their_size_on_the_graph(kernel):
    n, r = 6000, 100
    X = torch.rand(n, 3).requires_grad_(True)
    size = 4 * n * r
    K = kernel(X)
    assert peak_of(lambda: K.columns(range(r))) < size + 16 * 2**20  # ten arrays in float64 would be 48 MB
    G = torch.ones(n, r)
    C = K.columns(range(r))
    assert peak_of(lambda: C.backward(G)) < 16 * 2**20


# -- columns ------------------------------------------------------------------------------------------------------


COLUMNS = {
    "matern": (Matern(1.5, 3), False),  # the plain formula has no second derivative at equal points
    "scaled": (2.0 * (0.7 * RationalQuadratic(3)), True),
    "product": (RBF(3) * RationalQuadratic(), True),
    "periodic": (Periodic(3, period_length=4.0), True),
    "rectangular product": (RBF(3) * Matern(2.5), False),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_by_rows_are_the_dense_columns_to_second_order(name, monkeypatch):
    kernel, same = COLUMNS[name]
    kernel, X = kernel.double(), points(23, repeat=False).requires_grad_(True)
    Z = None if same else points(9, seed=1).requires_grad_(True)
    index = [7, 2, 5, 2]
    wanted = [X, *kernel.parameters(), *(() if same else (Z,))]
    G, H = (torch.randn(23, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (2, 3))

    def derivatives(C):
        plain = torch.autograd.grad(C, wanted, H, retain_graph=True)
        first = torch.autograd.grad(C, wanted, G, create_graph=True)
        return plain, first, torch.autograd.grad(sum((g * g).sum() for g in first), wanted)

    ref = direct(kernel, X, X if same else Z)[:, index]
    want = derivatives(ref)
    monkeypatch.setattr(columns_module, "GROUP", 4 * 5)  # five rows at once, and three at the end
    C = kernel(X, Z).columns(index)
    torch.testing.assert_close(C, ref)
    for ours, theirs in zip(derivatives(C), want):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(kernel(X, Z).columns(index), ref)
