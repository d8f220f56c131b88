"""Noise that is learned, fixed, given for each point, or a function of the inputs; on both paths, against torch."""

import copy

import pytest
import torch
from tests.gp.problems import data
from torch import nn
from torch.distributions import LogNormal, MultivariateNormal

from ritz import CG, Hutchinson, Lanczos
from ritz.errors import NonFiniteError, OperandError
from ritz.gp import ExactGP, FixedNoise, HeteroscedasticNoise, fit
from ritz.kernels import RBF, Scale

N = 40
PATHS = {
    "dense": {},
    "iterative": {"logdet": (Hutchinson(N), Lanczos(N))},
    "iterative with cg": {"logdet": (Hutchinson(N), Lanczos(N)), "solver": CG(rtol=1e-12)},
}


def process(noise, **options):
    torch.manual_seed(0)
    return ExactGP(Scale(RBF(3, lengthscale=1.5), 1.4), noise=noise, **options).double()


def oracle(gp, X, y, noise):
    return MultivariateNormal(gp.mean(X), gp.kernel.evaluate(X) + torch.diag_embed(noise.expand(len(y)))).log_prob(y)


def variances():
    return 0.05 + torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def log_variance():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


NOISES = {
    "learned": lambda: (0.07, lambda gp, X: gp.noise),
    "fixed number": lambda: (FixedNoise(0.07), lambda gp, X: torch.tensor(0.07, dtype=torch.float64)),
    "fixed per point": lambda: (FixedNoise(variances()), lambda gp, X: variances()),
    "heteroscedastic": lambda: (
        HeteroscedasticNoise(log_variance(), floor=0.01),
        lambda gp, X: gp.noise_model.module(X).squeeze(1).exp() + 0.01,
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NOISES)
def test_value_and_every_gradient(name, path):
    X, y = data(N)
    noise, truth = NOISES[name]()
    gp = process(noise, **PATHS[path])
    X = X.requires_grad_(True)
    tensors = [X, *gp.parameters()]
    value, info = gp.log_marginal_likelihood(X, y, return_info=True)
    want = oracle(gp, X, y, truth(gp, X))
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    for got, ref in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(want, tensors)):
        torch.testing.assert_close(got, ref, rtol=1e-7, atol=1e-9)
    assert isinstance(info.method, tuple) == (path != "dense")
    with torch.no_grad():
        torch.testing.assert_close(gp.covariance(X).to_dense(), gp.dense_covariance(X))


def test_what_is_learned():
    names = {name: {p for p, _ in process(make()[0]).named_parameters()} for name, make in NOISES.items()}
    assert "raw_noise" in names["learned"]
    assert not any("noise" in p for name in ("fixed number", "fixed per point") for p in names[name])
    assert sum("noise_model.module" in p for p in names["heteroscedastic"]) == 4


@torch.no_grad()
def test_noise_of_new_observations():
    X, _ = data(5)
    assert float(process(0.07).noise_at(X)) == pytest.approx(0.07)
    assert float(process(FixedNoise(0.07)).noise_at(X)) == pytest.approx(0.07)
    assert float(process(FixedNoise(variances(), new=0.3)).noise_at(X)) == pytest.approx(0.3)
    with pytest.raises(OperandError, match="new=..."):
        process(FixedNoise(variances())).noise_at(X)
    gp = process(HeteroscedasticNoise(log_variance()))
    assert gp.noise_at(X).shape == (5,) and torch.equal(gp.noise_at(X), gp.observed_noise(X))


@torch.no_grad()
def test_the_scalar():
    gp = process(FixedNoise(0.07))
    assert float(gp.noise) == pytest.approx(0.07)
    with pytest.raises(OperandError, match="not assigned"):
        gp.noise = 0.1
    for noise in (FixedNoise(variances()), HeteroscedasticNoise(log_variance())):
        with pytest.raises(OperandError, match="noise_at"):
            _ = process(noise).noise
        repr(process(noise))
    gp = process(0.07)
    gp.noise = 0.2
    assert float(gp.noise) == pytest.approx(0.2)


@torch.no_grad()
def test_rows():
    X, y = data(N)
    index = torch.tensor([3, 30, 7, 11])
    gp = process(FixedNoise(variances(), new=0.3))
    some = gp.rows(index)
    assert torch.equal(some.observed_noise(X[index]), variances()[index]) and float(some.noise_at(X)) == 0.3
    assert all(a is b for a, b in zip(some.parameters(), gp.parameters(), strict=True))
    want = oracle(gp, X[index], y[index], variances()[index])
    assert float(some.log_marginal_likelihood(X[index], y[index])) == pytest.approx(float(want), rel=1e-10)
    assert gp.observed_noise(X).shape == (N,)  # untouched
    for other in (process(0.1), process(FixedNoise(0.1)), process(HeteroscedasticNoise(log_variance()))):
        assert other.rows(index) is other


