"""The Triton back end: its interpreter's tests in a process of their own, what happens without it, and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ritz.errors import OperandError
from ritz.kernels import RBF, Gaussian, Matern, MaternProfile, RationalQuadraticProfile, Tiles, TritonTiles
from ritz.kernels.distances import prepare

CUDA = torch.cuda.is_available()
INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed (it has wheels for Linux only)")
PROFILES = [
    Gaussian(),
    MaternProfile(0.5),
    MaternProfile(1.5),
    MaternProfile(2.5),
    RationalQuadraticProfile(0.7),
]


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@needs_triton
def test_interpreted():
    """triton_interpreted.py: products, filling and gradients of all profiles, dtypes and ragged sizes."""
    file = Path(__file__).with_name("triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, cwd=file.parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


def call(dtype=torch.float32):
    points = prepare(normal(5, 2), None, Gaussian(), dtype)
    return TritonTiles().product(Gaussian(), points, normal(5, 1, dtype=dtype))


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ritz.kernels.triton_code", raising=False)
    with pytest.raises(OperandError, match="pip install triton"):
        call()


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes any tensor")
def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(OperandError, match="expected a CUDA device"):
        call()


def test_it_is_available_on_cuda_only():
    assert not TritonTiles.available(torch.device("cpu"))
    assert TritonTiles.available(torch.device("cuda")) == INSTALLED


def test_importing_ritz_does_not_import_triton():
    code = "import sys, ritz.kernels; assert not [m for m in sys.modules if m.split('.')[0] == 'triton']"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- on a GPU ---------------------------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, needs_triton, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


def gpu_case(n, d, k, dtype, profile, spread=1.0, m=None):
    U = normal(n, d, seed=1, device="cuda") * spread / d**0.5
    V = None if m is None else normal(m, d, seed=2, device="cuda") * spread / d**0.5
    Lam, Q = normal(n, k, seed=3, dtype=dtype, device="cuda"), normal(m or n, k, seed=4, dtype=dtype, device="cuda")
    return prepare(U, V, profile, dtype), prepare(U, V, profile, torch.float64), Lam, Q


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("profile", PROFILES, ids=str)
@pytest.mark.parametrize("d", [3, 9, 30, 128])
@pytest.mark.parametrize("k", [1, 16, 64])
class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("same", [True, False])
    def test_float32_against_float64(self, profile, d, k, same):
        """20 000 points: 1e-5, the bound of all back ends. Long sums are where tensor cores' truncation would show."""
        points, exact, Lam, Q = gpu_case(20_000, d, k, torch.float32, profile, m=None if same else 5_001)
        want = Tiles().product(profile, exact, Q.double())
        got = TritonTiles().product(profile, points, Q)
        assert torch.isfinite(got).all() and error(got, want) < 1e-5
        ones = torch.ones_like(Q)  # all terms of one sign: a bias cannot average out
        assert (
            error(TritonTiles().product(profile, points, ones), Tiles().product(profile, exact, ones.double())) < 1e-5
        )
        a = TritonTiles().contract(profile, points, Lam, Q, moves=True, sums=True)
        b = Tiles().contract(profile, exact, Lam.double(), Q.double(), moves=True, sums=True)
        assert error(a.grad_U, b.grad_U) < 1e-5
        assert same or error(a.grad_V, b.grad_V) < 1e-5
        terms = float(Lam.double().norm() * Q.double().norm())
        assert abs(float(a.value - b.value)) < 1e-5 * terms
        assert (a.shapes - b.shapes).abs().max() < 1e-5 * terms if profile.num_shapes else True

    def test_spread_points(self, profile, d, k):
        points, exact, Lam, Q = gpu_case(3_000, d, k, torch.float32, profile, spread=100.0)
        assert points.U.dtype == torch.float64
        close = exact.U.clone()
        close[1::2] = close[::2] + 0.1 * normal(1_500, d, seed=5, device="cuda") / d**0.5  # pairs, far from the origin
        points, exact = prepare(close, None, profile, torch.float32), prepare(close, None, profile, torch.float64)
        want = Tiles().product(profile, exact, Q.double())
        assert error(TritonTiles().product(profile, points, Q), want) < 1e-5
        a = TritonTiles().contract(profile, points, Lam, Q, moves=True, sums=False)
        b = Tiles().contract(profile, exact, Lam.double(), Q.double(), moves=True, sums=False)
        assert error(a.grad_U, b.grad_U) < 1e-5

    def test_float64(self, profile, d, k):
        points, _, Lam, Q = gpu_case(2_000, d, k, torch.float64, profile)
        assert error(TritonTiles().product(profile, points, Q), Tiles().product(profile, points, Q)) < 1e-12
        a, b = (t.contract(profile, points, Lam, Q, moves=True, sums=True) for t in (TritonTiles(), Tiles()))
        assert error(a.grad_U, b.grad_U) < 1e-11


class TestOperatorOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("kernel", [RBF(), Matern(0.5), Matern(1.5), Matern(2.5)], ids=str)
    def test_filled_matrix(self, kernel):
        X = normal(1_000, 9, dtype=torch.float32, device="cuda")
        with torch.no_grad():
            got = kernel.cuda()(X, backend=TritonTiles()).to_dense()
            want = kernel.double()(X.double(), backend=Tiles()).to_dense()
        kernel.float()
        assert error(got, want) < 1e-5 and (got.diagonal() == 1).all()

    def test_first_and_second_derivatives(self):
        """The first by the kernels, the second through the dense matrix: both of one function."""
        X, v = normal(300, 5, device="cuda"), normal(300, 2, seed=1, device="cuda")
        found = []
        for backend in (TritonTiles(), Tiles()):
            kernel = RBF().double().cuda()
            raw = kernel.raw_lengthscale
            value = (v * (kernel(X, backend=backend) @ v)).sum()
            (first,) = torch.autograd.grad(value, raw, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), raw)
            found.append((value.detach(), first.detach(), second))
        for got, want in zip(*found, strict=True):
            assert error(got, want) < 1e-10

    def test_the_same_call_gives_the_same_bits(self):
        points, _, Lam, Q = gpu_case(10_000, 9, 16, torch.float32, Gaussian())
        a, b = (TritonTiles().contract(Gaussian(), points, Lam, Q, moves=True, sums=True) for _ in range(2))
        assert torch.equal(a.grad_U, b.grad_U) and torch.equal(a.value, b.value)
        first, second = (TritonTiles().product(Gaussian(), points, Q) for _ in range(2))
        assert torch.equal(first, second)
