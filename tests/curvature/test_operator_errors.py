"""Bad input to curvature operators: one clear sentence, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ritz.curvature import GGN, NTK, CrossEntropy, CustomLoss, Fisher, Hessian, Jacobian, MonteCarloFisher, SquaredError
from ritz.errors import OperandError


def net(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *extra, nn.Linear(4, 3))


OWN = CustomLoss(lambda f, y: f.sum())
X, Y = torch.ones(5, 3), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GGN(net(nn.Dropout(0.5)), CrossEntropy(), None, (X, Y)), r"1 \(Dropout\) drops activations"),
        (lambda: GGN(nn.Embedding(3, 2, sparse=True), CrossEntropy(), None, (Y, Y)), "sparse gradients.* sparse=False"),
        (lambda: GGN(nn.Embedding(3, 2, max_norm=1.0), CrossEntropy(), None, (Y, Y)), "renormalises its weight"),
        (lambda: GGN(net(nn.BatchNorm1d(4)), CrossEntropy(), None, (X, Y)), "statistics of its batch"),
        (lambda: GGN(net(nn.RReLU()), CrossEntropy(), None, (-X, Y)), "two passes of the network"),
        (lambda: GGN(net(), CrossEntropy(), "hidden", (X, Y)), "'hidden', which is none of the model's: 0.weight"),
        (lambda: GGN(net(), CrossEntropy(), [torch.ones(2)], (X, Y)), r"a tensor \(2,\), which is none"),
        (lambda: GGN(net(), CrossEntropy(), [], (X, Y)), "params is empty"),
        (lambda: GGN(net().requires_grad_(False), CrossEntropy(), None, (X, Y)), "no parameter of the model requires"),
        (lambda: GGN(net(), lambda f, y: f.sum(), None, (X, Y)).to_dense(), "CustomLoss.fn, hessian_product"),
        (lambda: GGN(net(), "ce", None, (X, Y)), "the loss is a str; expected CrossEntropy"),
        (lambda: GGN(net(), nn.CrossEntropyLoss(reduction="none"), None, (X, Y)), "is no scalar"),
        (lambda: GGN(net(), nn.CrossEntropyLoss(), None, (X, Y), reduction="sum"), "make them agree"),
        (lambda: GGN(net(), nn.HuberLoss(), None, (X, Y)), "no output Hessian here"),
        (lambda: GGN(net(), CrossEntropy(), None, (X, Y), reduction="average"), "expected 'mean', 'sum'"),
        (lambda: GGN(net(), CrossEntropy(), None, (X, Y), num_data=10), "num_data was given with reduction='mean'"),
        (lambda: GGN(net(), CrossEntropy(), None, (X, Y[:4])), r"outputs \(5, 3\) with classes on axis -1 and targets"),
        (lambda: GGN(net(), SquaredError(), None, (X, Y)).to_dense(), None),
        (lambda: Hessian(net(), SquaredError(), None, (X, Y)).to_dense(), r"outputs \(5, 3\) and targets \(5,\)"),
        (lambda: GGN(net(), CrossEntropy(), None, (X, Y - 200)), "class numbers from -200 to -198"),
        (lambda: GGN(net(), CrossEntropy(ignore_index=1), None, (X, Y * 0 + 1)), "are all targets ignored"),
        (lambda: GGN(net(), CrossEntropy(), None, X), "data is a Tensor; expected a pair"),
        (lambda: GGN(net(), CrossEntropy(), None, []), "holds no batch"),
        (lambda: GGN(net(), CrossEntropy(), None, [X]), "a batch is a Tensor; expected a pair"),
        (lambda: GGN(net(), CrossEntropy(), None, (X[:0], Y[:0])), "empty batch"),
        (lambda: GGN(net(), CrossEntropy(), None, (X, Y), micro_batch=0), "micro_batch=0"),
        (lambda: GGN(net(), CrossEntropy(), None, (X * torch.nan, Y)), "NaN or Inf"),
        (lambda: GGN(3, CrossEntropy(), None, (X, Y)), "the model is a int"),
        (lambda: GGN(lambda p, x: x @ p, CrossEntropy(), None, (X, Y)), "params=NoneType"),
        (lambda: GGN(lambda p, x: (x @ p,), CrossEntropy(), torch.ones(3, 3), (X, Y)), "returned a tuple"),
        (lambda: GGN(lambda p, x: x, CrossEntropy(), torch.ones(3, 3), (X, Y)).to_dense(), "do not depend on the"),
        (lambda: GGN(net(), CrossEntropy(), None, (X, Y), hyperparameters=["t"]), "hyperparameters has a str"),
        (lambda: Fisher(net(), OWN, None, (X, Y), kind=MonteCarloFisher()).to_dense(), "no labels"),
        (lambda: Jacobian(net(), None, "1", X).unravel(torch.ones(3)), r"expected a parameter vector \(15,\)"),
        (lambda: NTK(nn.Linear(3, 30000), None, None, torch.ones(10, 3)).to_dense(), "GiB .* ritz.trace"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(make, message):
    if message is None:  # targets are no part of a Gauss–Newton matrix of squares
        make()
        return
    with pytest.raises(OperandError, match=message):
        make()


def test_dropout_with_a_seed_is_one_function():
    model = net(nn.Dropout(0.5))
    state = torch.random.get_rng_state()
    A, B = (GGN(model, CrossEntropy(), None, (X, Y), seed=1).to_dense() for _ in range(2))
    assert torch.equal(A, B) and torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(A, GGN(model, CrossEntropy(), None, (X, Y), seed=2).to_dense())


def test_parameters_that_change_in_place_make_products_raise():
    model = net()
    for operator in (GGN, Hessian):
        A = operator(model, CrossEntropy(), None, (X, Y))
        A @ torch.ones(A.shape[0])
        with torch.no_grad():
            model[0].bias.add_(0.1)
        with pytest.raises(OperandError, match="changed in place"):
            A @ torch.ones(A.shape[0])
