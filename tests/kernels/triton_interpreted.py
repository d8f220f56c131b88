"""Triton's kernels run by its interpreter on the CPU. test_triton.py starts this file in a process of its own: the
environment variable has to be there before triton is imported, and would reach every other test of the process."""

import itertools
import math
import os

import pytest
import torch

from ritz.errors import OperandError
from ritz.kernels import RBF, Gaussian, MaternProfile, Profile, RationalQuadraticProfile, Tiles, TritonTiles
from ritz.kernels.distances import prepare
from ritz.kernels.triton_plan import reach
from ritz.testing import check_operator

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/kernels/test_triton.py, which starts this file"

PROFILES = {
    "gaussian": Gaussian(),
    "matern12": MaternProfile(0.5),
    "matern32": MaternProfile(1.5),
    "matern52": MaternProfile(2.5),
    "rational": RationalQuadraticProfile(0.7),
}
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 2e-6, F64: 1e-12}
SIZES, VECTORS, DIMENSIONS = (1, 17, 70, 130), (1, 3, 16, 20), (1, 3, 18, 40)


def pairs_of(case):
    return [(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)]


def pairwise():
    """Few cases in which every pair of values of two different arguments occurs (greedy, always the same)."""
    axes = [list(PROFILES), [F32, F64], [True, False], SIZES, VECTORS, DIMENSIONS]
    every = list(itertools.product(*axes))
    pairs = {pair for case in every for pair in pairs_of(case)}
    chosen = []
    while pairs:
        gains = [sum(pair in pairs for pair in pairs_of(case)) for case in every]
        best = every[gains.index(max(gains))]
        pairs -= set(pairs_of(best))
        chosen.append(best)
    return chosen


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def problem(n, m, d, k, spread=1.0):
    """Points with r² of order 1, one of them twice; Z shares one with X. m = None: the same points."""
    U = normal(n, d, seed=1) * spread / math.sqrt(d)
    V = None if m is None else normal(m, d, seed=2) * spread / math.sqrt(d)
    U[n // 2] = U[0]
    if V is not None:
        V[m // 2] = U[0]
    return U, V, normal(n, k, seed=3), normal(n if m is None else m, k, seed=4)


def entries(profile, U, V, alpha):
    """k(u, v) from differences, in float64, with its own formulas; differentiable away from r = 0 and zero there."""
    r2 = (U[:, None] - V[None]).square().sum(2)
    apart = r2 > 0
    if isinstance(profile, RationalQuadraticProfile):
        return (1 + r2 / (2 * alpha)) ** -alpha
    if isinstance(profile, Gaussian):
        return torch.exp(-r2 / 2)
    a = torch.where(apart, 2 * profile.nu * r2, 1.0).sqrt()
    k = {0.5: 1 + 0 * a, 1.5: 1 + a, 2.5: 1 + a + a * a / 3}[profile.nu] * torch.exp(-a)
    return torch.where(apart, k, 1.0)


def expected(profile, U, V, Lam, X):
    """(K, grad_U, grad_V, value, grad_alpha) by autograd."""
    U = U.clone().requires_grad_(True)
    V = U if V is None else V.clone().requires_grad_(True)
    alpha = torch.tensor(getattr(profile, "alpha", 1.0), dtype=F64, requires_grad=True)
    K = entries(profile, U, V, alpha)
    value = (Lam * (K @ X)).sum()
    wanted = [U, alpha] if V is U else [U, alpha, V]
    grads = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
    return K.detach(), grads[0], None if V is U else grads[2], value.detach(), grads[1]


def close(got, want, tolerance, scale=None):
    scale = want.norm() if scale is None else scale
    assert got.dtype in (F32, F64) and got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * scale + 1e-300


def check(profile, U, V, Lam, X, dtype, tiles=TritonTiles(), tolerance=None):
    tolerance = tolerance or TOLERANCE[dtype]
    points = prepare(U, V, profile, dtype)
    K, grad_U, grad_V, value, grad_alpha = expected(profile, U, V, Lam, X)
    close(tiles.product(profile, points, X.to(dtype)), K @ X, tolerance)
    out = torch.full(K.shape, math.nan, dtype=dtype)
    tiles.fill(profile, points, out)
    close(out, K, tolerance)
    if V is None:
        assert (out.diagonal() == 1).all()
    found = tiles.contract(profile, points, Lam.to(dtype), X.to(dtype), moves=True, sums=True)
    # Gradients are sums with cancellation: the error is measured against the terms, and the terms' size is |Λ| |Q|.
    terms = Lam.norm() * X.norm()
    close(found.grad_U, grad_U, tolerance, grad_U.norm() + 0.1 * terms)
    if V is None:
        assert found.grad_V is None
    else:
        close(found.grad_V, grad_V, tolerance, grad_V.norm() + 0.1 * terms)
    close(found.value, value, tolerance, value.abs() + 0.1 * terms)
    assert found.shapes.shape == (profile.num_shapes,)
    if profile.num_shapes:
        close(found.shapes[0], grad_alpha, tolerance, grad_alpha.abs() + 0.1 * terms)
    sums = tiles.contract(profile, points, Lam.to(dtype), X.to(dtype), moves=False, sums=True)
    assert sums.grad_U is None and sums.grad_V is None
    close(sums.value, value, tolerance, value.abs() + 0.1 * terms)


@pytest.mark.parametrize("name, dtype, same, n, k, d", pairwise())
def test_product_fill_and_gradients(name, dtype, same, n, k, d):
    check(PROFILES[name], *problem(n, None if same else 33, d, k), dtype, TritonTiles(columns=64))


@pytest.mark.parametrize("name", PROFILES)
def test_the_torch_back_end_means_the_same(name):
    profile, (U, V, Lam, X) = PROFILES[name], problem(40, 33, 18, 5)
    points = prepare(U, V, profile, F64)
    ours, theirs = TritonTiles(), Tiles()
    close(ours.product(profile, points, X), theirs.product(profile, points, X), 1e-12)
    a, b = (t.contract(profile, points, Lam, X, moves=True, sums=True) for t in (ours, theirs))
    for got, want in zip(a, b, strict=True):
        close(got, want, 1e-12)


@pytest.mark.parametrize("name", ["gaussian", "matern12", "matern52"])
@pytest.mark.parametrize("same", [True, False])
def test_coordinates_far_from_the_origin_keep_their_float32_accuracy(name, same):
    """Clusters a thousand length-scales apart: float64 coordinates, in two float32 parts on the device."""
    U, V, Lam, X = problem(40, None if same else 33, 5, 3)
    shift = 1e3 * normal(4, 5, seed=7)
    U = U + shift[torch.arange(40) % 4]
    V = None if V is None else V + shift[torch.arange(33) % 4]
    points = prepare(U, V, PROFILES[name], F32)
    assert points.U.dtype == F64
    check(PROFILES[name], U, V, Lam, X, F32)


@pytest.mark.parametrize("d, k", [(70, 3), (100, 70)])
def test_more_coordinates_and_vectors_than_one_program_takes(d, k):
    check(PROFILES["matern32"], *problem(40, 33, d, k), F32)


@pytest.mark.parametrize("n, m, rows", [(260, None, 128), (17, 260, 16)])
def test_columns_divided_among_programs(n, m, rows):
    """Few rows and many columns: partial sums, and several tiles in either direction."""
    assert reach(272, 16, 3) < 272
    check(PROFILES["gaussian"], *problem(n, m, 3, 3), F32, TritonTiles(rows=rows, columns=16, warps=1))


def test_an_operator_differentiates_through_it():
    X = normal(20, 3).requires_grad_(True)
    check_operator(RBF().double()(X, backend=TritonTiles()))


def test_the_same_call_gives_the_same_bits():
    U, _, Lam, X = problem(70, None, 18, 5)
    points = prepare(U, None, Gaussian(), F32)
    first, second = (
        TritonTiles().contract(Gaussian(), points, Lam.float(), X.float(), moves=True, sums=True) for _ in range(2)
    )
    assert torch.equal(first.grad_U, second.grad_U) and torch.equal(first.value, second.value)


def test_rational_quadratic_of_large_alpha_is_the_gaussian():
    """(1 + s)^{−α} loses α·eps unless log(1 + s) is exact for small s."""
    U, _, _, X = problem(40, None, 3, 3)
    points = prepare(U, None, RationalQuadraticProfile(1e6), F32)
    got = TritonTiles().product(RationalQuadraticProfile(1e6), points, X.float())
    close(got, expected(Gaussian(), U, None, X, X)[0] @ X, 5e-6)


class Cauchy(Profile):
    """1/(1 + r²): a profile that the device code does not know."""

    scale = 1.0

    def __call__(self, r2):
        return 1 / (1 + r2)

    derivative = second = slopes_ = None

    def clamp_(self, t):
        return t.clamp_(min=0.0)

    def values_(self, t, work):
        return t.add_(1.0).reciprocal_()


def test_unknown_profiles_and_empty_matrices_go_to_torch():
    U, _, _, X = problem(17, None, 3, 3)
    K = 1 / (1 + (U[:, None] - U[None]).square().sum(2))
    close(TritonTiles().product(Cauchy(), prepare(U, None, Cauchy(), F64), X), K @ X, 1e-12)
    none = prepare(U[:0], U, Gaussian(), F32)
    assert TritonTiles().product(Gaussian(), none, X.float()).shape == (0, 3)


@pytest.mark.parametrize("wrong", [{"rows": 8}, {"columns": 48}, {"warps": 3}])
def test_blocks_must_be_powers_of_two(wrong):
    with pytest.raises(OperandError, match="power of two"):
        TritonTiles(**wrong)
