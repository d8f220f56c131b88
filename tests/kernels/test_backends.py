"""Back ends of tiles against dense formulas from differences, compiled arithmetic against mpmath, and the choice."""

import importlib.util
import math
import subprocess
import sys
import threading

import mpmath
import pytest
import torch

from ritz.errors import OperandError
from ritz.kernels import RBF, Matern, NumbaTiles, RationalQuadratic, Stored, Tiles
from ritz.kernels.backends import choose
from ritz.kernels.distances import prepare
from ritz.kernels.panels import rounds, together
from ritz.kernels.profiles import Gaussian, MaternProfile, RationalQuadraticProfile
from ritz.kernels.torch_tiles import TorchPass
from ritz.kernels.triton_tiles import TritonTiles
from ritz.methods import Auto
from ritz.testing import check_operator

numba_code = pytest.importorskip("ritz.kernels.numba_code", reason="needs numba")
from ritz.kernels.numba_tiles import CompiledPass  # noqa: E402

CPU = torch.device("cpu")
KERNELS = {
    "rbf": lambda: RBF(3),
    "matern12": lambda: Matern(0.5, 3),
    "matern32": lambda: 2.0 * Matern(1.5, 3),
    "matern52": lambda: Matern(2.5),
    "rational": lambda: RationalQuadratic(3, alpha=0.7),
    "matern of any order": lambda: Matern(1.2, 3),  # no compiled code: the torch pass inside the same loop
}
KNOWN = [k for k in KERNELS if k != "matern of any order"]


