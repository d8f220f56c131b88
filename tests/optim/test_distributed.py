"""Data-parallel training over gloo processes is training on the concatenated batch in one."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from tests.optim._workers import (
    CASES,
    INTERVAL,
    ROWS,
    STEPS,
    Branched,
    branched_loop,
    data,
    loop,
    optimizer_of,
    values,
    work,
)
from tests.optim.problems import Net

from ritz.optim import SINGD

pytestmark = pytest.mark.multi
TOLERANCE = 1e-10


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """What every process found."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(work, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def gap(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one_process(name, world):
    """The run on the whole batch. (The mean over processes of the sums over their rows is the whole sum / world.)"""
    model = Net()
    loop(model, optimizer_of(name, model), data, total=ROWS / world if name == "singd sum" else 1.0)
    return values(model)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name):
    assert gap(ranks[0][name], one_process(name, len(ranks))) <= TOLERANCE
    assert gap(ranks[0][name], values(Net())) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_all_processes_have_the_same_bits(ranks, name):
    assert all(same_bits(ranks[0][name], other[name]) for other in ranks[1:])


@pytest.mark.parametrize("name", CASES)
def test_collectives(ranks, name):
    """At most two on an update step, none on the others."""
    for rank in ranks:
        counts = rank[name + ": calls"]
        assert len(counts) == STEPS
        assert all(0 < c <= 2 if step % INTERVAL == 0 else c == 0 for step, c in enumerate(counts)), counts


def test_a_layer_that_one_process_does_not_use(ranks):
    model = Branched()
    branched_loop(model, optimizer_of("singd dense", model), 0, 1)
    assert gap(ranks[0]["branched"], values(model)) <= TOLERANCE
    assert all(same_bits(ranks[0]["branched"], other["branched"]) for other in ranks[1:])


def test_an_unwrapped_model_is_refused(ranks):
    for rank in ranks:
        assert f"runs with {len(ranks)} processes, and the model is not wrapped" in rank["refused"]
        assert "process_group=False" in rank["refused"]


def test_models_of_their_own(ranks):
    for seed, rank in enumerate(ranks):
        model = Net(seed=seed)
        loop(model, SINGD(model, 0.02, update_interval=INTERVAL), data, total=1.0)
        assert gap(rank["alone"], values(model)) <= 1e-12


def test_a_process_group_without_a_wrapper(ranks):
    assert gap(ranks[0]["group"], one_process("singd dense", len(ranks))) <= TOLERANCE
    assert all(same_bits(ranks[0]["group"], other["group"]) for other in ranks[1:])
