"""What is no matrix: AdamW on parameters without a rule, and the diagonal rule on vectors."""

from __future__ import annotations

import pytest
import torch
from tests.optim.problems import OPTIMIZERS, Net, batch, identical, loss_of, normal, perceptron, train
from torch import Tensor, nn

from ritz.optim import IKFAC, KFAC, SINGD, AdamW


class Free(nn.Module):
    """Two matrices that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(normal(5, 4, seed=1))
        self.b = nn.Parameter(normal(4, 3, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a) @ self.b


@pytest.mark.parametrize("make", [SINGD, KFAC], ids=["singd", "kfac"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fallback_is_adamw_bit_for_bit(make, decay):
    model, other = Free(), Free()
    settings = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    train(model, make(model, 0.1, fallback=AdamW(**settings)), 10)
    train(other, torch.optim.AdamW(other.parameters(), foreach=True, **settings), 10)
    assert identical(model, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fallback_beside_a_rule(name):
    """With the other learning rates at zero, a net's uncovered matrix goes as under AdamW alone."""
    model, other = Net(), Net()
    optimizer = OPTIMIZERS[name](model, 0.0, fallback=AdamW(lr=1e-2, weight_decay=0.1))
    train(model, optimizer, 5)
    train(other, torch.optim.AdamW([other.mix], lr=1e-2, weight_decay=0.1, foreach=True), 5)
    assert identical(model, other)


def test_fallback_without_a_gradient():
    model = Free()
    before = model.a.detach().clone()
    optimizer = SINGD(model, 0.1)
    (model.b.sum() + 0.0).backward()
    optimizer.step()
    assert torch.equal(model.a, before)
    assert "exp_avg" not in optimizer.state.get(model.a, {})


class Vectors(nn.Module):
    """A linear layer that counts the examples, a norm layer and a free vector."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = perceptron(5, 3, seed=1)[0]
        self.norm = nn.LayerNorm(3).double()
        self.scale = nn.Parameter(1.0 + 0.1 * normal(3, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.norm(self.linear(x))


CASES = {
    "singd": {"normalize": False, "lr_cov": 0.05},
    "normalize": {"normalize": True, "lr_cov": 0.5},
    "second order": {"normalize": True, "lr_cov": 0.5, "second_order": True},
    "no riemannian momentum": {"normalize": True, "lr_cov": 0.5, "riemannian_momentum": 0.0},
    "sum": {"normalize": False, "lr_cov": 0.01, "reduction": "sum"},
    "every second step": {"normalize": False, "lr_cov": 0.05, "update_interval": 2},
    "between counts": {"normalize": False, "lr_cov": 0.05},  # the layer, which counts the terms, updates more rarely
}


@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_rule_is_its_loop(name):
    """K ← K (1 − β₁ m [+ (β₁ m)²/2]) with m ← α₁ m + c (K² N g² + λ K² − 1); the natural gradient is K² g."""
    settings = {"update_interval": 1, "riemannian_momentum": 0.5, "second_order": False, "reduction": "mean"}
    settings |= CASES[name]
    alpha, damping, n = settings["riemannian_momentum"], 0.01, 8
    model = Vectors()
    lr = 0.02 if settings["reduction"] == "mean" else 0.002
    interval = 4 if name == "between counts" else settings["update_interval"]
    groups = [{"params": model.linear.parameters(), "update_interval": interval}, {"params": vectors(model)}]
    optimizer = SINGD(groups, lr, model=model, damping=damping, momentum=0.9, **settings)
    loop = {p: [p.detach().clone(), *(torch.full_like(p, x) for x in (1.0, 0.0, 0.0))] for p in vectors(model)}
    for step in range(10):
        X, Y = batch(step, n)
        optimizer.zero_grad()
        loss = loss_of(model(X), Y) * (n if settings["reduction"] == "sum" else 1)
        loss.backward()
        for p, state in loop.items():
            W, K, m, buffer = state
            g = p.grad
            if step % settings["update_interval"] == 0:
                terms = n if settings["reduction"] == "mean" else 1
                c = (1 - alpha) / 2 if settings["normalize"] else 0.5
                m = alpha * m + c * (K**2 * terms * g**2 + damping * K**2 - 1)
                rate = settings["lr_cov"] / (max(1.0, float(m.abs().max())) if settings["normalize"] else 1.0)
                K = K * (1 - rate * m + ((rate * m) ** 2 / 2 if settings["second_order"] else 0.0))
            buffer = 0.9 * buffer + K**2 * g
            state[:] = W - lr * buffer, K, m, buffer
        optimizer.step()
        for p, (W, K, _, _) in loop.items():
            assert bool((p - W).abs().max() <= 1e-12)
            assert bool((optimizer.state[p]["K"] - K).abs().max() <= 1e-12)


def vectors(model: Vectors) -> list[nn.Parameter]:
    return [model.norm.weight, model.norm.bias, model.scale]


def test_kfac_divides_by_the_running_square():
    """S ← ρ S + (1 − ρ) N g², corrected for its start at zero; the natural gradient is g/(S + λ)."""
    model = Vectors()
    optimizer = KFAC(model, 0.02, damping=0.1, momentum=0.0, stat_decay=0.8, update_interval=1)
    S = {p: torch.zeros_like(p) for p in vectors(model)}
    for step in range(5):
        X, Y = batch(step)
        optimizer.zero_grad()
        loss_of(model(X), Y).backward()
        before = {p: p.detach().clone() for p in S}
        optimizer.step()
        for p in S:
            S[p] = 0.8 * S[p] + 0.2 * 8 * p.grad**2
            want = before[p] - 0.02 * p.grad / (S[p] / (1 - 0.8 ** (step + 1)) + 0.1)
            assert bool((p - want).abs().max() <= 1e-13)


def test_kfac_without_damping_leaves_entries_without_a_gradient():
    """0/0 is no step."""
    model = Vectors()
    optimizer = KFAC(model, 0.02, damping=1e-3, update_interval=1)
    optimizer.param_groups[0]["damping"] = 0.0
    model.linear.requires_grad_(False)
    (model.scale[:2].square().sum() + 0.0 * model.scale[2]).backward()
    before = model.scale.detach().clone()
    optimizer.step()
    assert torch.equal(model.scale[2], before[2]) and bool((model.scale[:2] != before[:2]).all())
    assert bool(torch.isfinite(model.scale).all())


def test_a_vector_is_trained_as_a_diagonal_matrix_layer():
    """The diagonal rule on one scalar weight and IKFAC on a 1×1 layer with the input 1 agree."""

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
            self.linear = nn.Linear(1, 1, bias=False).double()

    model = Scalar()
    with torch.no_grad():
        model.linear.weight.fill_(0.3)
    optimizer = IKFAC(model, 0.1, damping=0.0, normalize=False, lr_cov=0.05, update_interval=1)
    for _ in range(5):
        optimizer.zero_grad()
        one = torch.ones(1, 1, dtype=torch.float64)
        ((model.linear(one) - 1).square().sum() + (model.w - 1).square().sum()).backward()
        optimizer.step()
    K, C = optimizer.state[model.linear.weight]["K"], optimizer.state[model.linear.weight]["C"]
    # A = 1 throughout, so K stays 1, and C follows g² as the vector's factor does.
    assert float(K) == 1.0
    assert abs(float(C) - float(optimizer.state[model.w]["K"])) <= 1e-14
    assert abs(float(model.linear.weight.detach()) - float(model.w.detach())) <= 1e-14
