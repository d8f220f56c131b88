"""Mixed precision on the CPU: a scaled loss gives the update of the loss itself."""

import copy

import pytest
import torch
from tests.curvature.oracle import loss_of
from torch import nn

from ritz.curvature import GaussNewton, SquaredError
from ritz.errors import OperandError
from ritz.operators.structured import Dense
from ritz.optim import INGD, KFAC, SINGD

RULES = {
    "KFAC": lambda model, **s: KFAC(model, 0.05, structures=Dense(), **s),
    "SINGD": lambda model, **s: SINGD(model, 0.05, structures=Dense(), lr_cov=0.2, **s),
    "INGD, rows": lambda model, **s: INGD(model, 0.05, lr_cov=0.2, row_form=True, **s),
}


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))
    return model, torch.randn(12, 6), torch.randn(12, 3)


def loss(model, x, t):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = model(x)
    return loss_of(f.float(), t)


@torch.no_grad()
def distance(model, other):
    """The largest difference of parameters in units of the largest step that training has made."""
    start, _, _ = problem()
    step = max(float((p - q).abs().max()) for p, q in zip(other.parameters(), start.parameters()))
    assert step > 1e-4
    return max(float((p - q).abs().max()) for p, q in zip(model.parameters(), other.parameters())) / step


def train(rule, way, steps=4, **settings):
    """Trained parameters; ``way(optimizer, loss)`` does backward and step."""
    model, x, t = problem()
    optimizer = RULES[rule](model, update_interval=2, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        way(optimizer, loss(model, x, t))
    return model


def plain(clip=None):
    def way(optimizer, value):
        value.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
        optimizer.step()

    return way


def scaled(scaler, unscale=False, clip=None):
    def way(optimizer, value):
        scaler.scale(value).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
        scaler.step(optimizer)
        scaler.update()

    return way


def grad_scaler(**settings):
    return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, **settings)  # grows on the way


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", [False, True])
def test_the_scaler_steps(rule, given):
    scaler = grad_scaler()
    expected = train(rule, plain())
    assert distance(train(rule, scaled(scaler), **({"grad_scale": scaler} if given else {})), expected) < 1e-5
    assert scaler.get_scale() == 2.0**14


@pytest.mark.parametrize("rule", RULES)
def test_unscale_and_clip_with_the_scaler_given(rule):
    scaler = grad_scaler()
    way = scaled(scaler, unscale=True, clip=0.01)
    expected = train(rule, plain(clip=0.01))
    assert distance(train(rule, way, grad_scale=scaler), expected) < 1e-5
    assert distance(train(rule, plain()), expected) > 0.1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", [1024.0, lambda step: 2.0 ** (step + 3)], ids=["fixed", "callable"])
def test_a_scale_without_a_scaler(rule, given):
    """``.grad`` arrives at the step still scaled."""
    steps = iter(range(100))

    def way(optimizer, value):
        step = next(steps)
        (value * (given(step) if callable(given) else given)).backward()
        optimizer.step()

    assert distance(train(rule, way, grad_scale=given), train(rule, plain())) < 1e-5


def test_a_scale_that_is_lost():
    scaler = grad_scaler()
    with pytest.raises(OperandError, match=r"unscale_ was called before step.*grad_scale=scaler"):
        train("SINGD", scaled(scaler, unscale=True))
    model, x, t = problem()
    optimizer = SINGD(model, 0.05, structures=Dense(), update_interval=2)
    optimizer.param_groups[0]["step"] = 1  # between updates nothing is collected, and nothing is lost
    scaled(grad_scaler(), unscale=True)(optimizer, loss(model, x, t))


@pytest.mark.parametrize("given", [0.0, -1.0, "dynamic"], ids=repr)
def test_scales_that_are_none(given):
    with pytest.raises(OperandError, match="grad_scale="):
        SINGD(problem()[0], grad_scale=given)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_skips_the_step(rule, unscale):
    scaler = grad_scaler()
    model, x, t = problem()
    optimizer = RULES[rule](model, update_interval=1, grad_scale=scaler)
    way = scaled(scaler, unscale=unscale)
    way(optimizer, loss(model, x, t))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    scale = scaler.get_scale()
    optimizer.zero_grad()
    way(optimizer, loss(model, x, t) * float("inf"))
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert before[1]["param_groups"] == after[1]["param_groups"]
    for index, state in before[1]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[1]["state"][index][name]))
    assert scaler.get_scale() == scale / 2
    assert not any(layer.sums.rows for layer in optimizer._layers)
    optimizer.zero_grad()
    way(optimizer, loss(model, x, t))  # and goes on with the next one
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not all(torch.equal(p, before[0][name]) for name, p in model.state_dict().items())


def test_small_gradients_survive_half_precision():
    """What the scale is there for: 1e-9 is zero in float16, and 2¹⁶ times it is not."""
    torch.manual_seed(0)
    model, x, g = nn.Linear(3, 2), torch.randn(5, 3), 1e-9 * torch.randn(5, 2)
    optimizer = KFAC(model, structures=Dense(), update_interval=1, grad_scale=2.0**16)
    (layer,) = optimizer._layers
    arrived = (2.0**16 * g).half()
    optimizer._collector.used(layer.sites[0], x, arrived, arrived.shape, 0, False, 0)
    assert torch.allclose(layer.sums.outputs.reshape(2, 2), g.mT @ g, rtol=1e-2, atol=0)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_curvature_of_outputs_has_no_scale(given, unscale):
    """Gauss–Newton statistics are not made by the scaled loss."""
    found = []
    for scaler in (None, grad_scaler()):
        model, x, t = problem()
        settings = {"grad_scale": scaler} if scaler and given else {}
        optimizer = KFAC(model, 0.05, structures=Dense(), update_interval=1, statistics=GaussNewton(), **settings)
        f = model(x)
        optimizer.accumulate_curvature(f, SquaredError())
        way = scaled(scaler, unscale) if scaler else plain()
        way(optimizer, loss_of(f, t))
        found.append(model)
    assert distance(found[1], found[0]) < 1e-5
