"""The leave-one-out score against n processes that each leave one observation out; objectives as values."""

import pytest
import torch
from tests.gp.problems import data, process
from torch.distributions import LogNormal, MultivariateNormal, Normal

from ritz import CG, Direct, Hutchinson, Lanczos
from ritz.errors import DomainError, OperandError
from ritz.gp import ConstantMean, ExactGP, FixedNoise, LeaveOneOut, MarginalLikelihood, ZeroMean, fit
from ritz.gp.exact import DENSE_UP_TO
from ritz.kernels import RBF, Scale

N = 15


def one_by_one(gp, X, y):
    """Every observation predicted by conditioning a dense Gaussian on the others."""
    K, m = gp.dense_covariance(X), gp.mean(X)
    scores, means, variances = [], [], []
    for i in range(len(y)):
        rest = [j for j in range(len(y)) if j != i]
        solved = torch.linalg.solve(K[rest][:, rest], torch.stack([y[rest] - m[rest], K[rest, i]], 1))
        mean, variance = m[i] + K[i, rest] @ solved[:, 0], K[i, i] - K[i, rest] @ solved[:, 1]
        scores.append(Normal(mean, variance.sqrt()).log_prob(y[i]))
        means.append(mean)
        variances.append(variance)
    return torch.stack(scores).sum(), torch.stack(means), torch.stack(variances)


@pytest.mark.parametrize("noise", [0.05, FixedNoise(0.02 + torch.rand(N, dtype=torch.float64))], ids=["one", "each"])
def test_value_predictions_and_gradients(noise):
    X, y = data(N)
    X, y = X.requires_grad_(True), y.requires_grad_(True)
    gp = process(noise=noise)
    value, info = gp.leave_one_out(X, y, return_info=True)
    want, mean, variance = one_by_one(gp, X, y)
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    torch.testing.assert_close(info.details["mean"], mean.detach())
    torch.testing.assert_close(info.details["variance"], variance.detach())
    assert info.method == Direct() and float(info.standard_error) == 0.0
    tensors = [X, y, *gp.parameters()]
    for got, ref in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(want, tensors)):
        torch.testing.assert_close(got, ref, rtol=1e-7, atol=1e-9)


def test_second_derivative():
    X, y = data(6)
    gp = process()
    assert torch.autograd.gradgradcheck(gp.leave_one_out, (X.requires_grad_(True), y), atol=1e-5)


@torch.no_grad()
def test_several_outputs_are_summed():
    X, y = data(N)
    Y = torch.stack([y, 2 * y - 1, X[:, 0]], 1)
    gp = process()
    value, info = gp.leave_one_out(X, Y, return_info=True)
    alone = [gp.leave_one_out(X, Y[:, j].contiguous(), return_info=True) for j in range(3)]
    assert float(value) == pytest.approx(sum(float(v) for v, _ in alone), rel=1e-12)
    for j, (_, one) in enumerate(alone):
        torch.testing.assert_close(info.details["mean"][:, j], one.details["mean"])
        torch.testing.assert_close(info.details["variance"][:, j], one.details["variance"])


@torch.no_grad()
def test_dense_whatever_the_likelihood_does():
    X, y = data(N)
    forced = process(logdet=(Hutchinson(3), Lanczos(3)), solver=CG())
    assert float(forced.leave_one_out(X, y)) == pytest.approx(float(process().leave_one_out(X, y)), rel=1e-12)


def test_refused_beyond_the_dense_size(monkeypatch):
    n = DENSE_UP_TO + 1
    X = torch.linspace(0, 1, n, dtype=torch.float64).unsqueeze(1)
    gp = ExactGP(RBF()).double()
    with pytest.raises(OperandError, match=r"size 2001.*Direct\(\)"):
        gp.leave_one_out(X, X[:, 0])
    monkeypatch.setattr("ritz.gp.exact.DENSE_UP_TO", 10)
    X, y = data(N)
    with pytest.raises(OperandError, match="size 15"):
        process().leave_one_out(X, y)
    assert float(process(solver=Direct()).leave_one_out(X, y).detach()) < 0


@torch.no_grad()
def test_float32_points_are_scored_in_float64():
    X, y = data(N, dtype=torch.float32)
    value = process(dtype=torch.float32).leave_one_out(X, y)
    want = process().leave_one_out(X.double(), y.double())
    assert value.dtype == torch.float32 and float(value) == pytest.approx(float(want), rel=1e-5)


