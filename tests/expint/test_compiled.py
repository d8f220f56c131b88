"""Compiled products and Lanczos loops against the torch operations that mean the same."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from tests.expint.test_stencils import GRIDS, Draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ritz
from ritz.errors import NonFiniteError
from ritz.expint import Advection, Diffusion, Grid, Hamiltonian, WaveOperator, compiled, wave_multiply

pytest.importorskip("numba", reason="needs numba")
D = torch.float64
TOL = {torch.float32: 2e-6, D: 1e-14}


@pytest.fixture(autouse=True)
def short_vectors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SMALL", 0)


def operators(grid: Grid, dtype: torch.dtype, seed: int = 0) -> dict[str, ritz.LinearOperator]:
    draw, real = Draw(grid, seed), dtype.to_real()
    c, V = draw.positive().to(real), draw.normal().to(real)
    found: dict[str, ritz.LinearOperator] = {"schrodinger": Hamiltonian(V, grid, dtype=dtype)}
    if not dtype.is_complex:
        found |= {
            "tensor": Diffusion(draw.tensor().to(real), grid),
            "wave": WaveOperator(c, grid),
            "wind": Advection([draw.normal().to(real) for _ in range(grid.ndim)], grid),
        }
    return found


@pytest.mark.parametrize("dtype", [torch.float32, D, torch.complex64, torch.complex128])
@pytest.mark.parametrize("grid", [*GRIDS.values(), Grid((70, 67), border="periodic")], ids=[*GRIDS, "pieces"])
def test_products(grid: Grid, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.randn(grid.size, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    fast = [(A @ X, A @ X[:, 0], A.mH @ X) for A in operators(grid, dtype).values()]
    monkeypatch.setattr(compiled, "SMALL", 10**9)
    for (block, one, adjoint), A in zip(fast, operators(grid, dtype).values(), strict=True):
        assert A._kernel()._compiled is None
        tol = TOL[dtype.to_real()] * float((A @ X).abs().max()) * 10
        torch.testing.assert_close(block, A @ X, rtol=0, atol=tol)
        torch.testing.assert_close(one, (A @ X)[:, 0], rtol=0, atol=tol)
        torch.testing.assert_close(adjoint, A.mH @ X, rtol=0, atol=tol)


def value_and_gradients(A: ritz.LinearOperator, theta: Tensor, v: Tensor, t: complex) -> list:
    v = v.clone().requires_grad_()
    method = ritz.Lanczos(24, reorthogonalize=False)
    y, info = ritz.expm_multiply(A, v, t, method=method, return_info=True)
    return [y.detach(), *torch.autograd.grad(y.abs().square().sum() + y.real.sum(), [theta, v]), info, info.backward]


@pytest.mark.parametrize("dtype", [torch.float32, D, torch.complex64, torch.complex128])
@pytest.mark.parametrize("border", ["neumann", "periodic"])
def test_lanczos_loops(dtype: torch.dtype, border: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients and the count of products."""
    grid = Grid((8, 9), border=border, spacing=1.0)
    theta = torch.rand(8, 9, dtype=dtype.to_real(), generator=torch.Generator().manual_seed(0)).requires_grad_()
    v = torch.randn(72, dtype=dtype, generator=torch.Generator().manual_seed(1))
    t = -1j if dtype.is_complex else -1.0
    made: list[int] = []
    loop = compiled.Compiled.lanczos
    monkeypatch.setattr(compiled.Compiled, "lanczos", lambda *args: made.append(1) or loop(*args))
    fast = value_and_gradients(Hamiltonian(theta, grid, dtype=dtype), theta, v, t)
    assert len(made) >= 2  # forward and backward
    monkeypatch.setattr(compiled, "SMALL", 10**9)
    slow = value_and_gradients(Hamiltonian(theta, grid, dtype=dtype), theta, v, t)
    for a, b in zip(fast[:3], slow[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=100 * TOL[dtype.to_real()] * float(b.abs().max()))
    for a, b in zip(fast[3:], slow[3:], strict=True):
        assert (a.num_matvecs, a.depth, a.status) == (b.num_matvecs, b.depth, b.status)


def test_growing_spaces_and_an_end() -> None:
    """A space that is extended piece by piece, and one that is exhausted on the way."""
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    S = WaveOperator(Draw(grid).positive(), grid)
    w, U = torch.linalg.eigh(S.to_dense())
    u = torch.randn(72, dtype=D, generator=torch.Generator().manual_seed(2))
    few = U[:, :3].sum(1)
    method = ritz.Lanczos(rtol=1e-12, reorthogonalize=False)
    for start, most in ((u, 300), (few, 10), (0 * u, 0)):  # three eigenvectors, and what rounding adds
        (found, _), info = wave_multiply(S, start, None, 9.0, method=method, return_info=True)
        exact = U @ (torch.cos(9.0 * w.clamp(min=0).sqrt()) * (U.mT @ start))
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
        assert info.status.success and info.depth <= most


def test_what_is_not_finite_is_named() -> None:
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    S = WaveOperator(Draw(grid).positive() * 1e200, grid)
    with pytest.raises(NonFiniteError, match="the product with A returned NaN or Inf in step 1"):
        wave_multiply(
            S, torch.ones(72, dtype=D) + torch.arange(72), None, 1.0, method=ritz.Lanczos(5, reorthogonalize=False)
        )


def test_changed_coefficients_and_copies_of_vectors() -> None:
    """A kernel is made anew for new coefficients; the starting vector stays as it was."""
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    c = Draw(grid).positive()
    S, u = WaveOperator(c, grid), torch.randn(72, dtype=D, generator=torch.Generator().manual_seed(3))
    kept, method = u.clone(), ritz.Lanczos(30, reorthogonalize=False)
    first = wave_multiply(S, u, None, 1.0, method=method)[0]
    assert torch.equal(u, kept)
    c.mul_(2.0)
    again = wave_multiply(S, u, None, 0.5, method=method)[0]  # twice as fast for half as long
    torch.testing.assert_close(first, again, rtol=1e-10, atol=1e-10)


def test_copies_and_files_of_operators() -> None:
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    A, x = Diffusion(Draw(grid).positive(), grid), torch.arange(72, dtype=D)
    y = A @ x
    for B in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert torch.equal(B @ x, y)


def test_products_of_a_subclass_are_not_passed_over() -> None:
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    mask = (torch.arange(72) % 3 > 0).to(D).unsqueeze(1)

    class Masked(Diffusion):
        def _matmat(self, X: Tensor) -> Tensor:
            return super()._matmat(X * mask) * mask

    A, x = Masked(Draw(grid).positive(), grid), torch.arange(72, dtype=D)
    exact = torch.linalg.matrix_exp(A.to_dense()) @ x
    y = ritz.expm_multiply(A, x, 1.0, method=ritz.Lanczos(60, reorthogonalize=False))
    torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-9)


