"""Which parameters are weights of linear maps, and why the others are not; what frozen and unused ones do."""

import pytest
import torch
from tests.curvature.oracle import Net, batch, factors, kfac, loss_of
from tests.curvature.recorder import close
from torch import nn
from torch.nn.utils import parametrizations

from ritz.curvature import discover
from ritz.errors import OperandError
from ritz.optim import SINGD

OWN = "a Scaled with a forward pass of its own"
RESCALES = "an embedding that rescales its gradients or rows"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Renamed(nn.Linear):
    """The same computation: torch's own forward pass."""


class Free(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, 3))


def tied_to(stranger, name="table"):
    model = nn.Sequential(nn.Linear(3, 2), stranger)
    setattr(stranger, name, model[0].weight)
    return model


def tied_embedding():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    return model


REASONS = {
    "own forward": (lambda: nn.Sequential(Scaled(3, 2)), "0.weight", OWN),
    "own convolution": (lambda: Standardised(1, 2, 3), "weight", "a Standardised with a forward pass of its own"),
    "sparse": (lambda: nn.Embedding(5, 3, sparse=True), "weight", "an embedding with sparse gradients"),
    "max_norm": (lambda: nn.Embedding(5, 3, max_norm=1.0), "weight", RESCALES),
    "free": (Free, "table", "Free.table has no rule"),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), "weight", "Bilinear.weight has no rule"),
    "bag": (lambda: nn.EmbeddingBag(5, 3), "weight", "EmbeddingBag.weight has no rule"),
    "tied embedding": (tied_embedding, "0.weight", "tied between embedding and linear"),
    "tied to a stranger": (lambda: tied_to(Free()), "0.weight", "tied with Free.table, which has no rule"),
    "tied to another use": (lambda: tied_to(Scaled(3, 2), "weight"), "0.weight", f"tied with {OWN}, which has no rule"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_has_no_rule_says_why(name):
    build, weight, reason = REASONS[name]
    model = build()
    own = {found.name: found for found in discover(model).values()}[weight]
    assert own.reason == reason and not own.sites
    if name != "sparse":
        rows = {row.name: row.rule for row in SINGD(model).report().rows}
        assert rows[weight] == f"AdamW: {reason}"


def test_strict_and_sparse_are_refused_with_the_reason():
    with pytest.raises(OperandError, match=r"0\.weight \(tied between embedding and linear\)"):
        SINGD(tied_embedding(), strict=True)
    with pytest.raises(OperandError, match="an embedding with sparse gradients"):
        SINGD(nn.Embedding(5, 3, sparse=True))


def test_a_reparametrised_weight_is_not_a_parameter():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    found = {own.name: own for own in discover(model).values()}
    assert [name for name, own in found.items() if own.sites] == ["1.weight"]
    assert found["0.bias"].vector and not found["0.parametrizations.weight.original1"].sites


def test_subclasses_that_compute_as_torch_does():
    assert all(own.sites or own.name == "bias" for own in discover(Renamed(3, 2)).values())


@pytest.mark.parametrize("shared", ["bias of two weights", "bias of a stranger", "one weight, two biases"])
def test_a_bias_is_a_column_only_where_it_is_the_weights_own(shared):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), Free())
    if shared == "bias of two weights":
        model[1].bias = model[0].bias
    elif shared == "bias of a stranger":
        model[2].table = model[0].bias
    else:
        model[1].weight = model[0].weight
    found = {own.name: own for own in discover(model).values()}
    assert found["0.weight"].sites and found["0.weight"].bias is None
    names = {row.name: row.rule for row in SINGD(model).report().rows}
    assert names["0.weight"] == "linear" and names["0.bias"] == "diagonal"


def test_norms_are_vectors():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm([3, 4, 4]), nn.RMSNorm([4, 4]))
    assert all(own.vector and not own.sites for own in discover(model).values())


def test_a_frozen_bias_is_no_column():
    model, (x, t) = Net(), batch()
    model.token.bias.requires_grad_(False)
    bias = model.token.bias.clone()
    optimizer = kfac(model)
    optimizer.param_groups[0]["lr"] = 0.1
    weight = model.token.weight.detach().clone()
    loss_of(model(x), t).backward()
    a = model.conv(x).detach().tanh().flatten(2).mT.flatten(0, 1)
    A, _ = factors(optimizer)["token"]
    assert close(A, a.mT @ a / len(a))
    assert torch.equal(model.token.bias, bias) and not torch.equal(model.token.weight, weight)


def test_a_frozen_weight_leaves_its_bias_to_the_diagonal_rule():
    model, (x, t) = Net(), batch()
    model.token.weight.requires_grad_(False)
    optimizer = kfac(model)
    optimizer.param_groups[0]["lr"] = 0.1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model(x), t).backward()
    assert set(factors(optimizer)) == {"conv", "head"}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"conv.weight", "conv.bias", "token.bias", "head.weight"}


def test_a_layer_that_is_not_used_in_a_step_keeps_its_factors():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()
    optimizer, x = kfac(model), torch.randn(5, 3).double()
    loss_of(model["a"](x), 0.0).backward()
    assert set(factors(optimizer)) == {"a"}
    optimizer.zero_grad()
    loss_of(model["b"](x), 0.0).backward()
    first = factors(optimizer)
    optimizer.zero_grad()
    loss_of(model["b"](2 * x), 0.0).backward()
    second = factors(optimizer)
    assert close(first["a"][0], second["a"][0]) and not close(first["b"][0], second["b"][0])
    optimizer.step()  # without any backward pass
