"""Structure "full" with a short side: all eigenpairs, and nothing is estimated. Against dense references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ritz
from ritz.curvature import GGN, CrossEntropy, DualGGN, SquaredError
from ritz.errors import OperandError
from ritz.laplace import Laplace, pairs, posterior

from .test_laplace import fitted, log_evidence, made

DOUBLE = {"dtype": torch.float64}


def small(likelihood: str, count: int, **options: Any) -> tuple[Laplace, Tensor, Tensor, Tensor]:
    """P = 32; count = 6 has a dual side of 12, count = 20 one of 40."""
    model, x, y = made(likelihood)
    x, y = x[:count], y[:count]
    loss = CrossEntropy() if likelihood == "classification" else SquaredError()
    G = GGN(model, loss, None, (x, y), reduction="sum").to_dense()
    return Laplace(model, likelihood, **options).fit([(x[:2], y[:2]), (x[2:], y[2:])]), G, x, y


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("count", [6, 20])
def test_evidence_samples_and_variances(likelihood, count):
    prior = {"0.weight": 0.3, "0.bias": 2.0, "2": 5.0}
    noise = {"sigma_noise": 0.3} if likelihood == "regression" else {}
    la, G, x, y = small(likelihood, count, prior_precision=prior, **noise)
    assert isinstance(la.posterior, posterior.LowRank) and la.posterior.V.shape[1] <= min(32, 2 * count)
    logs = {k: torch.tensor(v, requires_grad=True, **DOUBLE) for k, v in prior.items()}
    sigma = torch.tensor(noise.get("sigma_noise", 1.0), requires_grad=likelihood == "regression", **DOUBLE)
    D = torch.cat([logs["0.weight"].expand(15), logs["0.bias"].expand(5), logs["2"].expand(12)])
    want = log_evidence(la, G, x, y, D, sigma)
    value, info = la.log_marginal_likelihood(logs, sigma, return_info=True)
    torch.testing.assert_close(value, want, rtol=1e-11, atol=1e-10)
    assert float(info.standard_error) == 0.0
    leaves = [*logs.values(), *([sigma] if sigma.requires_grad else [])]
    got, expected = (torch.autograd.grad(v, leaves) for v in (value, want))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    curve = torch.tensor([1e-6, 1.0, 1e3], **DOUBLE)
    single = torch.stack([log_evidence(la, G, x, y, d.expand(32), sigma) for d in curve])
    torch.testing.assert_close(la.log_marginal_likelihood(curve, sigma), single, rtol=1e-9, atol=1e-7)
    covariance = torch.linalg.inv(G / sigma.detach() ** 2 + torch.diag(D.detach()))
    root = la.posterior.sample(torch.eye(32, **DOUBLE), la._prior_of(prior), sigma.detach() ** 2)
    torch.testing.assert_close(root.mT @ root, covariance, rtol=1e-9, atol=1e-10)
    J = ritz.curvature.Jacobian(la.model, None, None, x).to_dense().reshape(count, 2, 32)
    exact = torch.einsum("ncp,pq,ndq->ncd", J, covariance, J)
    torch.testing.assert_close(la.functional_variance(x)[1], exact, rtol=1e-9, atol=1e-10)


def test_groups_with_and_without_kept_products(monkeypatch):
    values = {"0": 0.1, "2.weight": 0.4, "2.bias": 3.0}
    la, G, x, y = small("regression", 20)
    D = torch.cat([torch.full((n,), v, **DOUBLE) for n, v in ((20, 0.1), (10, 0.4), (2, 3.0))])
    want = log_evidence(la, G, x, y, D, torch.tensor(1.0, **DOUBLE))
    torch.testing.assert_close(la.log_marginal_likelihood(values), want, rtol=1e-11, atol=1e-10)
    assert la.posterior._grams.shape == (4, 32, 32)
    monkeypatch.setattr(posterior, "GRAM_BYTES", 8 * 4 * 32 * 32 - 1)
    other, *_ = small("regression", 20)
    torch.testing.assert_close(other.log_marginal_likelihood(values), want, rtol=1e-11, atol=1e-10)
    assert other.posterior._grams is None


def test_networks_in_single_precision_are_decomposed_in_double():
    """Noise of 1e-3: λ_max/(σ² δ) is 1e9, and rounding in single precision would hide the small eigenvalues."""
    model, x, y = made("regression")
    G = GGN(model, SquaredError(), None, (x, y), reduction="sum").to_dense()
    want = torch.logdet(torch.eye(32, **DOUBLE) + G / 1e-6)
    la = Laplace(model.float(), "regression", sigma_noise=1e-3).fit((x.float(), y.float()))
    value, *_ = la.posterior.logdet(la._prior_of(1.0), torch.tensor(1e-6, **DOUBLE))
    assert float(value) == pytest.approx(float(want), rel=1e-4)
    draws = la.sample(2)
    assert draws.dtype == torch.float32 and la.functional_variance(x.float())[1].dtype == torch.float32


def test_rows_of_the_root_with_and_without_layers():
    torch.manual_seed(0)
    for middle in (nn.Tanh(), nn.LayerNorm(5)):
        model = nn.Sequential(nn.Linear(3, 5), middle, nn.Linear(5, 2)).double()
        data = [(torch.randn(n, 3, **DOUBLE), torch.randint(0, 2, (n,))) for n in (4, 40)]
        G = GGN(model, CrossEntropy(), None, data, reduction="mean")
        R = DualGGN(G).root_rows()
        torch.testing.assert_close(R.mT @ R, G.to_dense(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(R @ R.mT, DualGGN(G).to_dense(), rtol=1e-12, atol=1e-14)


def test_when_it_is_decomposed(monkeypatch):
    kind = lambda **options: type(small("classification", 20, **options)[0].posterior)  # noqa: E731
    assert kind() is posterior.LowRank
    assert kind(dense=False) is posterior.Full and kind(method=ritz.Lanczos(10)) is posterior.Full
    monkeypatch.setattr(pairs, "MOST_SIDE", 31)
    assert kind() is posterior.Full and kind(dense=True) is posterior.LowRank
    monkeypatch.setattr(pairs, "MOST_SIDE", 32)
    monkeypatch.setattr(pairs, "MOST_BYTES", 8 * 32 * 32)  # G itself, but not the root
    la, G, _, _ = small("classification", 20)
    assert isinstance(la.posterior, posterior.LowRank)
    V = la.posterior.V
    torch.testing.assert_close(V * la.posterior.values @ V.mT, G, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(pairs, "MOST_BYTES", 8 * 32 * 32 - 1)
    assert kind() is posterior.Full


def test_a_dense_posterior_comes_back_whole(tmp_path):
    la, _, x, _ = small("regression", 6, sigma_noise=0.5, prior_precision={"0": 0.5, "2": 3.0})
    torch.save(la.state_dict(), tmp_path / "la.pt")
    state = torch.load(tmp_path / "la.pt", weights_only=True)
    loaded = Laplace(la.model, "regression").load_state_dict(state)
    for use in (lambda p: p.log_marginal_likelihood(), lambda p: p.sample(2), lambda p: p.predict(x)[1]):
        torch.testing.assert_close(use(loaded), use(la))


@pytest.mark.parametrize(
    "options", [{"structure": "kron"}, {"rtol": 1e-3}, {"hyperparameters": [torch.ones(1)]}], ids=str
)
def test_dense_where_it_means_nothing_is_refused(options):
    with pytest.raises(OperandError, match="dense=True is for structure='full'"):
        fitted("classification", options.pop("structure", "full"), dense=True, **options)
