"""Laplace posteriors against dense linear algebra: evidence, its derivatives, samples, variances, predictions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ritz
from ritz.curvature import EKFAC, GGN, KFAC, CrossEntropy, DiagonalGGN, SquaredError
from ritz.errors import OperandError
from ritz.laplace import Laplace

DOUBLE = {"dtype": torch.float64}
STRUCTURES = ["full", "kron", "ekfac", "diag", "lowrank"]
EXACT = {"method": ritz.Lanczos(60), "rtol": 1e-10}  # of structure "full"


def made(likelihood: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(20, 3, **DOUBLE)
    y = torch.randint(0, 2, (20,)) if likelihood == "classification" else torch.randn(20, 2, **DOUBLE)
    return model, x, y


def fitted(likelihood: str, structure: str, **options: Any) -> tuple[Laplace, Tensor, Tensor, Tensor]:
    """A posterior, its curvature as a dense matrix, and the data."""
    model, x, y = made(likelihood)
    loss = CrossEntropy() if likelihood == "classification" else SquaredError()
    kinds = {"kron": KFAC, "ekfac": EKFAC, "diag": DiagonalGGN}
    G = kinds.get(structure, GGN)(model, loss, None, (x, y), reduction="sum").to_dense()
    options = (EXACT if structure == "full" else {}) | options
    la = Laplace(model, likelihood, structure=structure, rank=40, **options)
    return la.fit([(x[:8], y[:8]), (x[8:], y[8:])]), G, x, y


def log_evidence(la: Laplace, G: Tensor, x: Tensor, y: Tensor, D: Tensor, sigma: Tensor) -> Tensor:
    theta = torch.cat([p.detach().reshape(-1) for p in la.model.parameters()])
    f = la.model(x).detach()
    if la.likelihood == "classification":
        fit = -F.cross_entropy(f, y, reduction="sum")
    else:
        fit = torch.distributions.Normal(f, sigma).log_prob(y).sum()
    H = G / sigma**2 + torch.diag(D)
    return fit - 0.5 * ((D * theta**2).sum() + torch.logdet(H) - D.log().sum())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_evidence_and_its_derivatives(likelihood, structure):
    la, G, x, y = fitted(likelihood, structure)
    P, ones = G.shape[0], torch.ones(G.shape[0], **DOUBLE)
    sigma = torch.tensor(1.0 if likelihood == "classification" else 0.7, requires_grad=True, **DOUBLE)
    deltas = torch.tensor([1e-3, 0.1, 1.0, 50.0], requires_grad=True, **DOUBLE)
    curve = la.log_marginal_likelihood(deltas, sigma)
    want = torch.stack([log_evidence(la, G, x, y, d * ones, sigma) for d in deltas])
    torch.testing.assert_close(curve, want, rtol=1e-7, atol=1e-7)
    got = torch.autograd.grad(curve.sum(), (deltas, sigma), allow_unused=True)
    expected = torch.autograd.grad(want.sum(), (deltas, sigma), allow_unused=True)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
    if likelihood == "regression":
        torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)
    single = la.log_marginal_likelihood(0.1, float(sigma.detach()))
    assert single.shape == () and float(single) == pytest.approx(float(want[1].detach()), rel=1e-7)
    value, info = la.log_marginal_likelihood(deltas.detach(), sigma.detach(), return_info=True)
    assert info.standard_error.shape == value.shape == (4,)
    assert P == la.network.numel


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_precision_for_every_group(structure):
    la, G, x, y = fitted("regression", structure)
    a, b = (torch.tensor(v, requires_grad=True, **DOUBLE) for v in (0.3, 4.0))
    sigma = torch.tensor(0.5, requires_grad=True, **DOUBLE)
    value = la.log_marginal_likelihood({"0": a, "2": b}, sigma)
    D = torch.cat([a.expand(20), b.expand(12)])
    want = log_evidence(la, G, x, y, D, sigma)
    torch.testing.assert_close(value, want, rtol=1e-7, atol=1e-7)
    got, expected = (torch.autograd.grad(v, (a, b, sigma)) for v in (value, want))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior", [0.5, {"0": 0.5, "2": 3.0}])
def test_samples_and_variances_have_the_posterior_covariance(structure, prior):
    la, G, x, _ = fitted("regression", structure, sigma_noise=0.7, prior_precision=prior)
    P = G.shape[0]
    D = torch.full((P,), 0.5, **DOUBLE)
    D[20:] = 0.5 if prior == 0.5 else 3.0
    covariance = torch.linalg.inv(G / 0.49 + torch.diag(D))
    root = la.posterior.sample(torch.eye(P, **DOUBLE), la._prior_of(prior), torch.tensor(0.49, **DOUBLE))
    torch.testing.assert_close(root.mT @ root, covariance, rtol=1e-6, atol=1e-8)
    f, variance = la.functional_variance(x[:5])
    J = ritz.curvature.Jacobian(la.model, None, None, x[:5]).to_dense().reshape(5, 2, P)
    torch.testing.assert_close(variance, torch.einsum("ncp,pq,ndq->ncd", J, covariance, J), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(f, la.model(x[:5]).detach())
    draws = la.sample(3, seed=1)
    assert draws.shape == (3, P) and torch.equal(draws, la.sample(3, seed=1))


def test_variances_by_solves_and_the_bound_of_a_low_rank():
    la, G, x, _ = fitted("classification", "full", prior_precision=0.1)
    exact = la.functional_variance(x)[1]
    la.posterior.rank = None
    torch.testing.assert_close(la.functional_variance(x)[1], exact, rtol=1e-5, atol=1e-7)
    la.posterior.rank, la.posterior.pairs = 3, None
    _, upper, lower = la.functional_variance(x, return_lower=True)
    bound = upper - exact
    assert float(torch.linalg.eigvalsh(exact - lower).min()) > -1e-7
    assert float(torch.linalg.eigvalsh(bound).min()) > -1e-7 and float(bound.diagonal(dim1=1, dim2=2).max()) > 1e-3


def test_predictions():
    la, _, x, _ = fitted("classification", "full", prior_precision=1.0)
    f, variance = la.functional_variance(x)
    draws = torch.distributions.MultivariateNormal(f, variance + 1e-12 * torch.eye(2, **DOUBLE)).sample((40_000,))
    want = torch.softmax(draws, -1).mean(0)
    for link, tol in (("mc", 0.03), ("probit", 0.06), ("bridge", 0.2)):
        p = la.predict(x, link=link, samples=4000)
        torch.testing.assert_close(p.sum(-1), torch.ones(20, **DOUBLE))
        assert float((p - want).abs().max()) < tol, link
    regression, _, z, _ = fitted("regression", "kron")
    mean, covariance = regression.predict(z)
    assert mean.shape == (20, 2) and covariance.shape == (20, 2, 2)


@pytest.mark.parametrize("structure", ["full", "kron", "lowrank"])
def test_post_hoc_optimisation_finds_the_maximum(structure):
    la, G, x, y = fitted("regression", structure)
    la.optimize_prior_precision()
    delta = torch.tensor(la.prior_precision, requires_grad=True, **DOUBLE)
    sigma = torch.tensor(la.sigma_noise, requires_grad=True, **DOUBLE)
    value = log_evidence(la, G, x, y, delta * torch.ones(G.shape[0], **DOUBLE), sigma)
    slopes = torch.autograd.grad(value, (delta, sigma))
    assert abs(float((slopes[0] * delta).detach())) < 0.02 and abs(float((slopes[1] * sigma).detach())) < 0.2
    before = float(value.detach())
    la.optimize_prior_precision(groups=["0", "2"], steps=60 if structure == "full" else 150)
    assert float(la.log_marginal_likelihood()) > before - 1e-3 and set(la.prior_precision) == {"0", "2"}


@pytest.mark.parametrize("dual", [False, True])
def test_evidence_from_either_side(dual):
    la, G, x, y = fitted("classification", "full", dual=dual)
    deltas = torch.tensor([1e-3, 1.0], **DOUBLE)
    want = [
        log_evidence(la, G, x, y, d * torch.ones(G.shape[0], **DOUBLE), torch.tensor(1.0, **DOUBLE)) for d in deltas
    ]
    torch.testing.assert_close(la.log_marginal_likelihood(deltas), torch.stack(want), rtol=1e-7, atol=1e-7)
    assert la.posterior.measure.nodes.shape[0] == (40 if dual else 32)  # as many probes as rows: exact


def test_one_run_serves_every_scalar_prior():
    la, _, _, _ = fitted("classification", "full", dual=False)
    counted = ritz.Counting(la.posterior.G)
    la.posterior.G = counted
    la.log_marginal_likelihood(torch.logspace(-3, 3, 50, **DOUBLE))
    spent = counted.num_matvecs
    la.optimize_prior_precision()
    la.log_marginal_likelihood(3.0)
    assert counted.num_matvecs == spent > 0
    la.log_marginal_likelihood(1e-5)  # below what the nodes resolve: a further run
    assert counted.num_matvecs > spent


def test_last_layer_and_named_subsets():
    model, x, y = made("classification")
    la = Laplace(model, "classification", subset="last_layer").fit((x, y))
    assert la.network.names == ("2.weight", "2.bias")
    by_name = (Laplace(model, "classification", subset=s, **EXACT).fit((x, y)) for s in ("2", ["2.weight", "2.bias"]))
    torch.testing.assert_close(*(posterior.log_marginal_likelihood() for posterior in by_name))


def test_evidence_is_differentiable_in_hyperparameters():
    torch.manual_seed(0)

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4, **DOUBLE), nn.Linear(4, 2, **DOUBLE)
            self.t = nn.Parameter(torch.tensor(1.3, **DOUBLE))

        def forward(self, z: Tensor) -> Tensor:
            return self.outer(torch.tanh(self.inner(z) * self.t))

    model, x, y = Tempered(), torch.randn(15, 3, **DOUBLE), torch.randint(0, 2, (15,))

    def evidence() -> Tensor:
        la = Laplace(model, "classification", subset=["inner", "outer"], hyperparameters=[model.t], **EXACT)
        return la.fit((x, y)).log_marginal_likelihood(0.5)

    (g,) = torch.autograd.grad(evidence(), model.t)
    h, values = 1e-5, []
    for step in (h, -2 * h):
        with torch.no_grad():
            model.t.add_(step)
        values.append(float(evidence().detach()))
    assert float(g) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


def test_large_network_is_estimated_within_its_error():
    """P = 1 283: the estimator is random there, and agrees with the dense matrix within four standard errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    x, y = torch.randn(200, 30, **DOUBLE), torch.randn(200, 1, **DOUBLE)
    la = Laplace(model, "regression", sigma_noise=0.3, estimator=ritz.Deflated(100, 10), dual=False).fit((x, y))
    G = GGN(model, SquaredError(), None, (x, y), reduction="sum").to_dense()
    deltas = torch.tensor([0.01, 1.0, 100.0], **DOUBLE)
    value, info = la.log_marginal_likelihood(deltas, return_info=True)
    ones, sigma = torch.ones(G.shape[0], **DOUBLE), torch.tensor(0.3, **DOUBLE)
    exact = torch.stack([log_evidence(la, G, x, y, d * ones, sigma) for d in deltas])
    half = 0.5 * torch.stack([torch.logdet(torch.diag(ones) + G / (0.09 * d)) for d in deltas])
    assert bool(((value - exact).abs() <= 4 * info.standard_error + 2e-3 * half).all())
    assert bool(((info.standard_error > 0) & (info.standard_error < 0.05 * half)).all())
    group, own = la.log_marginal_likelihood({"0": 1.0, "2": 1.0}, return_info=True)
    assert abs(float(group - exact[1])) <= 4 * float(own.standard_error) + 2e-3 * float(half[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: Laplace(m, "poisson"), "likelihood='poisson'; expected 'classification' or 'regression'"),
        (lambda m, d: Laplace(m, "classification", structure="dense"), "structure='dense'; expected one of full"),
        (lambda m, d: Laplace(lambda x: x, "classification"), "the model is a function"),
        (lambda m, d: Laplace(m, "classification", sigma_noise=0.5), "which has none"),
        (lambda m, d: Laplace(m, "classification", prior_precision=-1.0), "expected positive numbers"),
        (lambda m, d: Laplace(m, "classification", prior_precision={"0": 1.0}), "has nothing for 2.weight, 2.bias"),
        (lambda m, d: Laplace(m, "classification", prior_precision={"9": 1.0}), "prior_precision has '9'"),
        (lambda m, d: Laplace(m, "classification").log_marginal_likelihood(), "call .fit"),
        (lambda m, d: Laplace(m, "classification").fit(d).predict(d[0], link="logit"), "link='logit'"),
        (lambda m, d: Laplace(m, "regression", sigma_noise=0.0), "sigma_noise=0.0"),
        (
            lambda m, d: Laplace(m, "classification", structure="diag", hyperparameters=[torch.ones(1)]),
            "need structure",
        ),
        (lambda m, d: Laplace(m, "classification").fit(d).log_marginal_likelihood(math.inf), "expected finite terms"),
    ],
)
def test_bad_input(call, message):
    model, x, y = made("classification")
    with pytest.raises(OperandError, match=message):
        call(model, (x, y))
