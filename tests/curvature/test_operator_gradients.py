"""Derivatives of curvature operators in what is inside the model, and what is kept between products."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ritz
from ritz.curvature import GGN, CrossEntropy, Hessian, Jacobian, SquaredError
from ritz.testing import check_gradient, check_operator

from . import dense

DOUBLE = {"dtype": torch.float64}


class Tempered(nn.Module):
    """Two layers with a temperature that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4, **DOUBLE), nn.Linear(4, 3, **DOUBLE)
        self.temperature = nn.Parameter(torch.tensor(1.5, **DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x) * self.temperature)) / self.temperature


def made() -> tuple[Tempered, Tensor, Tensor]:
    torch.manual_seed(0)
    return Tempered(), torch.randn(6, 3, **DOUBLE), torch.randint(0, 3, (6,))


@pytest.mark.parametrize("operator", [GGN, Hessian, Jacobian])
@pytest.mark.parametrize("keep", [0, 1 << 20])
def test_products_are_differentiable_in_hyperparameters(operator, keep):
    model, x, y = made()

    def operator_at(temperature: Tensor) -> ritz.LinearOperator:
        model.temperature = temperature if isinstance(temperature, nn.Parameter) else nn.Parameter(temperature.detach())
        A = operator(
            model, CrossEntropy(), ["inner", "outer"], (x, y), hyperparameters=[model.temperature], keep_bytes=keep
        )
        return A

    t = nn.Parameter(torch.tensor(1.3, **DOUBLE))
    A = operator_at(t)
    check_operator(A)
    v, w = torch.randn(A.shape[1], 2, **DOUBLE), torch.randn(A.shape[0], 2, **DOUBLE)
    ((A @ v) * w).sum().backward()
    h = 1e-5
    up, down = (((operator_at(torch.tensor(1.3 + s, **DOUBLE)) @ v) * w).sum() for s in (h, -h))
    torch.testing.assert_close(t.grad, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


def test_evidence_is_differentiable_in_an_augmentation():
    """½ log det(G + I) by Lanczos, in the strength of noise that is added to the inputs."""
    model, x, y = made()
    noise = torch.randn(6, 3, **DOUBLE)
    params = {n: p.detach() for n, p in model.named_parameters()}

    def logdet(strength: Tensor, exact: bool = False) -> Tensor:
        fn = lambda p, z: torch.func.functional_call(model, p, (z + strength * noise,))  # noqa: E731
        A = GGN(fn, CrossEntropy(), params, (x, y), reduction="sum", hyperparameters=[strength])
        if exact:
            return torch.logdet(A.to_dense() + torch.eye(A.shape[0], **DOUBLE))
        probes = ritz.Hutchinson(400, seed=1)
        return ritz.logdet(A.shift(1.0), estimator=probes, method=ritz.Lanczos(30))

    s = torch.tensor(0.3, requires_grad=True, **DOUBLE)
    value = logdet(s)
    (g,) = torch.autograd.grad(value, s)
    with torch.no_grad():
        up, down = (logdet(torch.tensor(0.3 + h, **DOUBLE)) for h in (1e-5, -1e-5))
        assert abs(float(value) / float(logdet(s, exact=True)) - 1) < 0.05
    assert float(g) == pytest.approx(float(up - down) / 2e-5, rel=1e-5)


def test_derivative_in_the_selected_parameters_themselves():
    """dG/dθ: the third derivatives of the loss, against differences."""
    torch.manual_seed(0)
    W, x, y = torch.randn(3, 2, **DOUBLE), torch.randn(5, 2, **DOUBLE), torch.randint(0, 3, (5,))
    v = torch.randn(6, 1, **DOUBLE)

    def product(weight: Tensor) -> Tensor:
        A = GGN(lambda p, z: torch.tanh(z @ p.mT), CrossEntropy(), weight, (x, y), hyperparameters=[weight])
        return A @ v

    check_gradient(product, W.clone().requires_grad_())


def test_operand_gradient_without_hyperparameters():
    model, x, y = made()
    A = GGN(model, CrossEntropy(), None, (x, y))
    v = torch.randn(A.shape[0], **DOUBLE, requires_grad=True)
    w = torch.randn(A.shape[0], **DOUBLE)
    (A @ v @ w).backward()
    torch.testing.assert_close(v.grad, A @ w)
    assert all(p.grad is None for p in model.parameters())


def test_memory_does_not_grow_over_products_and_graphs_go_with_the_operator():
    model, x, y = made()
    for operator, keep in ((GGN, 1 << 20), (GGN, 0), (Hessian, 1 << 20)):
        A = operator(model, CrossEntropy(), None, (x, y), keep_bytes=keep, micro_batch=2)
        v = torch.randn(A.shape[0], 2, **DOUBLE)
        A @ v

        def tensors() -> int:
            gc.collect()
            return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

        before = tensors()
        for _ in range(200):
            A @ v
        assert tensors() == before
        kept = A._kept_bytes
        assert (kept > 0) == (keep > 0) and kept <= keep
        del A
        assert tensors() < before or keep == 0


def test_kept_passes_are_not_recorded_again():
    model, x, y = made()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    A = GGN(model, CrossEntropy(), None, (x, y), micro_batch=2)
    v = torch.randn(A.shape[0], 3, **DOUBLE)
    before = calls
    for _ in range(5):
        A @ v
    assert calls - before == 3  # one pass a batch
    B = GGN(model, CrossEntropy(), None, (x, y), micro_batch=2, keep_bytes=0)
    before = calls
    for _ in range(5):
        B @ v
    assert calls - before == 15


def test_the_loss_is_not_differentiated_twice():
    """A loss whose own graph has no second derivative serves, because its Hessian is in closed form."""
    model, x, _ = made()
    y = torch.randn(6, 3, **DOUBLE)

    class Once(SquaredError):
        def value(self, f, y):  # noqa: ANN001
            raise AssertionError("the value was asked for")

    A = GGN(model, Once(), ["inner", "outer"], (x, y))
    names = [n for n, _ in model.named_parameters() if n != "temperature"]
    want = dense.ggn(model, names, x, y, lambda f, t: 0.5 * F.mse_loss(f, t, reduction="sum") / 6)
    torch.testing.assert_close(A.to_dense(), want)
