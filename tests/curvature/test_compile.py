"""Compiled models: hooks registered before or after torch.compile see the same statistics."""

import subprocess
import sys

import pytest
import torch
from tests.curvature.oracle import Net, batch, factors, kfac, loss_of
from tests.curvature.recorder import close
from torch import nn

from ritz.curvature import GaussNewton, Jacobian, SquaredError

# The compiler looks at `.grad` of whatever tensor enters the part of a graph behind a break, in any model.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class InPlace(nn.Module):
    """A 3-d linear layer, whose output is a view, changed in place; attention; an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, tokens):
        x = self.act(self.hidden(self.embedding(tokens)))
        return self.head(self.attention(x, x, x, need_weights=False)[0])


PROBLEMS = {
    "net": (Net, lambda: batch()[0]),
    "in place": (InPlace, lambda: torch.tensor([[0, 1, 4], [2, 2, 3]])),
}


ORDERS = ("hooks first", "compile first", "the compiled model is given", "module.compile")
CASES = [(order, "eager") for order in ORDERS] + [(order, "aot_eager") for order in ORDERS[:2]]
CASES += [pytest.param(order, "aot_eager", marks=pytest.mark.slow) for order in ORDERS[2:]]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("order", "backend"), CASES)
def test_compiled_models_have_the_same_statistics(problem, backend, order):
    build, inputs = PROBLEMS[problem]
    x = inputs()
    torch.manual_seed(0)
    plain, model = build(), build()
    model.load_state_dict(plain.state_dict())
    reference = kfac(plain)
    loss_of(plain(x), 0.0).backward()
    expected = factors(reference)
    if order == "hooks first":
        optimizer = kfac(model)
        run = torch.compile(model, backend=backend)
    elif order == "compile first":
        run = torch.compile(model, backend=backend)
        optimizer = kfac(model)
    elif order == "module.compile":
        model.compile(backend=backend)
        run, optimizer = model, kfac(model)
    else:
        run = torch.compile(model, backend=backend)
        optimizer = kfac(run)
    for _ in range(2):  # the second time from the compiler's cache
        optimizer.zero_grad()
        loss_of(run(x), 0.0).backward()
        found = {name.removeprefix("_orig_mod."): pair for name, pair in factors(optimizer).items()}
        assert set(found) == set(expected)
        for name, pair in expected.items():
            assert all(close(a, b) for a, b in zip(found[name], pair)), name
    for p, q in zip(plain.parameters(), model.parameters()):
        assert close(p.grad, q.grad)


def test_gauss_newton_of_a_compiled_model():
    torch.manual_seed(0)
    x, found = torch.tensor([[0, 1, 4], [2, 2, 3]]), []
    model = InPlace()
    for run in (model, torch.compile(model, backend="aot_eager")):
        optimizer = kfac(model, statistics=GaussNewton())
        assert optimizer.accumulate_curvature(run(x), SquaredError()) == 5
        found.append(factors(optimizer))
        optimizer.remove_hooks()
    assert all(close(a, b) for name in found[0] for a, b in zip(found[1][name], found[0][name]))


def test_a_compiled_model_that_is_not_trained_is_not_captured():
    torch.manual_seed(0)
    model, (x, _) = Net(), batch()
    run = torch.compile(model, backend="eager")
    optimizer = kfac(model)
    with torch.no_grad():
        run(x)
    with optimizer.paused():
        run(x).sum().backward()
    assert not any(layer.sums.rows for layer in optimizer._layers)
    run(x).sum().backward()
    assert all(layer.sums.rows for layer in optimizer._layers)


def test_the_compiler_is_not_loaded_for_those_who_do_not_compile():
    """It takes seconds: products of a Gauss–Newton matrix must not wait for it."""
    code = """
import sys, torch, ritz
from ritz.curvature import GGN, CrossEntropy
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
A = GGN(model, CrossEntropy(), None, (torch.ones(6, 4), torch.zeros(6, dtype=torch.long)))
A @ torch.ones(A.shape[0], 20)
assert type(A._kept[0]).__name__ == "Factored"
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
def test_products_through_a_compiled_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Conv1d(2, 2, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    x, V = torch.randn(4, 1, 6, dtype=torch.float64), torch.randn(39, 2, dtype=torch.float64)
    plain, compiled = Jacobian(model, data=x), Jacobian(torch.compile(model, backend="eager"), data=x)
    torch.testing.assert_close(compiled @ V, plain @ V, rtol=1e-11, atol=1e-11)
    U = torch.randn(12, 2, dtype=torch.float64)
    torch.testing.assert_close(compiled.mH @ U, plain.mH @ U, rtol=1e-11, atol=1e-11)
