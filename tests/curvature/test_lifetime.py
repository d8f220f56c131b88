"""What hooks keep alive, what copies of a model take along, and memory over many steps."""

import copy
import gc
import io
import os
import weakref

import pytest
import torch
from tests.curvature.oracle import Net, batch, factors, kfac, loss_of
from tests.curvature.recorder import watch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ritz.operators.structured import Dense
from ritz.optim import KFAC, SINGD


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def attention():
    return nn.MultiheadAttention(4, 2, batch_first=True).double()


def passes(model):
    if isinstance(model, nn.MultiheadAttention):
        x = torch.ones(2, 3, 4).double()
        return model(x, x, x)[0].sum()
    return loss_of(model(batch()[0]), batch()[1])


@pytest.mark.parametrize("build", [Net, attention])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved])
def test_copies_of_a_model_have_no_active_hooks(build, duplicate):
    torch.manual_seed(0)
    model = build()
    optimizer = kfac(model)
    optimizer.big = torch.zeros(1000, 1000)  # 4 MB that no copy may contain
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert buffer.tell() < 100_000
    copied = duplicate(model)
    passes(copied).backward()
    assert not any(layer.sums.rows for layer in optimizer._layers)
    passes(model).backward()
    for p, q in zip(model.parameters(), copied.parameters()):
        assert p is not q and torch.equal(p.grad, q.grad)
    expected = factors(optimizer)
    own = kfac(copied)  # and a copy can have an optimizer of its own
    passes(copied).backward()
    found = factors(own)
    assert all(torch.equal(a, b) for name in expected for a, b in zip(found[name], expected[name]))


@pytest.mark.parametrize("build", [Net, attention])
def test_removed_hooks_are_gone(build):
    model = build()
    modules = list(model.modules())
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    optimizer = kfac(model)
    assert count() == (3 if build is Net else 2)
    on_its_way = passes(model)
    optimizer.remove_hooks()
    assert count() == 0
    on_its_way.backward()
    passes(model).backward()
    assert not any(layer.sums.rows for layer in optimizer._layers)
    optimizer.step()


@pytest.mark.parametrize("build", [Net, attention])
def test_hooks_do_not_keep_the_optimizer_alive(build):
    model = build()
    optimizer = kfac(model)
    loss = passes(model)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None  # with the model and a graph of it still there
    loss.backward()
    passes(model).backward()


def inputs_of(model, x):
    """The loss of a pass, and weak references to the memory of the inputs of all its linear layers."""
    found = []
    handles = [
        m.register_forward_pre_hook(lambda module, args: found.append(StorageWeakRef(args[0].untyped_storage())))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    loss = model(x).square().sum()
    for handle in handles:
        handle.remove()
    return loss, found


def test_inputs_go_when_the_backward_pass_is_over():
    """Although the loss, and with it the graph, is still held: as in most training loops up to the next one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))).double()
    recorder, _ = watch(model)
    loss, inputs = inputs_of(model, torch.randn(5, 4).double())
    loss.backward(retain_graph=True)
    recorder.uses.clear()
    assert not any(ref.expired() for ref in inputs[1:])
    loss.backward()
    recorder.uses.clear()
    assert all(ref.expired() for ref in inputs)
    del loss


def test_inputs_go_when_the_output_goes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    optimizer = kfac(model)
    loss, inputs = inputs_of(model, torch.randn(5, 4).double())
    assert not any(ref.expired() for ref in inputs)
    del loss
    assert all(ref.expired() for ref in inputs)
    del optimizer


def resident():
    """Resident bytes of this process."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize(("rule", "interval"), [(KFAC, 1), (SINGD, 7)])
def test_memory_is_flat(rule, interval):
    """A leak of the rows of one step in each of 200 would be more than 40 MB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 8), nn.LayerNorm(8))
    optimizer = rule(model, lr=1e-4, structures=Dense(), update_interval=interval)
    x = torch.randn(1024, 16)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
        del loss
        gc.collect()
        found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        tensors = [t for t in found if t.layout == torch.strided]  # other tests leave sparse ones, without a storage
        return len(tensors), sum(t.untyped_storage().nbytes() for t in tensors), len(gc.get_objects())

    run(20)  # what is made once
    first, before = run(20), resident()
    second = run(200)
    assert second[:2] == first[:2]
    assert second[2] - first[2] < 100  # one object kept a step would be 200
    assert resident() - before < 15e6
