"""The rows of every layer make its gradient, example by example, and hooks change nothing."""

import pytest
import torch
from tests.curvature import table
from tests.curvature.recorder import close, row_gradients, watch
from torch import nn
from torch.nn import functional as F

from ritz.curvature import rule_for
from ritz.operators.structured import Dense
from ritz.optim import KFAC

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
by_name = pytest.mark.parametrize("case", table.ALL, ids=lambda case: case.name)
grouped = pytest.mark.parametrize("case", table.GROUPED, ids=lambda case: case.name)


def losses(y):
    """One loss per example, with a gradient that differs in every entry."""
    c = torch.linspace(-1.0, 1.3, y.numel(), dtype=y.dtype).sin().reshape(y.shape)
    return (c * y + 0.3 * y.square()).flatten(1).sum(1)


@by_name
def test_rows_make_the_gradient_of_every_example(case):
    module = case.module()
    recorder, found = watch(module)
    terms = losses(case.examples(module))
    terms.sum().backward(retain_graph=True)
    recorder.on = False
    matrices = [own for own in found.values() if own.sites]
    assert matrices
    for own in matrices:
        weight, rule, holder = own.parameter, own.sites[0].rule, own.sites[0].module
        made, made_bias = row_gradients(recorder.of(weight))
        parameters = [weight] if own.bias is None else [weight, own.bias]
        # A linear layer cannot know that its first axis is the sequence; attention does.
        sequence_first = case.axis == 1 and not isinstance(holder, nn.MultiheadAttention)
        assert len(made) == (case.inputs[0].shape[0] if sequence_first else len(terms))
        for i, term in enumerate(() if sequence_first else terms):
            exact = torch.autograd.grad(term, parameters, retain_graph=True)
            assert close(rule.from_matrix(holder, made[i], weight.shape), exact[0])
            if own.bias is not None:
                assert close(made_bias[i], exact[1])
        assert close(rule.from_matrix(holder, made.sum(0), weight.shape), weight.grad)
        assert own.bias is None or close(made_bias.sum(0), own.bias.grad)


@by_name
def test_every_weight_is_found_with_its_bias(case):
    module = case.module()
    _, found = watch(module)
    for p, own in found.items():
        if own.name.endswith("weight") and p.ndim > 1:
            assert own.sites and not own.reason
            separate = "kdim" in case.name and "proj_weight" in own.name  # three weights, one packed bias
            bias = dict(module.named_parameters()).get(own.name.replace("weight", "bias"))
            assert own.bias is (None if separate else bias)


def unfolded(module, x):
    """Patches (n, R, C·kernel) by F.unfold, 1-d convolutions as 2-d ones of height 1."""
    pad = lambda values, fill: (fill, *values) if len(values) == 1 else tuple(values)
    x = x.unsqueeze(2) if len(module.kernel_size) == 1 else x
    return F.unfold(
        x, pad(module.kernel_size, 1), pad(module.dilation, 1), pad(module.padding, 0), pad(module.stride, 1)
    ).mT


@pytest.mark.parametrize("case", [c for c in table.GROUPED if c.name[4] in "12"], ids=lambda case: case.name)
def test_groups_share_one_factor_of_averaged_channels(case):
    module, (x,) = case.module(), case.inputs
    assert not isinstance(module, nn.modules.conv._ConvTransposeNd)
    recorder, _ = watch(module)
    y = case.call(module)
    loss = losses(y).sum()
    (g,) = torch.autograd.grad(loss, y, retain_graph=True)
    recorder.uses.clear()
    loss.backward()
    (use,) = recorder.uses
    averaged = torch.stack(x.chunk(module.groups, 1)).mean(0)
    assert close(use.a, unfolded(module, averaged))
    assert close(use.g, g.flatten(2).mT)


@pytest.mark.parametrize("case", [c for c in table.GROUPED if c.name[4] not in "12"], ids=lambda case: case.name)
def test_other_groups_have_the_rows_of_a_layer_without(case):
    """Of the averaged input; the rows without groups are those that the table above has checked."""
    module, (x,) = case.module(), case.inputs
    recorder, _ = watch(module)
    y = case.call(module)
    losses(y).sum().backward()
    (use,) = recorder.uses
    averaged = torch.stack(x.chunk(module.groups, 1)).mean(0)
    assert close(use.a, rule_for(module).inputs(ungrouped(module), averaged, y.shape))
    assert use.g.shape == (x.shape[0], y[0, 0].numel(), module.out_channels)


def ungrouped(module):
    names = ("stride", "padding", "dilation", *(("output_padding",) if module.transposed else ()))
    settings = {name: getattr(module, name) for name in names}
    return type(module)(module.in_channels // module.groups, module.out_channels, module.kernel_size, **settings)


@pytest.mark.parametrize("case", [*table.ALL, *table.GROUPED], ids=lambda case: case.name)
def test_matrix_and_weight_are_the_same_numbers(case):
    module = case.module()
    _, found = watch(module)
    for own in found.values():
        for site in own.sites:
            W = torch.arange(site.weight.numel(), dtype=torch.float64).reshape(site.weight.shape)
            M = site.rule.to_matrix(site.module, W)
            back = site.rule.from_matrix(site.module, M, W.shape)
            assert M.ndim == 2 and torch.equal(back, W)
            assert torch.equal(site.rule.to_matrix(site.module, back), M)


@grouped
def test_rows_of_a_grouped_matrix_are_output_channels(case):
    module = case.module()
    rule = rule_for(module)
    M = rule.to_matrix(module, module.weight.detach())
    assert M.shape == (module.out_channels, module.weight.numel() // module.out_channels)
    y = case.call(module)
    channel = module.out_channels - 1  # the gradient of one output channel is one row of the matrix
    y[:, channel].sum().backward()
    used = rule.to_matrix(module, module.weight.grad).abs().sum(1) > 0
    assert used.tolist() == [i == channel for i in range(module.out_channels)]


@pytest.mark.parametrize("case", [*table.ALL, *table.GROUPED], ids=lambda case: case.name)
def test_hooks_change_neither_results_nor_gradients(case):
    plain, hooked = case.module(), case.module()
    optimizer = KFAC(hooked, structures=Dense(), update_interval=1)
    for module in (plain, hooked):
        module.y = case.examples(module)
        losses(module.y).sum().backward()
    assert torch.equal(plain.y, hooked.y)
    for p, q in zip(plain.parameters(), hooked.parameters()):
        assert torch.equal(p.grad, q.grad)
    assert any(layer.sums.rows for layer in optimizer._layers)


@pytest.mark.parametrize("kind", [nn.Linear(4, 3), nn.Conv2d(4, 6, 3), nn.Embedding(7, 3)], ids=repr)
def test_a_batch_without_examples(kind):
    """An expert that no token was sent to: its gradient is zero, and so is its share of the statistics."""
    module = kind.double()
    x = {"Linear": torch.zeros(0, 4), "Conv2d": torch.zeros(0, 4, 5, 5), "Embedding": torch.zeros(0, 2).long()}
    x = x[type(module).__name__]
    optimizer = KFAC(module, structures=Dense(), update_interval=1)
    module(x.double() if x.is_floating_point() else x).sum().backward()
    before = module.weight.detach().clone()
    optimizer.step()
    assert torch.equal(module.weight, before)
