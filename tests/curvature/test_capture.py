"""When the hooks listen, and when they do not."""

import copy

import pytest
import torch
from tests.curvature.oracle import Net, batch, factors, kfac, kronecker, loss_of
from tests.curvature.recorder import close, watch
from torch import nn

from ritz.errors import OperandError


def collected(optimizer):
    return [layer.name for layer in optimizer._layers if layer.sums.rows]


def reference(model, x, t):
    """Factors of the one training pass that every test below makes."""
    own = copy.deepcopy(model)
    optimizer = kfac(own)
    loss_of(own(x), t).backward()
    return factors(optimizer)


def same(found, expected):
    assert set(found) == set(expected)
    return all(close(a, b) for name in expected for a, b in zip(found[name], expected[name]))


def evaluate(model, optimizer, x):
    model.eval()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model.train()


def forward_only(model, optimizer, x):
    model.eval()
    model(x)
    model.train()


def paused(model, optimizer, x):
    with optimizer.paused():
        model(x).sum().backward()
    model.zero_grad()


def paused_input_gradient(model, optimizer, x):
    with optimizer.paused():
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        torch.autograd.grad(g.square().sum(), x)


def paused_backward(model, optimizer, x):
    x = x.clone().requires_grad_()
    f = model(x)
    with optimizer.paused():
        torch.autograd.grad(f.sum(), x)


def per_example_gradients(model, optimizer, x):
    parameters = dict(model.named_parameters())
    one = lambda p, xi: torch.func.functional_call(model, p, (xi.unsqueeze(0),)).square().sum()
    torch.func.vmap(torch.func.grad(one), (None, 0))(parameters, x)
    torch.func.vmap(model)(x.unsqueeze(1))
    torch.func.jacrev(model)(x[:1])


def other_weights(model, optimizer, x):
    """A functional call with weights that are not the optimizer's, by the same modules."""
    other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, other, (x,)).sum().backward()


QUIET = [evaluate, forward_only, paused, paused_input_gradient, paused_backward, per_example_gradients, other_weights]


@pytest.mark.parametrize("other", QUIET, ids=lambda f: f.__name__)
@pytest.mark.parametrize("first", [True, False])
def test_passes_that_are_not_training(other, first):
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    expected = reference(model, x, t)
    optimizer = kfac(model)
    if first:
        other(model, optimizer, x)
        assert collected(optimizer) == []
    loss_of(model(x), t).backward()
    if not first:
        with torch.enable_grad():
            other(model, optimizer, x)
        assert len(collected(optimizer)) == 3
    assert same(factors(optimizer), expected)


def test_attention_under_transforms_and_other_passes():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(2, 3, 4).double()
    optimizer, modes = kfac(model), []
    model.register_forward_pre_hook(lambda *_: modes.append(torch.overrides._get_current_function_mode()))
    with torch.no_grad():
        model(x, x, x)
    with optimizer.paused():
        model(x, x, x)[0].sum().backward()
    torch.func.jacrev(lambda z: model(z, z, z)[0])(x)
    assert collected(optimizer) == [] and modes == [None] * 3
    with pytest.raises(AssertionError):
        model(x, x, torch.zeros(2, 5, 4).double())  # the mode of this call must not stay
    assert torch.overrides._get_current_function_mode() is None
    model(x, x, x)[0].sum().backward()
    assert len(collected(optimizer)) == 2 and modes[-1] is not None


def test_zero_grad_drops_what_was_collected():
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    expected = reference(model, x, t)
    optimizer = kfac(model)
    loss_of(model(3 * x), t).backward()
    optimizer.zero_grad()
    assert collected(optimizer) == []
    loss_of(model(x), t).backward()
    assert same(factors(optimizer), expected)
    assert collected(optimizer) == []  # the step has used it


def test_nothing_is_collected_between_updates():
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    optimizer = kfac(model, update_interval=3, row_form=False)
    seen = []
    for _ in range(7):
        optimizer.zero_grad()
        loss_of(model(x), t).backward()
        seen.append(len(collected(optimizer)))
        optimizer.step()
    assert seen == [3, 0, 0, 3, 0, 0, 3]


def test_a_graph_that_is_kept_reports_every_pass():
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    recorder, _ = watch(model)
    loss = loss_of(model(x), t)
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(recorder.uses) == 6 and len({use.batch for use in recorder.uses}) == 2
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert len(recorder.uses) == 6


def test_a_graph_of_the_gradient_reports_the_whole_gradient():
    """A penalty on the gradient: the final pass has both parts in it, and is one batch."""
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    x.requires_grad_()
    optimizer = kfac(model)
    f, traced = model.trace(x)
    rows = {name: y for name, (_, y) in traced.items()}

    def objective(loss, penalty_of):
        return loss + penalty_of(loss).square().sum()

    slope = lambda loss: torch.autograd.grad(loss, x, create_graph=True)[0]
    expected = torch.autograd.grad(objective(loss_of(f, t), slope), list(rows.values()))
    loss = loss_of(model(x), t)
    with optimizer.paused():
        penalty = slope(loss)
    (loss + penalty.square().sum()).backward()
    found = factors(optimizer)
    for name, g in zip(rows, expected):
        g = g if g.ndim == 3 else g.unsqueeze(1)
        assert close(found[name][1], kronecker(g, g, bias=False, scale=float(len(x)))[1])


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (3,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("deferred", [False, True])
def test_the_next_operation_works_in_place(shape, bias, deferred):
    """The gradient is that of the layer's output before it was changed, also where the output is a view."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(*shape).double()
    recorder, _ = watch(model, deferred=deferred)
    f = model(x)
    if deferred:
        assert recorder.capture.backward(f, iter([2 * f.detach()])) == 2
    else:
        f.square().sum().backward()
    y = nn.functional.linear(x, model[0].weight, model[0].bias)
    (g,) = torch.autograd.grad(model[2](y.relu()).square().sum(), y)
    (use,) = recorder.of(model[0].weight)
    assert close(use.g.reshape(g.shape), g)


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3)], ids=repr)
def test_convolutions_in_place_and_unbatched(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(inplace=True)).double()
    x = torch.randn(2, *(6,) * len(layer.kernel_size)).double()
    recorder, _ = watch(model)
    model(x).square().sum().backward()
    (use,) = recorder.uses
    made = use.g[0].mT @ use.a[0]
    assert close(layer.weight.grad, use.site.rule.from_matrix(layer, made, layer.weight.shape))


def test_a_layer_that_is_not_called_with_one_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.layer.register_forward_hook(lambda module, x, y: (y, y))

        def forward(self, x):
            return self.layer(x)[0]

    model = Pair()
    optimizer = kfac(model)
    with pytest.raises(OperandError, match="Linear was called with Tensor and gave tuple"):
        model(torch.zeros(3, 2))
    with optimizer.paused():
        assert model(torch.zeros(3, 2)).shape == (3, 2)