def test_breakdown_is_explained():
    X = torch.zeros(4, 1, dtype=torch.float64)
    gp = ExactGP(Scale(RBF(), 1.0), noise=1e-18, noise_floor=1e-19).double()
    with pytest.raises(DomainError, match="3 rows"):
        gp.leave_one_out(X, X[:, 0])


def test_objectives_are_values():
    X, y = data(N)
    gp = process()
    assert MarginalLikelihood() == MarginalLikelihood() and repr(LeaveOneOut()) == "LeaveOneOut()"
    value, info = MarginalLikelihood()(gp, X, y)
    assert torch.equal(value, gp.log_marginal_likelihood(X, y)) and info.method == Direct()
    value, info = LeaveOneOut()(gp, X, y)
    assert torch.equal(value, gp.leave_one_out(X, y)) and "variance" in info.details


def test_fit_raises_the_score_that_it_is_given():
    X, y = data(60)
    prior = {"noise": LogNormal(-3.0, 1.0)}
    scored, likely = process(priors=prior), process(priors=prior)
    fit(scored, X, y, objective=LeaveOneOut())
    fit(likely, X, y)

    def total(gp):
        return gp.leave_one_out(X, y) + gp.log_prior()

    assert float(total(scored).detach()) > float(total(likely).detach()) > float(total(process()).detach())
    for g in torch.autograd.grad(total(scored), list(scored.parameters())):
        assert float(g.abs().max()) < 0.05


@torch.no_grad()
def test_noise_curve_dense_and_iterative():
    X, y = data(30)
    noises = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
    Y = torch.stack([y, 3 * y + 1], 1)
    for options in ({}, {"logdet": (Hutchinson(30), Lanczos(30))}):
        gp = process(**options)
        K, m = gp.kernel.evaluate(X), gp.mean(X)
        found, several = gp.noise_curve(X, y, noises), gp.noise_curve(X, Y, noises)
        assert found.shape == several.shape == (4,)
        for s, value, total in zip(noises, found, several):
            normal = MultivariateNormal(m, K + s * torch.eye(30))
            want = [float(normal.log_prob(t)) for t in (y, Y[:, 1])]
            assert float(value) == pytest.approx(want[0], rel=1e-8)
            assert float(total) == pytest.approx(sum(want), rel=1e-8)
        at_own = gp.noise_curve(X, y, gp.noise.reshape(1))
        assert float(at_own) == pytest.approx(float(gp.log_marginal_likelihood(X, y)), rel=1e-8)
        single = process(dtype=torch.float32, **options).noise_curve(X.float(), y.float(), noises[1:])
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), found[1:], rtol=1e-4, atol=0)
    for bad in (torch.tensor([-1.0]), torch.tensor(0.1), torch.ones(0)):
        with pytest.raises(OperandError, match="noises"):
            process().noise_curve(X, y, bad)


def test_gradient_of_the_noise_curve():
    X, y = data(30)
    for options in ({}, {"logdet": (Hutchinson(30), Lanczos(30))}):
        gp = process(**options)
        noises = torch.tensor([0.05, 0.5], dtype=torch.float64, requires_grad=True)
        value = gp.noise_curve(X, y, noises)
        K = gp.kernel.evaluate(X)
        normals = [MultivariateNormal(gp.mean(X), K + s * torch.eye(30)).log_prob(y) for s in noises]
        weights = torch.tensor([1.0, -0.3], dtype=torch.float64)
        tensors = [noises, *gp.kernel.parameters(), *gp.mean.parameters()]
        found = torch.autograd.grad(value @ weights, tensors)
        truth = torch.autograd.grad(torch.stack(normals) @ weights, tensors)
        for got, ref in zip(found, truth):
            torch.testing.assert_close(got, ref, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_a_mean_for_each_output():
    X, y = data(N)
    gp = ExactGP(Scale(RBF(3)), ConstantMean([0.0, 5.0], outputs=2)).double()
    zero = ExactGP(Scale(RBF(3)), ZeroMean()).double()
    Y = torch.stack([y, y + 5], 1)
    assert float(gp.leave_one_out(X, Y)) == pytest.approx(2 * float(zero.leave_one_out(X, y)), rel=1e-10)