def test_fit_finds_noise_that_grows_with_the_input():
    g = torch.Generator().manual_seed(0)
    X = torch.rand(300, 1, dtype=torch.float64, generator=g)
    spread = 0.03 * torch.exp(2.5 * X[:, 0])
    y = torch.sin(6 * X[:, 0]) + spread * torch.randn(300, dtype=torch.float64, generator=g)
    torch.manual_seed(0)
    gp = ExactGP(Scale(RBF(lengthscale=0.3)), noise=HeteroscedasticNoise(nn.Linear(1, 1))).double()
    fit(gp, X, y)
    Xs = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
    found, truth = gp.noise_at(Xs).detach().sqrt(), 0.03 * torch.exp(2.5 * Xs[:, 0])
    assert bool(((found / truth - 1).abs() < 0.2).all())
    latent, noisy = (gp.condition(X, y).variance(Xs, noise=noise) for noise in (False, True))
    torch.testing.assert_close(noisy - latent, found.square(), rtol=1e-6, atol=1e-9)


def test_fit_on_a_subset_keeps_each_its_noise():
    X, y = data(N)
    gp = process(FixedNoise(variances()))
    report = fit(gp, X, y, subset=20, subset_steps=3, steps=0)
    assert report.stopped and gp.observed_noise(X).shape == (N,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_another_device():
    X, y = data(N)
    for name, make in NOISES.items():
        gp = process(make()[0], priors={"kernel.outputscale": LogNormal(0.0, 1.0)})
        want, prior = gp.log_marginal_likelihood(X, y), gp.log_prior()
        gp.to("cuda")
        value = gp.log_marginal_likelihood(X.cuda(), y.cuda())
        assert value.device.type == gp.log_prior().device.type == "cuda", name
        torch.testing.assert_close(value.cpu(), want, rtol=1e-9, atol=0)
        torch.testing.assert_close(gp.log_prior().cpu(), prior, rtol=1e-9, atol=0)


def test_float32_process_with_modules_in_float32():
    X, y = data(N, dtype=torch.float32)
    gp = ExactGP(Scale(RBF(3)), noise=HeteroscedasticNoise(log_variance())).float()
    value = gp.log_marginal_likelihood(X, y)
    assert value.dtype == torch.float32
    gp._dense(X.double(), y.double())[0].backward()  # the module's weights stay in float32
    assert all(p.grad is not None for p in gp.noise_model.parameters())
    forced = ExactGP(Scale(RBF(3)), noise=FixedNoise(variances()), logdet=PATHS["iterative"]["logdet"]).float()
    assert torch.isfinite(forced.log_marginal_likelihood(X, y))


def test_state_and_copies():
    gp = process(FixedNoise(variances(), new=0.3))
    other = process(FixedNoise(torch.ones(N), new=1.0))
    other.load_state_dict(gp.state_dict())
    assert torch.equal(other.noise_model.value, variances())
    assert torch.equal(copy.deepcopy(gp).noise_model.value, variances())
    assert "noise_model.value" in gp.state_dict() and "raw_noise" not in gp.state_dict()
    assert set(process(0.1).state_dict()) == {
        "raw_noise", "kernel.raw_outputscale", "kernel.base_kernel.raw_lengthscale", "mean.constant"
    }  # fmt: skip


def test_arguments():
    X, y = data(N)
    for bad in (0.0, -1.0, float("nan"), torch.ones(2, 2), torch.tensor([0.1, -0.2]), torch.ones(0)):
        with pytest.raises(OperandError, match="FixedNoise"):
            FixedNoise(bad)
    with pytest.raises(OperandError, match="new"):
        FixedNoise(0.1, new=torch.ones(3))
    with pytest.raises(OperandError, match="40 variances and X 10 points"):
        process(FixedNoise(variances())).log_marginal_likelihood(X[:10], y[:10])
    with pytest.raises(OperandError, match="Module"):
        HeteroscedasticNoise(lambda X: X[:, 0])
    with pytest.raises(OperandError, match="floor"):
        HeteroscedasticNoise(log_variance(), floor=-1.0)
    with pytest.raises(OperandError, match=r"\(40, 3\); expected \(40,\)"):
        process(HeteroscedasticNoise(nn.Identity())).log_marginal_likelihood(X, y)
    with pytest.raises(NonFiniteError, match="log noise variance"):
        broken = nn.Linear(3, 1)
        nn.init.constant_(broken.bias, float("nan"))
        process(HeteroscedasticNoise(broken)).log_marginal_likelihood(X, y)
