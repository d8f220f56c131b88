"""Samples: their moments against the exact posterior with bounds from theory, paths as functions, reports."""

import math

import pytest
import torch
from tests.gp.problems import data, process
from tests.gp.test_posterior import Largest, textbook

from ritz import CG
from ritz.errors import OperandError
from ritz.gp import ExactGP, FixedNoise, features
from ritz.gp.pathwise import Exact, Features, SquareRoot
from ritz.kernels import RBF, Kernel, Matern, RationalQuadratic, Scale

PATHS = pytest.mark.parametrize("options", [{}, {"solver": CG(rtol=1e-10)}], ids=["dense", "iterative"])


class Dot(Kernel):
    """xᵀz, which is not stationary."""

    def evaluate(self, X, Z=None):
        return X @ (X if Z is None else Z).mT


def check_moments(samples, mean, covariance, sigmas=4.5):
    """Whitened samples (s, n) look like independent standard normal numbers, up to ``sigmas`` of each statistic."""
    s, n = samples.shape
    L = torch.linalg.cholesky(covariance)
    Z = torch.linalg.solve_triangular(L, (samples - mean).mT, upper=False)
    gram = Z @ Z.mT / math.sqrt(s)
    statistics = {
        "mean": (s * Z.mean(1).square().sum(), n),
        "variance": (Z.square().sum(), s * n),
        "correlation": (gram.triu(1).square().sum(), n * (n - 1) // 2),
    }
    for name, (value, degrees) in statistics.items():  # each is χ² distributed (the last one in the limit of large s)
        score = (float(value) - degrees) / math.sqrt(2 * degrees)
        assert abs(score) < sigmas, (name, score)


def given_frequencies(gp, X, y, Xs, prior):
    """Mean and covariance of f* + K*ᵀK̂⁻¹(y − f − ε) for f = Φw with the features at hand."""
    K = gp.kernel.evaluate(X) + gp.noise * torch.eye(len(X), dtype=X.dtype)
    gain = torch.linalg.solve(K, gp.kernel.evaluate(X, Xs)).mT
    M = prior(Xs) - gain @ prior(X)
    return gp.mean(Xs) + gain @ (y - gp.mean(X)), M @ M.mT + gp.noise * gain @ gain.mT


@PATHS
@pytest.mark.parametrize("method", [Exact(), Features(300), SquareRoot(1e-4)], ids=["exact", "features", "root"])
@torch.no_grad()
def test_moments(options, method):
    X, y = data(30)
    Xs, _ = data(12, seed=1)
    gp = process(**options)
    posterior = gp.condition(X, y)
    samples, info = posterior.sample(Xs, 2000, method=method, seed=3, return_info=True)
    mean, covariance = textbook(gp, X, y, Xs)
    if isinstance(method, Features):
        prior = posterior.sample_paths(2000, method=method, seed=3)._prior
        mean, covariance = given_frequencies(gp, X, y, Xs, prior)
    assert samples.shape == (2000, 12) and info.method == method
    assert float(info.residual.max()) < 1e-9
    check_moments(samples, mean, covariance)
    with pytest.raises(AssertionError):  # the statistics see errors of a few per cent
        check_moments(samples, mean + 0.1 * covariance.diagonal().sqrt(), covariance)
    with pytest.raises(AssertionError):
        check_moments(samples, mean, 1.05 * covariance)


@torch.no_grad()
def test_feature_samples_have_the_posterior_covariance_within_their_stated_error():
    X, y = data(60)
    Xs, _ = data(12, seed=1)
    gp = process()
    posterior, exact = gp.condition(X, y), textbook(gp, X, y, Xs)[1]
    scale, total = float(gp.kernel.outputscale), 0.0
    for seed in range(30):
        paths = posterior.sample_paths(1, method=Features(200), seed=seed)
        found = given_frequencies(gp, X, y, Xs, paths._prior)[1]
        total = total + found
        # entries have the prior's error at most where the posterior is the prior; K*ᵀK̂⁻¹ may pass on more of it
        assert float((found - exact).square().mean().sqrt()) < 3 * scale * paths.info.details["prior_bound"]
        assert paths.info.details["prior_error"] < 1.5 * paths.info.details["prior_bound"]
    error = (total / 30 - exact).square().mean().sqrt()  # unbiased: averaging over frequencies lowers it
    assert float(error) < 1.5 * scale * (2 * 200 * 30) ** -0.5


@pytest.mark.parametrize(
    "kernel",
    [
        RBF(2, lengthscale=[0.5, 2.0]),
        Matern(0.5, lengthscale=0.7),
        Matern(1.5, active_dims=[1]),
        Matern(2.5, 2, lengthscale=[2.0, 0.4]),
        RationalQuadratic(2, 0.8, lengthscale=[0.5, 1.0]),
        RBF(lengthscale=1.5) * Matern(1.5, lengthscale=0.9),
    ],
    ids=["rbf", "matern12", "matern32", "matern52", "rq", "product"],
)
@torch.no_grad()
def test_spectral_densities(kernel):
    """k̂ − k is the mean of m draws of cos(ωᵀδ) − k, whose variance is ½(1 + k(2δ)) − k(δ)²."""
    kernel, m = kernel.double(), 40_000
    zero, steps = torch.zeros(1, 2).double(), torch.tensor([[0.2, -0.1], [0.7, 0.3], [1.5, 1.5], [0.0, 4.0]]).double()
    prior = features.draw(kernel, zero[0], m, torch.Generator().manual_seed(1))
    k, double = kernel.evaluate(steps, zero)[:, 0], kernel.evaluate(2 * steps, zero)[:, 0]
    found = prior(steps) @ prior(zero).mT
    z = (found[:, 0] - k) / ((0.5 * (1 + double) - k * k) / m).sqrt()
    assert float(z.abs().max()) < 4, z
    draws = m * prior(steps) * prior(zero)  # cos·cos and sin·sin of each frequency
    spread = (draws[:, :m] + draws[:, m:]).var(1) / (0.5 * (1 + double) - k * k)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0.06, atol=0)
    torch.testing.assert_close(prior(steps).square().sum(1), torch.ones(4).double())


