"""Kronecker factors against their formulas: weight sharing, loss terms, micro-batches, weights that are used twice."""

import pytest
import torch
from tests.curvature.oracle import Net, batch, factors, kfac, kronecker, loss_of
from tests.curvature.recorder import close
from torch import nn
from torch.nn import functional as F

from ritz.curvature import Expand, PerExample, PerPosition, Reduce
from ritz.errors import OperandError

R = {"conv": 16, "token": 16, "head": 1}
TERMS = {
    "examples by default": (None, lambda n, r: n),
    "examples": (PerExample(), lambda n, r: n),
    "positions": (PerPosition(), lambda n, r: n * r),
    "a number": (7, lambda n, r: 7),
    "a callable": (lambda: 9, lambda n, r: 9),
}


@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_factors_are_those_of_the_formulas(sharing, reduction, terms):
    given, count = TERMS[terms]
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    optimizer = kfac(model, weight_sharing=sharing, reduction=reduction, num_loss_terms=given)
    loss_of(model(x), t, reduction).backward()
    found = factors(optimizer)
    f, traced = model.trace(x)
    gradients = torch.autograd.grad(loss_of(f, t, reduction), [y for _, y in traced.values()])
    assert set(found) == set(traced) == set(R)
    for (name, (a, _)), g in zip(traced.items(), gradients):
        g = g if g.ndim == 3 else g.unsqueeze(1)
        scale = count(len(x), R[name]) if reduction == "mean" else 1.0
        reduce = isinstance(sharing, Reduce)
        A, B = kronecker(a, g, bias=name != "head", reduce=reduce, scale=scale)
        assert close(found[name][0], A) and close(found[name][1], B)


def test_the_batch_scale_is_the_mean_over_gradients_of_the_terms():
    """The meaning of B, without the reduced loss: outer products of the gradients of each example's own term."""
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    optimizer = kfac(model)
    loss_of(model(x), t).backward()
    B = torch.zeros(2, 2).double()
    for i in range(len(x)):
        f, _ = model.trace(x[i : i + 1])
        (g,) = torch.autograd.grad(loss_of(f, t[i : i + 1]), f)
        B += g.mT @ g / len(x)
    assert close(factors(optimizer)["head"][1], B)


@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("terms", [None, PerPosition()], ids=repr)
@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 11), (12,)], ids=str)
def test_micro_batches_add_up_to_the_batch(sharing, reduction, terms, sizes):
    torch.manual_seed(0)
    model, (x, t) = Net(), batch(12)
    settings = {"weight_sharing": sharing, "reduction": reduction, "num_loss_terms": terms}
    whole, parts = kfac(model, **settings), kfac(model, **settings)
    with parts.paused():
        loss_of(model(x), t, reduction).backward()
    expected = factors(whole)
    gradient = model.conv.weight.grad.clone()
    model.zero_grad()
    for xs, ts in zip(x.split(sizes), t.split(sizes)):
        weight = len(xs) / len(x) if reduction == "mean" else 1.0
        (weight * loss_of(model(xs), ts, reduction)).backward()
    found = factors(parts)
    assert close(model.conv.weight.grad, gradient)
    for name, pair in expected.items():
        assert all(close(own, other) for own, other in zip(found[name], pair))


class Twice(nn.Module):
    """tanh(W tanh(W x + b) + b): by one module called twice, or by two that share their parameters."""

    def __init__(self, tied):
        super().__init__()
        self.first = nn.Linear(3, 3).double()
        self.second = nn.Linear(3, 3).double() if tied else self.first
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.second(self.first(x).tanh()).tanh()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("terms", [None, PerPosition()], ids=repr)
def test_a_weight_that_is_used_twice_sees_its_examples_once(tied, reduction, terms):
    torch.manual_seed(0)
    model, x = Twice(tied), torch.randn(5, 4, 3).double()
    optimizer = kfac(model, reduction=reduction, num_loss_terms=terms)
    assert len(optimizer._layers) == 1
    loss_of(model(x), 0.0, reduction).backward()
    W, b = model.first.weight, model.first.bias
    y1 = x @ W.T + b
    y2 = y1.tanh() @ W.T + b
    g1, g2 = torch.autograd.grad(loss_of(y2.tanh(), 0.0, reduction), [y1, y2])
    n = 5 * (4 if terms else 1)
    A1, B1 = kronecker(x, g1, scale=n if reduction == "mean" else 1.0)
    A2, B2 = kronecker(y1.tanh(), g2, scale=n if reduction == "mean" else 1.0)
    ((A, B),) = factors(optimizer).values()
    assert close(A, (A1 + A2) / 2) and close(B, B1 + B2)


def test_two_backward_passes_are_two_batches():
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    optimizer = kfac(model, reduction="mean")
    for _ in range(2):
        loss_of(model(x), t).backward()
    twice = factors(optimizer)
    loss_of(model(x), t).backward()
    once = factors(optimizer)
    for name in once:  # N Σ g gᵀ with N and the sum doubled
        assert close(twice[name][0], once[name][0]) and close(twice[name][1], 4 * once[name][1])


