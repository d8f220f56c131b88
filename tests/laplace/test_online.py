"""Training with the evidence: hyper-parameters move, the last or the best state is kept."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from ritz.errors import OperandError
from ritz.laplace import marglik_training

DOUBLE = {"dtype": torch.float64}


def data(n: int = 60) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, **DOUBLE)
    y = x[:, :1] - 0.5 * x[:, 1:2] + 0.2 * torch.randn(n, 1, generator=generator, **DOUBLE)
    return [(x[:30], y[:30]), (x[30:], y[30:])]


def train(structure: str, prior: str, **options: object) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    settings = {"n_epochs": 60, "marglik_frequency": 5, "n_epochs_burnin": 10, "n_hypersteps": 5, "lr_hyp": 0.2}
    adam = functools.partial(torch.optim.Adam, lr=0.02)
    return model, marglik_training(
        model, data(), "regression", structure=structure, prior_structure=prior, optimizer=adam, **(settings | options)
    )


@pytest.mark.parametrize(("structure", "prior"), [("kron", "layerwise"), ("full", "scalar"), ("diag", "scalar")])
def test_noise_and_priors_are_learned(structure, prior):
    model, result = train(structure, prior)
    la = result.laplace
    assert 0.1 < la.sigma_noise < 0.4  # 0.2 made the data
    assert result.evidence[-1] > result.evidence[0] + 5 and len(result.losses) == 60
    value = float(la.log_marginal_likelihood())
    assert value == pytest.approx(result.evidence[-1], rel=1e-6)
    if prior == "layerwise":
        assert set(la.prior_precision) == {"0", "2"} and len(set(la.prior_precision.values())) == 2
    assert not model.training


def test_the_last_or_the_best_state():
    """A learning rate that ruins the network after the first epochs: their evidence is the highest."""

    def ruin(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 30 else 50.0)

    last, best = (train("diag", "scalar", scheduler=ruin, keep_best=k)[1] for k in (False, True))
    assert last.evidence == best.evidence and last.epochs[-1] == 59
    assert max(last.evidence) > last.evidence[-1] + 1
    for found, want in ((last, last.evidence[-1]), (best, max(best.evidence))):
        assert float(found.laplace.log_marginal_likelihood()) == pytest.approx(want, rel=1e-6)


def test_epochs_after_the_last_evaluation_count():
    model, result = train("diag", "scalar", n_epochs=63)
    assert result.epochs[-1] == 59 and len(result.losses) == 63
    other, _ = train("diag", "scalar", n_epochs=60)
    assert not torch.equal(other[0].weight, model[0].weight)


def test_a_schedule_that_never_asks_for_the_evidence_is_refused():
    with pytest.raises(OperandError, match="no evidence was computed in 3 epochs"):
        train("diag", "scalar", n_epochs=3)
    with pytest.raises(OperandError, match="train_loader is empty"):
        marglik_training(nn.Linear(2, 1), [], "regression")
    with pytest.raises(OperandError, match="expected 'layerwise' or 'scalar'"):
        marglik_training(nn.Linear(2, 1), [], "regression", prior_structure="each")


class Scaled(nn.Module):
    """Inputs with a relevance each, which no loss on the training data would make small."""

    def __init__(self, relevance: torch.Tensor) -> None:
        super().__init__()
        self.relevance = relevance
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x * self.relevance)


@pytest.mark.parametrize("keep_best", [False, True])
def test_hyperparameters_inside_the_model_climb_the_evidence_too(keep_best):
    torch.manual_seed(0)
    relevance = torch.ones(5, requires_grad=True, **DOUBLE)
    options = {"structure": "full", "optimizer": functools.partial(torch.optim.Adam, lr=0.02), "n_epochs": 60,
               "marglik_frequency": 5, "n_epochs_burnin": 20, "n_hypersteps": 5, "lr_hyp": 0.1}  # fmt: skip
    model = Scaled(relevance)
    result = marglik_training(model, data(), "regression", hyperparameters=[relevance], keep_best=keep_best, **options)
    size = relevance.detach().abs()
    assert float(size[:2].min()) > 2 * float(size[2:].max())  # three of the inputs have no part in the targets
    assert result.evidence[-1] > result.evidence[0] + 5
    want = max(result.evidence) if keep_best else result.evidence[-1]
    assert float(result.laplace.log_marginal_likelihood().detach()) == pytest.approx(want, rel=1e-6)


def test_hyperparameters_that_are_trained_by_the_loss_are_refused():
    model = Scaled(torch.ones(5, **DOUBLE))
    for wrong, words in (
        (model.net[0].weight, "a parameter of the model"),
        (torch.ones(5), "has Tensor; expected leaves"),
        (torch.ones(5, requires_grad=True) * 2, "expected leaves"),
    ):
        with pytest.raises(OperandError, match=words):
            marglik_training(model, data(), "regression", structure="full", hyperparameters=[wrong], n_epochs=1)


def test_the_prior_mean_is_that_of_the_training_too():
    model, result = train("diag", "scalar", prior_mean=0.3, prior_prec_init=1e6, lr_hyp=1e-9, n_epochs=200)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(theta, torch.full_like(theta, 0.3), rtol=0, atol=0.02)


@pytest.mark.parametrize("option", ["prior_precision", "sigma_noise", "subset"])
def test_what_the_training_chooses_is_refused_before_it_begins(option):
    with pytest.raises(OperandError, match=f"came with {option}, which it chooses itself"):
        train("diag", "scalar", **{option: 2.0})
