"""Saved and loaded, copied, moved and cast: a run that goes on is the run that was never interrupted."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tests.optim.problems import OPTIMIZERS, Net, distance, identical, loss_of, normal, train
from torch import Tensor

from ritz.operators.structured import Dense, LowerToeplitz
from ritz.optim import KFAC, SINGD, AdamW, EarlyDense

SETTINGS: dict[str, dict[str, Any]] = {
    "every step": {"update_interval": 1},
    "between updates": {"update_interval": 3, "weight_decay": 0.1},
    "early dense": {"update_interval": EarlyDense(3)},
    "plain momentum off": {"update_interval": 2, "momentum": 0.0},
}


def saved(thing: Any) -> Any:
    """Through a file, read without trusting it."""
    buffer = io.BytesIO()
    torch.save(thing.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def resumed(make: Any, dtype: torch.dtype, first: int = 4, rest: int = 5, other: int = 0) -> tuple[Net, Net, Any, Any]:
    """An uninterrupted run, and one that was saved and loaded into fresh objects: models and optimizers."""
    whole, part, fresh = Net(dtype=dtype), Net(dtype=dtype), Net(seed=9, dtype=dtype)
    optimizers = [make(m) for m in (whole, part, fresh)]
    train(whole, optimizers[0], first + rest)
    train(part, optimizers[1], first)
    train(fresh, optimizers[2], other)  # a state to be replaced
    fresh.load_state_dict(saved(part))
    optimizers[2].load_state_dict(saved(optimizers[1]))
    train(fresh, optimizers[2], rest, start=first)
    return whole, fresh, optimizers[0], optimizers[2]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_resumed_is_uninterrupted(name, settings):
    whole, fresh, old, new = resumed(lambda m: OPTIMIZERS[name](m, 0.02, **SETTINGS[settings]), torch.float64)
    assert identical(whole, fresh)
    assert all(torch.equal(a, b) for a, b in zip(tensors(old), tensors(new), strict=True))
    assert not identical(whole, Net())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_in_place_of_another_run(name):
    """Loaded into an optimizer that has a state, cached products and another phase."""
    make = lambda m: OPTIMIZERS[name](m, 0.02, update_interval=3, row_form=False)
    whole, fresh, _, _ = resumed(make, torch.float64, other=2)
    assert identical(whole, fresh)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_in_two_precisions(name):
    """Factors in float32 of weights in bfloat16 stay float32, which torch's own loading would round."""
    make = lambda m: OPTIMIZERS[name](m, 0.02, curvature_dtype=torch.float32, update_interval=3)
    whole, fresh, old, new = resumed(make, torch.bfloat16)
    assert identical(whole, fresh)
    kinds = [[(v.dtype, v.shape) for v in tensors(o)] for o in (old, new)]
    assert kinds[0] == kinds[1]
    assert {v.dtype for v in tensors(new)} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("make", [SINGD, KFAC], ids=["singd", "kfac"])
def test_resumed_with_vectors_in_a_group_of_their_own(make):
    """Their group updates on steps on which no layer counts the loss terms anew."""

    def of(model: Net) -> Any:
        vectors = [*model.norm.parameters()]
        others = [p for p in model.parameters() if not any(p is v for v in vectors)]
        return make([{"params": others, "update_interval": 4}, {"params": vectors}], model=model, update_interval=1)

    whole, fresh, _, _ = resumed(of, torch.float64, first=6, rest=1)
    assert identical(whole, fresh)