@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)
def test_an_embedding_is_a_linear_layer_of_one_hot_inputs(sharing):
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 0, 3, 1], [0, 2, 2, 5], [6, 1, 1, 1]])
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=1), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = kfac(model, weight_sharing=sharing)
    loss_of(model(tokens), 0.0).backward()
    a = F.one_hot(tokens, 7).double()
    y = a @ model[0].weight
    (g,) = torch.autograd.grad(loss_of(model[2](y.tanh()), 0.0), y)
    g = torch.where((tokens == 1).unsqueeze(2), 0.0, g)  # the padding row is not trained
    A, B = kronecker(a, g, bias=False, scale=3.0)
    found = factors(optimizer)["0"]
    assert close(found[0], A) and close(found[1], B)  # also for Reduce(): one-hot rows are not averaged
    assert torch.equal(A, A.diag().diag())


def test_tokens_and_positions_that_are_masked_are_the_users_count():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 5, 3).double()
    mask = torch.tensor([5, 3, 1, 4])
    kept = torch.arange(5) < mask.unsqueeze(1)
    optimizer = kfac(model, num_loss_terms=lambda: int(mask.sum()))
    f = model(x)
    (0.5 * f[kept].square().sum() / mask.sum()).backward()
    g = (f * kept.unsqueeze(2)).detach() / mask.sum()
    ((A, B),) = factors(optimizer).values()
    expected = kronecker(x, g, scale=float(mask.sum()))
    assert close(A, expected[0]) and close(B, expected[1])
    assert close(B, f[kept].mT.detach() @ f[kept].detach() / mask.sum())


@pytest.mark.parametrize("given", [0, -3, 2.5, "batch", True], ids=repr)
def test_a_count_that_is_none(given):
    with pytest.raises(OperandError, match="num_loss_terms"):
        kfac(Net(), num_loss_terms=given)


def test_a_callable_that_counts_nothing():
    model, (x, t) = Net(), batch()
    optimizer = kfac(model, num_loss_terms=lambda: 0)
    loss_of(model(x), t).backward()
    with pytest.raises(OperandError, match="num_loss_terms gave 0"):
        optimizer.step()


def test_low_precision_statistics_are_summed_in_float32():
    torch.manual_seed(0)
    model, (x, t) = Net(), batch(12)
    exact, half = kfac(model), Net()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    loss_of(model(x), t).backward()
    optimizer = kfac(half)
    for xs, ts in zip(x.bfloat16().split(3), t.bfloat16().split(3)):
        (loss_of(half(xs), ts) / 4).backward()
    assert all(layer.sums.inputs.dtype == torch.float32 for layer in optimizer._layers)
    found, expected = factors(optimizer), factors(exact)
    for name, pair in expected.items():
        assert all(own.dtype == torch.bfloat16 for own in found[name])
        assert all(close(own.double(), other, 0.05) for own, other in zip(found[name], pair))


@pytest.mark.parametrize("kind", ["self", "cross", "different"])
def test_packed_projections_of_attention(kind):
    """Rows of a packed weight that a projection does not use have a zero gradient; all projections count as inputs."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 1, batch_first=True).double()
    q, k, v = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double(), torch.randn(2, 5, 4).double()
    k, v = (q, q) if kind == "self" else (k, k) if kind == "cross" else (k, v)
    optimizer = kfac(model)
    loss_of(model(q, k, v)[0], 0.0).backward()
    projected = [x @ W.T + b for x, W, b in zip((q, k, v), model.in_proj_weight.chunk(3), model.in_proj_bias.chunk(3))]
    mixed = torch.softmax(projected[0] @ projected[1].mT / 2, -1) @ projected[2]
    f = model.out_proj(mixed)  # called as a module, which the library does not watch
    *g, g_out = torch.autograd.grad(loss_of(f, 0.0), [*projected, f])
    gradients = [F.pad(part, (4 * i, 8 - 4 * i)) for i, part in enumerate(g)]
    inputs = [q, k, v]
    if kind == "self":
        inputs, gradients = [q], [sum(gradients)]
    elif kind == "cross":  # keys and values are one product
        inputs, gradients = [q, k], [gradients[0], gradients[1] + gradients[2]]
    pairs = [kronecker(a, row, scale=2.0) for a, row in zip(inputs, gradients)]
    rows = [a.shape[1] for a in inputs]
    found = factors(optimizer)
    assert close(found["in_proj_weight"][0], sum(m * A for m, (A, _) in zip(rows, pairs)) / sum(rows))
    assert close(found["in_proj_weight"][1], sum(B for _, B in pairs))
    A, B = kronecker(mixed, g_out, scale=2.0)
    assert close(found["out_proj"][0], A) and close(found["out_proj"][1], B)