@torch.no_grad()
def test_features_of_sums_and_scales():
    kernel = (2.0 * RBF(lengthscale=0.8) + 0.5 * (Matern(1.5) * (RBF() + Matern(0.5)))).double()
    P, m = data(30, 2)[0], 20_000
    prior = features.draw(kernel, P.mean(0), m, torch.Generator().manual_seed(2))
    assert prior.width == 3 * 2 * m and features.has_features(kernel)
    error = (prior(P) @ prior(P).mT - kernel.evaluate(P)).abs()
    assert float(error.max()) < 4.5 * 3.0 * (2 * m) ** -0.5 and float(error.diagonal().max()) < 1e-10
    assert not features.has_features(RBF() + Dot())


@PATHS
def test_paths_are_functions(options):
    X, y = data(40)
    paths = process(**options).condition(X, y).sample_paths(3, method=Features(100), seed=1)
    assert paths.num_paths == 3 and "200 features" in repr(paths)
    P, step = data(700, seed=2)[0], 1e-5
    values = paths(P)
    assert values.shape == (3, 700) and paths(P[:0]).shape == (3, 0)
    for part in (P[:1], P[5:9]):
        torch.testing.assert_close(paths(part), values[:, [int((P == row).all(1).nonzero()) for row in part]])
    Q = P.clone().requires_grad_(True)
    weights = torch.linspace(1, 2, 3, dtype=torch.float64).unsqueeze(1)
    (grad,) = torch.autograd.grad((weights * paths(Q)).sum(), Q)
    for a in range(3):
        shift = torch.zeros(1, 3, dtype=torch.float64)
        shift[0, a] = step
        want = (weights * (paths(P[:5] + shift) - paths(P[:5] - shift))).sum(0) / (2 * step)
        torch.testing.assert_close(grad[:5, a], want, rtol=1e-6, atol=1e-6)