def test_groups_are_restored_too():
    """Learning rates that a scheduler had changed come back; they are plain numbers."""
    model, fresh = Net(), Net()
    optimizer, other = SINGD(model, 0.02, fallback=AdamW(lr=0.5)), SINGD(fresh, 0.7)
    optimizer.param_groups[0]["lr"] = 0.013
    train(model, optimizer, 3)
    other.load_state_dict(saved(optimizer))
    assert [g["lr"] for g in other.param_groups] == [0.013, 0.5]
    assert [g["step"] for g in other.param_groups] == [3, 3]
    for group in optimizer.state_dict()["param_groups"]:
        assert all(isinstance(v, (int, float, bool, list, tuple)) for v in group.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loading_takes_copies(name):
    """Training on does not change the tensors that were loaded."""
    model, other = Net(), Net()
    optimizer, new = (OPTIMIZERS[name](m, 0.02, update_interval=1) for m in (model, other))
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    new.load_state_dict(state)
    train(other, new, 2)
    for i, entries in state["state"].items():
        for key, value in entries.items():
            assert not isinstance(value, Tensor) or torch.equal(value, kept["state"][i][key])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_of_model_and_optimizer(name):
    """They go on as the original does, each on its own."""
    model = Net()
    optimizer = OPTIMIZERS[name](model, 0.02, update_interval=2)
    train(model, optimizer, 3)
    twin, copied = copy.deepcopy((model, optimizer))
    train(twin, copied, 3, start=3)
    before = [p.detach().clone() for p in twin.parameters()]
    assert not identical(model, twin)
    train(model, optimizer, 3, start=3)
    assert identical(model, twin) and identical(twin, before)


def test_a_copied_optimizer_has_no_scheduler():
    model = Net()
    optimizer = SINGD(model, 0.02)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    twin, copied = copy.deepcopy((model, optimizer))
    train(twin, copied, 1)
    assert identical(model, Net()) and not identical(twin, Net())


def test_a_copied_model_alone_is_not_watched():
    model = Net()
    optimizer = SINGD(model, 0.02)
    twin = copy.deepcopy(model)
    loss_of(twin(normal(8, 5)), normal(8, 3)).backward()
    assert all(layer.sums.rows == 0 for layer in optimizer._layers)


def test_an_optimizer_is_not_pickled():
    with pytest.raises(TypeError, match=r"save optimizer\.state_dict\(\)"):
        pickle.dumps(SINGD(Net(), 0.02))


# -- cast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cast_after_construction(name):
    """The optimizer of a model that is cast before the first step is that of the cast model."""
    model, other = Net(dtype=torch.float32), Net(dtype=torch.float32).double()
    optimizer = OPTIMIZERS[name](model, 0.02, update_interval=2)
    model.double()
    train(model, optimizer, 4)
    train(other, OPTIMIZERS[name](other, 0.02, update_interval=2), 4)
    assert identical(model, other)
    assert {v.dtype for v in tensors(optimizer) if v.ndim} == {torch.float64}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("curvature_dtype", [None, torch.float32])
def test_cast_between_steps(name, curvature_dtype):
    """State follows the weights, except factors that have a dtype of their own; the run stays near a float64 one."""
    settings = {"update_interval": 3, "curvature_dtype": curvature_dtype, "damping": 0.1}
    model, other = Net(dtype=torch.float32), Net(dtype=torch.float32).double()
    optimizer = OPTIMIZERS[name](model, 0.02, **settings)
    train(model, optimizer, 2)
    model.to(torch.float64)
    train(model, optimizer, 3, start=2)
    assert optimizer.report().state_bytes == sum(v.numel() * v.element_size() for v in tensors(optimizer))
    wanted = curvature_dtype or torch.float64
    state = optimizer.state[model.head.weight]
    assert {v.dtype for k, v in state.items() if k in ("K", "C", "S_A", "S_B")} == {wanted}
    assert optimizer.state[model.mix]["exp_avg"].dtype == torch.float64
    train(other, OPTIMIZERS[name](other, 0.02, update_interval=3, damping=0.1), 5)
    assert distance(model, other) <= 1e-5


def test_loaded_structures_are_flat_tensors():
    """One tensor a factor, in the structure's own storage."""
    model = Net()
    optimizer = SINGD(model, 0.02, structures=(LowerToeplitz(), Dense()), update_interval=1)
    train(model, optimizer, 1)
    state = saved(optimizer)["state"][0]
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "K": (6,), "m_K": (6,), "C": (36,), "m_C": (36,), "momentum_buffer": (6, 6)
    }  # fmt: skip