def test_who_watches_torch_sees_torch() -> None:
    """A tracer would take what is computed behind its back for a constant."""
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    A, x = Diffusion(Draw(grid).positive(), grid), torch.arange(72, dtype=D)
    A @ x
    traced = make_fx(lambda x: A @ x)(x)
    torch.testing.assert_close(traced(2 * x), A @ (2 * x))
    fresh = Diffusion(Draw(grid).positive(), grid)
    for B in (A, fresh):  # what is made under a mode is not kept
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert (B @ mode.from_tensor(x)).shape == x.shape
        torch.testing.assert_close(B @ x, A @ x)


def test_nothing_of_a_transform_is_kept() -> None:
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    A, x = Diffusion(Draw(grid).positive(), grid), torch.arange(72, dtype=D)
    torch.func.grad(lambda x: (A @ x).square().sum())(x)
    assert all(torch._C._functorch.maybe_get_level(index) == -1 for index in A._pattern())


@pytest.mark.parametrize("threads", [1, 2])
def test_large_blocks_go_to_several_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LARGE", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    kernel = Diffusion(Draw(grid).positive(), grid)._kernel()
    assert kernel._compiled.serves(torch.ones(1, 72)) and kernel._compiled.serves(torch.ones(2, 72)) == (threads == 1)


def test_a_numba_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ritz.expint.bands_code", raising=False)
    monkeypatch.delattr("ritz.expint.bands_code", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    A = Diffusion(Draw(grid).positive(), grid)
    torch.testing.assert_close(A @ torch.ones(72, dtype=D), torch.zeros(72, dtype=D), rtol=0, atol=1e-13)
    assert A._kernel()._compiled is None


def test_numba_is_imported_for_long_vectors_only() -> None:
    code = (
        "import sys, torch, ritz\n"
        "from ritz.expint import Grid, Laplacian\n"
        "L = Laplacian(Grid((90, 91)), dtype=torch.float64)\n"
        "L @ torch.ones(8190, dtype=torch.float64)\n"
        "assert 'numba' not in sys.modules\n"
        "L = Laplacian(Grid((91, 92)), dtype=torch.float64)\n"
        "assert 'numba' not in sys.modules\n"
        "L @ torch.ones(8372, dtype=torch.float64)\n"
        "assert 'numba' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_numba_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    grid = Grid((9, 8), border="neumann", spacing=1.0)
    A = Diffusion(Draw(grid).positive(), grid)
    torch.testing.assert_close(A @ torch.ones(72, dtype=D), torch.zeros(72, dtype=D), rtol=0, atol=1e-13)
    assert A._kernel()._compiled is None
