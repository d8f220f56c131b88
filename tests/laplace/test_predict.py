"""Predictions of many examples, sequences and nested inputs; last layers; what is refused."""

from __future__ import annotations

import pytest
import torch
from tests.memory import peak_of
from torch import Tensor, nn

from ritz.curvature import Jacobian
from ritz.errors import OperandError
from ritz.laplace import Laplace

DOUBLE = {"dtype": torch.float64}


def dense_variance(la: Laplace, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """J Σ Jᵀ from the dense Jacobian and the posterior's own root."""
    P = la.network.numel
    root = la.posterior.sample(torch.eye(P, **DOUBLE), la._prior_of(la.prior_precision), la._variance_of(1.0))
    J = Jacobian(la.model, None, la.params, x).to_dense().reshape(-1, shape[-1], P)
    return torch.einsum("ncp,pq,ndq->ncd", J, root.mT @ root, J).reshape(*shape, shape[-1])


class Pooled(nn.Module):
    """A norm between layers, so that layers alone do not tell the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


@pytest.mark.parametrize(
    ("model", "x", "labels"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(90, 3), (90,)),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 7, 3), (5, 7)),
        (Pooled(), torch.randn(70, 3), (70,)),
        (
            nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.ConvTranspose1d(2, 1, 2), nn.Flatten(), nn.Linear(3, 2)),
            torch.randn(40, 1, 3),
            (40,),
        ),
        (nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)), torch.randint(0, 6, (4, 5)), (4, 5)),
    ],
    ids=["rows", "sequence", "norm", "convolutions", "embedding"],
)
@pytest.mark.parametrize("structure", ["diag", "full"])
def test_variances_of_every_example(model, x, labels, structure):
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    la = Laplace(model, "classification", structure=structure, rank=100).fit((x, torch.zeros(labels, dtype=torch.long)))
    f, variance = la.functional_variance(x)
    torch.testing.assert_close(f, model(x).detach())
    torch.testing.assert_close(variance, dense_variance(la, x, tuple(f.shape)), rtol=1e-4, atol=1e-6)
    for link in ("probit", "mc", "bridge"):
        p = la.predict(x, link=link)
        assert p.shape == f.shape
        torch.testing.assert_close(p.sum(-1), torch.ones(labels, **DOUBLE))


def test_memory_of_a_prediction_is_that_of_some_rows():
    """n = 4000 with 10 outputs: the identity over all outputs would be 12 GB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 10))
    x, y = torch.randn(4000, 5), torch.randint(0, 10, (4000,))
    la = Laplace(model, "classification", structure="diag").fit((x[:100], y[:100]))
    assert peak_of(lambda: la.predict(x[:400])) < 50 << 20
    last = Laplace(model, "classification", structure="kron", subset="last_layer").fit((x[:100], y[:100]))
    assert last.predict(x).shape == (4000, 10)


class Backwards(nn.Module):
    """The head is registered before the body."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.body(x))
        return self.head(h if scale is None else h * scale)


def test_the_last_layer_is_the_one_that_runs_last():
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
    with pytest.raises(OperandError, match="head ran last; give subset='head'"):
        Laplace(Backwards(), "classification", subset="last_layer").fit((x, y))
    normed = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    la = Laplace(normed, "classification", subset="last_layer").fit((x, y))
    assert la.network.names == ("0.weight", "0.bias")
    model = Backwards()
    model.head.weight = nn.Parameter(model.head.weight.detach())
    by_name = Laplace(model, "classification", subset="head").fit(((x, torch.ones(6, 1)), y))
    assert by_name.predict((x, torch.ones(6, 1))).shape == (6, 2)


def test_the_search_goes_beyond_its_first_borders():
    """Weights of 1e-4 want a prior precision near 1e8."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False, **DOUBLE)
    model.weight.data *= 1e-4
    x = torch.randn(100, 5, **DOUBLE)
    y = model(x).detach() + 1e-3 * torch.randn(100, 1, **DOUBLE)
    la = Laplace(model, "regression", structure="kron").fit((x, y)).optimize_prior_precision()
    at = float(la.log_marginal_likelihood())
    assert la.prior_precision > 1e6
    for factor in (0.5, 2.0):
        assert float(la.log_marginal_likelihood(factor * la.prior_precision)) < at


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, y: Laplace(m, "classification", foo=3), TypeError, "does not know foo"),
        (lambda m, x, y: Laplace(m, "classification", structure="diag", floor=1.0), TypeError, "does not know floor"),
        (lambda m, x, y: Laplace(m, "classification", prior_precision=torch.ones(3)), OperandError, "a curve"),
        (
            lambda m, x, y: Laplace(nn.Sequential(m, nn.Flatten(0)), "regression").fit((x, y)),
            OperandError,
            r"\(n, …, C\)",
        ),
        (lambda m, x, y: Laplace(m, "classification").fit((x, y.double())), OperandError, "whole class numbers"),
        (lambda m, x, y: Laplace(nn.Flatten(), "classification", subset="last_layer"), OperandError, "no layer"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(nn.Linear(3, 2), torch.randn(6, 3), torch.randint(0, 2, (6,)))


def test_a_model_that_was_trained_on_is_noticed():
    model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.randint(0, 2, (6,))
    la = Laplace(model, "classification", structure="kron").fit((x, y))
    with torch.no_grad():
        model.weight += 0.1
    for use in (la.log_marginal_likelihood, lambda: la.predict(x), la.sample):
        with pytest.raises(OperandError, match="changed in place"):
            use()