def test_seeds_and_generators():
    X, y = data(30)
    posterior = process().condition(X, y)
    for method in (Exact(), Features(50), SquareRoot()):
        a, b, c = (posterior.sample(X[:4], 2, method=method, seed=s) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.allclose(a, c)
        d = posterior.sample(X[:4], 2, method=method, generator=torch.Generator().manual_seed(1))
        assert torch.equal(a, d)
    paths = posterior.sample_paths(2, method=Features(50), seed=7)
    assert torch.equal(paths(X[:4]), posterior.sample(X[:4], 2, method=Features(50), seed=7))


@torch.no_grad()
def test_outputs_are_sampled_apart():
    X, y = data(25)
    Y = torch.stack([y, -3 * y + X[:, 0]], 1)
    Xs, _ = data(5, seed=1)
    gp = process()
    posterior = gp.condition(X, Y)
    for method in (Exact(), SquareRoot(1e-4)):
        samples = posterior.sample(Xs, 1000, method=method, seed=4)
        assert samples.shape == (1000, 5, 2)
        mean, covariance = textbook(gp, X, Y, Xs)
        joint = torch.block_diag(covariance, covariance)
        check_moments(samples.transpose(1, 2).reshape(1000, 10), mean.mT.reshape(10), joint)
    paths = posterior.sample_paths(1000, method=Features(100), seed=4)
    assert paths(Xs).shape == (1000, 5, 2) and paths.info.residual.shape == (2000,)
    mean, covariance = given_frequencies(gp, X, Y[:, 1], Xs, paths._prior)
    check_moments(paths(Xs)[:, :, 1], mean, covariance)


@torch.no_grad()
def test_noise_is_added_on_request():
    X, y = data(25)
    Xs, _ = data(6, seed=1)
    noises = torch.linspace(0.02, 0.3, 25, dtype=torch.float64)
    gp = ExactGP(Scale(Matern(1.5, 3)), noise=FixedNoise(noises, new=0.2)).double()
    mean, covariance = textbook(gp, X, y, Xs)
    for method in (Exact(), SquareRoot(1e-4)):
        samples = gp.condition(X, y).sample(Xs, 1000, method=method, noise=True, seed=1)
        check_moments(samples, mean, covariance + 0.2 * torch.eye(6, dtype=torch.float64))
        check_moments(gp.condition(X, y).sample(Xs, 1000, method=method, seed=1), mean, covariance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_points_and_small_noise(dtype):
    X, y = data(40, dtype=dtype)
    X, y = torch.cat([X, X[:5]]), torch.cat([y, y[:5]])
    posterior = process(dtype=dtype, noise=1e-4).condition(X, y)
    # Exact: 4.5 √(rounding of a covariance, in float64 here); paths: rounding of n terms of size |y|/σ; the square root
    # of a K with eigenvalues 0 is known to √(eps·‖K‖), and to rtol of the norm of all its values
    single = dtype == torch.float32
    methods = {Exact(): 1e-5, Features(3000): 1e-3 if single else 1e-10, SquareRoot(1e-4): 1e-2 if single else 1e-3}
    for method, same in methods.items():
        values, info = posterior.sample(torch.cat([X, X[:10]]), 4, method=method, return_info=True)
        assert values.dtype == dtype and values.shape == (4, 55)
        torch.testing.assert_close(values[:, :10], values[:, 45:], rtol=0, atol=same)
        assert float((values[:, :45] - y).abs().max()) < 0.08  # paths go through the data, up to √noise
        assert float(info.residual.max()) < (1e-4 if dtype == torch.float32 else 1e-9)


def test_the_reports_are_true():
    X, y = data(80)
    gp = process(solver=CG(rtol=1e-2), preconditioner=None)
    paths = gp.condition(X, y).sample_paths(5, method=Features(64), seed=0)
    assert paths.info.residual.shape == (5,) and 1e-6 < float(paths.info.residual.max()) <= 1e-2
    details = paths.info.details
    assert details["features"] == 128 and details["prior_bound"] == pytest.approx(128**-0.5)
    Phi = paths._prior(X)
    want = (Phi @ Phi.mT - gp.kernel.evaluate(X).detach()).square().mean().sqrt() / gp.kernel.outputscale.detach()
    assert details["prior_error"] == pytest.approx(float(want))
    info = gp.condition(X, y).sample(X[:3], 2, method=SquareRoot(1e-2), return_info=True)[1]
    assert 0 < info.details["prior_error"] <= 1e-2


def test_auto(monkeypatch):
    X, y = data(30)
    dense, iterative = (process(**o).condition(X, y) for o in ({}, {"solver": CG()}))
    chosen = lambda p, Xs: p.sample(Xs, return_info=True)[1].method
    assert chosen(dense, X) == Exact() and chosen(iterative, X) == Features(2048)
    monkeypatch.setattr("ritz.gp.pathwise.EXACT_UP_TO", 10)
    assert chosen(dense, X) == Features(2048)
    linear = ExactGP(Scale(RBF()) + Dot(), noise=0.1).double().condition(X, y)
    assert chosen(linear, X) == SquareRoot()
    with pytest.raises(OperandError, match="Dot"):
        linear.sample_paths(2)


def test_memory_of_paths_is_bounded():
    X, y = data(100, 2, dtype=torch.float32)
    Xs = data(20_000, 2, seed=1, dtype=torch.float32)[0].requires_grad_(True)
    paths = process(2, dtype=torch.float32).condition(X, y).sample_paths(2, method=Features(256))
    with Largest() as largest:
        paths(Xs).sum().backward()
    assert largest.numel < 0.1 * 20_000 * min(100 * 4, 512)


def test_shapes_and_arguments():
    X, y = data(20)
    posterior = process().condition(X, y)
    for method in (Exact(), Features(8), SquareRoot()):
        assert posterior.sample(X[:0], 3, method=method).shape == (3, 0)
        assert posterior.sample(X[:1], 1, method=method).shape == (1, 1)
        assert not posterior.sample(X[:1].clone().requires_grad_(True), method=method).requires_grad
    for make in (*(lambda k=k: posterior.sample(X, k) for k in (0, -1)), lambda: posterior.sample_paths(0)):
        with pytest.raises(OperandError, match="at least 1"):
            make()
    with pytest.raises(OperandError, match="expected Exact"):
        posterior.sample(X, method="exact")
    with pytest.raises(OperandError, match="Features"):
        posterior.sample_paths(2, method=Exact())
    for make in (lambda: Features(0), lambda: Features(1.5), lambda: SquareRoot(2.0)):
        with pytest.raises(OperandError, match="expected"):
            make()