def draw(n, c, dtype=torch.float64, seed=0):
    X = torch.randn(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return X.to(dtype)


def textbook(kernel, X, Z):
    """k(x, z) from differences in float64, differentiable, with the subgradient 0 of r at coincident points."""
    base = kernel.base_kernel if hasattr(kernel, "base_kernel") else kernel
    factor = kernel.outputscale if hasattr(kernel, "base_kernel") else 1.0
    r2 = ((X[:, None] - Z[None]) / base.lengthscale).square().sum(2)
    if isinstance(base, RBF):
        return factor * torch.exp(-r2 / 2)
    if isinstance(base, RationalQuadratic):
        return factor * (1 + r2 / (2 * base.alpha)) ** (-base.alpha)
    apart = r2 > 0
    a = torch.where(apart, (2 * base.nu * torch.where(apart, r2, 1.0)).sqrt(), 0.0)
    return factor * {0.5: 1.0, 1.5: 1 + a, 2.5: 1 + a + a * a / 3}[base.nu] * torch.exp(-a)


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("backend", [Tiles(), Tiles(48), NumbaTiles(), NumbaTiles(48)], ids=str)
def test_products_and_gradients_are_those_of_the_dense_matrix(name, dtype, same, backend):
    n, m = (530, 140) if backend.edge is None else (130, 75)  # more than one tile, the last ones incomplete
    kernel = KERNELS[name]().to(dtype)
    X, Z = draw(n, 3, dtype).requires_grad_(True), draw(m, 3, dtype, 1).requires_grad_(True)
    with torch.no_grad():
        X[n // 2] = X[1]
        Z[2] = X[1]
    Q, Lam = draw(n if same else m, 7, dtype, 2), draw(n, 7, dtype, 3)
    if name == "matern12" or dtype == torch.float32:
        Lam = Lam.abs()
        Q = Q.abs()  # sums of one sign, or a relative error says nothing
    K = kernel(X, None if same else Z, backend=backend)
    wanted = [X, *([] if same else [Z]), *kernel.parameters()]
    found = torch.autograd.grad((Lam * (K @ Q)).sum(), wanted)

    exact = KERNELS[name]().to(dtype).double()
    x, z = X.detach().double().requires_grad_(True), Z.detach().double().requires_grad_(True)
    dense = textbook(exact, x, x if same else z)
    want = torch.autograd.grad(
        (Lam.double() * (dense @ Q.double())).sum(), [x, *([] if same else [z]), *exact.parameters()]
    )
    tight = 1e-6 if dtype == torch.float32 else 1e-13
    assert relative(K @ Q, dense @ Q.double()) < tight
    with torch.no_grad():  # by tiles, and not in differentiable operations
        assert relative(K.to_dense(), dense) < tight
    for got, g in zip(found, want, strict=True):
        assert relative(got, g) < (2e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("name", KERNELS)
def test_contract_of_operators(name):
    kernel = KERNELS[name]().double()
    X, Z = draw(17, 3).requires_grad_(True), draw(9, 3, seed=1).requires_grad_(True)
    with torch.no_grad():
        X[8] = X[16] = X[1]
        Z[2] = X[1]
    check_operator(kernel(X, backend=NumbaTiles(5)))
    check_operator(kernel(X, Z, backend=NumbaTiles(5)))


@pytest.mark.parametrize("name", ["rbf", "matern52", "rational"])
def test_second_derivatives(name):
    kernel, X, v = KERNELS[name]().double(), draw(6, 3).requires_grad_(True), draw(6, 2, seed=1).requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda X, v: kernel(X, backend=NumbaTiles(4)) @ v, (X, v))


@pytest.mark.parametrize("name", KNOWN)
def test_compiled_and_torch_pass_mean_the_same_far_apart_close_together_and_in_float64_distances(name):
    for spread in (1e-4, 1.0, 50.0, 1e20):  # the last two make distances in float64, and clamp nearly all of them
        for dtype in (torch.float32, torch.float64):
            kernel, X, v = KERNELS[name]().to(dtype), spread * draw(90, 3, dtype), draw(90, 2, dtype, 1)
            with torch.no_grad():
                one, other = (kernel(X, backend=b) @ v for b in (Tiles(40), NumbaTiles(40)))
            assert relative(other, one) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("case", ["spread", "offset", "coincident"])
def test_float32_keeps_its_accuracy(name, case):
    X, v = draw(300, 5, torch.float32), draw(300, 3, torch.float32, 1)
    if case == "spread":
        X *= 30
        X[:100] = X[100:200] + 0.3 * X[:100] / 30  # near neighbours, at distances far below ‖u‖
    if case == "offset":
        X = (X * 2**10).round() / 2**10 + 1024.0  # exact in float32
    if case == "coincident":
        X[:150] = X[150:]
    kernel = Matern({"matern12": 0.5, "matern32": 1.5}.get(name, 2.5))
    kernel = RBF() if name == "rbf" else RationalQuadratic(alpha=0.7) if name == "rational" else kernel
    with torch.no_grad():
        K = kernel(X, backend=NumbaTiles(128))
        dense = textbook(kernel.double(), X.double(), X.double())
        assert relative(K @ v, dense @ v.double()) < 1e-5
        assert relative(K.to_dense(), dense) < 1e-5
        if case == "coincident" and name == "matern12":  # rounding δ in r² would cost √δ
            assert bool((K.to_dense()[:150, 150:].diagonal() == 1).all())


def compiled(profile, dtype, size, wide=False):
    left = torch.float64 if wide else dtype
    points = prepare(torch.zeros(1, 1, dtype=torch.float64), None, profile, left)
    code = {Gaussian: 0, MaternProfile: 3, RationalQuadraticProfile: 4}[type(profile)]
    return CompiledPass(code, profile, points, dtype, size)


def exactly(f, values):
    with mpmath.workdps(40):
        return [f(mpmath.mpf(float(x))) for x in values]


def ulps(got, want, eps):
    return max(abs(mpmath.mpf(float(g)) - w) / w for g, w in zip(got, want, strict=True)) / eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_over_its_whole_range(dtype):
    lowest, eps = (-80.0, 2.0**-23) if dtype == torch.float32 else (-690.0, 2.0**-52)
    steps = torch.linspace(lowest, 0, 3001, dtype=dtype)
    ties = (torch.arange(-100, 1, dtype=torch.float64) - 0.5) * math.log(2)  # where the reduction changes its mind
    ties = ties.to(dtype)
    tiny = -torch.logspace(-45 if dtype == torch.float32 else -323, 0, 200, dtype=torch.float64).to(dtype)
    near = [torch.nextafter(ties, torch.full_like(ties, s * math.inf)) for s in (-1, 1)]
    t = torch.cat([steps, ties, *near, tiny])
    t = t[t >= lowest]
    k = compiled(Gaussian(), dtype, t.numel()).values(t.clone())
    assert ulps(k, exactly(mpmath.exp, t), eps) < 1.0
    assert float(k[(t == 0).nonzero()[0, 0]]) == 1.0


def test_exponential_outside_of_its_range():
    for dtype, wide in ((torch.float32, False), (torch.float32, True), (torch.float64, False)):
        lowest = -80.0 if dtype == torch.float32 else -690.0
        t = torch.tensor([1e-3, 1e9, lowest - 1, -1e30, -math.inf, math.nan], dtype=torch.float64 if wide else dtype)
        k = compiled(Gaussian(), dtype, 6, wide).values(t)
        assert k.dtype == dtype and k[:2].tolist() == [1.0, 1.0] and bool(k[5].isnan())
        assert float(k[2]) == float(k[3]) == float(k[4]) == pytest.approx(math.exp(lowest), rel=1e-6)
        assert float(k[4]) > torch.finfo(dtype).tiny  # no subnormal numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.05, 1.0, 37.0, 1e5])
def test_logarithm_of_the_rational_quadratic(dtype, alpha):
    eps = torch.finfo(dtype).eps
    t = torch.logspace(-12, 6, 1500, dtype=torch.float64)
    t = torch.cat([t, torch.tensor([0.0, 0.4142135, 0.41421357, 1.0, 3.0])]).to(dtype)
    t = t[alpha * torch.log1p(t) < (75 if dtype == torch.float32 else 600)]
    k = compiled(RationalQuadraticProfile(alpha), dtype, t.numel()).values(t.clone())
    want = exactly(lambda x: (1 + x) ** (-mpmath.mpf(alpha)), t)
    # an error of an ulp or two of the exponent is |exponent| as many in k
    errors = [
        abs(mpmath.mpf(float(g)) - w) / w / (eps * (1 + 2 * abs(mpmath.log(w)))) for g, w in zip(k, want, strict=True)
    ]
    assert max(errors) < 1.5


@pytest.mark.parametrize("dtype, wide", [(torch.float32, False), (torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize("profile", [Gaussian(), MaternProfile(2.5), RationalQuadraticProfile(0.7)], ids=str)
def test_compiled_pairing_is_that_of_the_torch_pass(profile, dtype, wide):
    size = 5077
    t = profile.scale * torch.rand(size, dtype=torch.float64 if wide else dtype) * 9
    T, found = torch.rand(size, dtype=dtype), []
    points = prepare(torch.zeros(1, 1, dtype=torch.float64), None, profile, t.dtype)
    for run in (compiled(profile, dtype, size, wide), TorchPass(profile, points, dtype, size)):
        sums = torch.ones(1 + profile.num_shapes, dtype=torch.float64)
        S = run.pairing(t.clone(), T.clone(), sums)
        assert S.dtype == t.dtype and bool((sums != 1).all())
        found.append((S, sums))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-20)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (12, 12), (5, 9)])
def test_panels_cover_every_tile_once_and_do_not_meet(same, apart, shape):
    rows, columns = shape
    if same and rows != columns:
        return
    for threads in range(1, max(2, 1 + (columns // 2 if same else min(shape)))):
        seen = []
        for panels in rounds(rows, columns, threads, same=same, apart=apart):
            assert len(panels) == threads
            touched = [({i for i, j in p} | ({j for i, j in p} if same else set()), {j for i, j in p}) for p in panels]
            for a in range(threads):
                for b in range(a):
                    assert not touched[a][0] & touched[b][0]
                    assert not apart or same or not touched[a][1] & touched[b][1]
            seen += [tile for p in panels for tile in p]
        assert sorted(seen) == [(i, j) for i in range(rows) for j in range(i if same else 0, columns)]


@pytest.mark.parametrize("backend", [Tiles(20), NumbaTiles(20)], ids=str)
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_of_threads_matters_to_rounding_only(backend, same, dtype):
    kernel, X, Z = RationalQuadratic(3, alpha=0.7).to(dtype), draw(130, 3, dtype), None if same else draw(85, 3, dtype)
    Q, Lam = draw(130 if same else 85, 7, dtype, 2), draw(130, 7, dtype, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            X.requires_grad_(True)
            K = kernel(X, Z, backend=backend)
            with torch.no_grad():
                found.append([K @ Q, K.to_dense()])
            with torch.inference_mode():
                assert torch.equal(K @ Q, found[-1][0])
            found[-1] += K.pair(Lam, Q)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, two, again, three in zip(*found, strict=True):
        if one is not None:
            assert torch.equal(two, again)
            for other in (two, three):
                torch.testing.assert_close(other, one, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-4)


def test_an_error_in_a_thread_is_raised():
    def fail():
        raise ValueError("from a tile")

    with pytest.raises(ValueError, match="from a tile"):
        together([fail, lambda: None])


def test_python_threads_do_not_disturb_each_other():
    kernel, X = Matern(1.5, 3).float(), draw(700, 3, torch.float32)
    blocks = [draw(700, 3, torch.float32, s) for s in range(4)]
    with torch.no_grad():
        want, got = [kernel(X, backend=NumbaTiles(100)) @ b for b in blocks], [None] * 4

        def work(i):
            with torch.no_grad():
                got[i] = kernel(X, backend=NumbaTiles(100)) @ blocks[i]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_blocks_of_every_width():
    # vectors are padded to a multiple of four where that is faster
    kernel, X = RBF(), draw(60, 2, torch.float32)
    with torch.no_grad():
        K = kernel(X, backend=NumbaTiles(32))
        dense = textbook(kernel, X, X)
        for k in (1, 2, 3, 5, 6, 7, 8, 11, 13, 18):
            v = draw(60, k, torch.float32, k)
            assert (K @ v).shape == (60, k)
            torch.testing.assert_close(K @ v, dense @ v, rtol=1e-5, atol=1e-5)


def test_choice(monkeypatch):
    many = 2**22
    assert choose(Auto(), many, CPU) == NumbaTiles() and choose(Auto(), many - 1, CPU) == Tiles()
    assert choose(Auto()) == Tiles() and choose(Tiles(3), many, CPU) == Tiles(3)
    spec = importlib.util.find_spec
    installed = {"numba": False, "triton": True}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed.get(name, spec(name)) or None)
    assert choose(Auto(), many, CPU) == Tiles()
    assert choose(Auto(), many, torch.device("cuda")) == TritonTiles()
    installed["triton"] = False
    assert choose(Auto(), many, torch.device("cuda")) == Tiles()
    assert choose(Auto(), many, torch.device("mps")) == Tiles()


def test_operators_say_what_they_use():
    X = torch.zeros(3, 2)
    assert RBF()(X).backend == Tiles() and "backend=Tiles(edge=None)" in repr(RBF()(X))
    K = RBF()(X, backend=NumbaTiles(7))
    assert K.backend == NumbaTiles(7) and "backend=NumbaTiles(edge=7)" in repr(K)
    K = (RBF() + Matern(1.5))(X, backend=Stored(NumbaTiles()))
    assert K.backend == Stored(NumbaTiles()) and "backend=Stored(tiles=NumbaTiles(edge=None))" in repr(K)


def test_arguments():
    with pytest.raises(OperandError, match=r"NumbaTiles\(edge=0\)"):
        NumbaTiles(0)
    with pytest.raises(OperandError, match="Stored"):
        Stored("numba")


def nothing(data):
    """Stands for a pass; compiles fast."""


@pytest.mark.parametrize("trouble", ["no directory", "no room"])
def test_code_that_cannot_be_kept_on_disk_is_kept_in_memory(monkeypatch, trouble):
    from numba.core import caching

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if trouble == "no directory":
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    else:
        monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert numba_code._compile(nothing).address > 0


def test_code_is_kept_on_disk(tmp_path, monkeypatch):
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    numba_code._compile(numba_code._values_single)
    assert list(tmp_path.rglob("*.nbi"))  # none where something in the code cannot be written down


def test_numba_is_imported_at_the_first_tile_only():
    code = (
        "import sys, torch, ritz.kernels as k\n"
        "k.RBF()(torch.rand(9, 2)) @ torch.ones(9)\n"
        "k.RBF()(torch.rand(9, 2), backend=k.NumbaTiles())\n"
        "assert 'numba' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_an_openmp_runtime_tiles_are_made_by_the_calling_thread(monkeypatch):
    from ritz.kernels import panels

    class Empty:
        def __init__(self, name):
            pass

    monkeypatch.setattr(panels.ctypes, "CDLL", Empty)
    assert panels.pool() is None
    seen = []
    together([lambda: seen.append(threading.get_ident())] * 3)
    assert seen == [threading.get_ident()] * 3
    X = draw(90, 2)
    with torch.no_grad():
        torch.testing.assert_close(RBF().double()(X, backend=Tiles(20)).to_dense(), textbook(RBF().double(), X, X))
