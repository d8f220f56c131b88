"""Where the factors start, and the measures by which their updates are kept small."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ritz.errors import OperandError
from ritz.operators.structured import Dense, Diagonal, Hierarchical, LowerToeplitz
from ritz.optim import IKFAC, SINGD, LargestEntry, SpectralNorm
from ritz.optim.inverse_free import multiplicative_step

STRUCTURES = [Dense(), Diagonal(), Hierarchical(2, 1), LowerToeplitz()]
X = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
X *= torch.tensor([3, 1, 1, 0.2, 9])
Y = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def backward(model: nn.Module) -> None:
    model.zero_grad()
    (0.5 * (model(X) - Y).square().sum() / len(X)).backward()


def moments(model: nn.Sequential) -> tuple[float, float]:
    """Mean diagonals of A and B of the first layer, from its inputs and the gradients of the terms."""
    rows = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
    outputs = model[0](X).detach().requires_grad_()
    (0.5 * (model[2](torch.tanh(outputs)) - Y).square().sum()).backward()
    return float(rows.square().mean(0).mean()), float(outputs.grad.square().mean(0).mean())


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_first_statistics_give_the_scale(structure, adaptive):
    model = network()
    settings = {"structures": structure, "start": None, "damping": 0.01, "lr_cov": 0.0, "riemannian_momentum": 0.0}
    optimizer = SINGD(model, lr=0.0, adaptive=adaptive, **settings)
    a, b = moments(copy.deepcopy(model))
    backward(model)
    optimizer.step()
    state = optimizer.state[model[0].weight]
    k, c = ((a * b + 0.01) ** -0.25,) * 2 if adaptive else ((a + 0.01) ** -0.5, (b + 0.01) ** -0.5)
    unit = {"K": (k, 6), "C": (c, 4)}
    for name, (scale, d) in unit.items():
        expected = scale * torch.eye(d, dtype=torch.float64)
        torch.testing.assert_close(structure.to_dense(state[name], d), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("foreach", [True, False])
def test_the_first_update_after_the_scale_is_an_ordinary_one(foreach):
    """start=None is start=s with the s that it finds, where a layer's own s is given by hand."""
    model, twin = network(), network()
    a, b = moments(copy.deepcopy(model))
    s = (a * b + 0.01) ** -0.25
    settings = {"structures": Dense(), "damping": 0.01, "lr_cov": 0.3, "momentum": 0.0, "foreach": foreach}
    found = SINGD(model, lr=0.1, start=None, **settings)
    given = SINGD([{"params": list(twin[0].parameters()), "start": s}], lr=0.1, model=twin, **settings)
    for m, optimizer in ((model, found), (twin, given)):
        backward(m)
        optimizer.step()
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-12, atol=1e-14)


def test_a_layer_without_gradient_waits_for_one():
    model = network()
    nn.init.zeros_(model[2].weight)  # no gradient reaches the first layer
    optimizer = SINGD(model, lr=0.1, start=None, update_interval=1, structures=Dense(), lr_cov=0.0)
    backward(model)
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["K"], torch.eye(6).double().flatten())
    backward(model)
    optimizer.step()
    assert not torch.equal(optimizer.state[model[0].weight]["K"], torch.eye(6).double().flatten())


def test_vectors_start_at_their_own_scale():
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).double()
    optimizer = SINGD(model, lr=0.0, start=None, damping=0.1, lr_cov=0.0)
    backward(model)
    g = model[1].weight.grad
    optimizer.step()
    K = optimizer.state[model[1].weight]["K"]
    expected = torch.full_like(K, float(len(X) * g.square().mean() + 0.1) ** -0.5)
    torch.testing.assert_close(K, expected, rtol=1e-12, atol=0)


def test_a_resumed_run_does_not_start_again():
    model, twin = network(), network()
    settings = {"lr": 0.01, "start": None, "update_interval": 1, "lr_cov": 0.1, "clip": None}
    optimizer = SINGD(model, **settings)
    backward(model)
    optimizer.step()
    twin.load_state_dict(model.state_dict())
    resumed = SINGD(twin, **settings)
    resumed.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (twin, resumed)):
        backward(m)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("structure", [*STRUCTURES, Hierarchical(40, 10)], ids=str)
def test_spectral_norm(structure):
    d = 120
    M = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    m = structure.from_dense(M @ torch.diag(torch.linspace(0, 1, d, dtype=torch.float64) ** 4) @ M.T)
    dense = structure.to_dense(m, d)
    true = torch.linalg.matrix_norm(dense, 2)
    found = SpectralNorm(8)(structure, m, d)
    assert found.shape == (1,)
    assert 0.9 * true <= found <= true * (1 + 1e-12)
    pair = torch.stack([m, -2 * m])
    torch.testing.assert_close(SpectralNorm(8)(structure, pair, d).flatten(), torch.cat([found, 2 * found]))
    assert SpectralNorm()(structure, torch.zeros_like(m), d) == 0


def test_a_step_of_spectral_norm_keeps_a_correlated_factor_definite():
    """d strongly correlated inputs: the largest entry of m is d times too small a measure."""
    d, dense = 50, Dense()
    m = dense.from_dense(3.0 * torch.ones(d, d, dtype=torch.float64))
    unit = dense.identity(d, dtype=torch.float64)
    for size, definite in ((SpectralNorm(), True), (LargestEntry(), False)):
        K = dense.to_dense(multiplicative_step(dense, unit, m, d, 0.5, size, False), d)
        assert bool((torch.linalg.eigvalsh(K) > 0).all()) is definite


def test_normalize_takes_values_and_groups_may_differ():
    model = network()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first, "normalize": SpectralNorm(2)}, {"params": last, "normalize": False}]
    optimizer = SINGD(groups, model=model, normalize=LargestEntry())
    assert [g["normalize"] for g in optimizer.param_groups] == [True, False]
    assert optimizer._settings[0].size == SpectralNorm(2)
    torch.save(optimizer.state_dict(), "/dev/null")
    for wrong in (1.5, "spectral", None):
        with pytest.raises(OperandError, match="expected True, False, LargestEntry"):
            SINGD(network(), normalize=wrong)
    for wrong in (0.0, -1.0):
        with pytest.raises(OperandError, match="expected a positive multiple"):
            SINGD(network(), start=wrong)
        model = network()
        with pytest.raises(OperandError, match="expected a positive multiple"):
            SINGD([{"params": model.parameters(), "start": wrong}], model=model)
    with pytest.raises(OperandError, match="at least 1"):
        SpectralNorm(0)


def test_ikfac_starts_like_kfac_on_average():
    model = network()
    optimizer = IKFAC(model, lr=0.0, start=None, damping=0.01, lr_cov=0.0)
    a, _ = moments(copy.deepcopy(model))
    backward(model)
    optimizer.step()
    K = optimizer.state[model[0].weight]["K"].reshape(6, 6)
    torch.testing.assert_close(float(K[0, 0]), (a + 0.01) ** -0.5, rtol=1e-12, atol=0.0)
