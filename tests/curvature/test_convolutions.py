"""Convolutions recorded for their products alone: values against dense Jacobians, and no convolution for nothing."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ritz.curvature import GGN, CrossEntropy, Jacobian


def flat(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.Flatten()).double()


NETWORKS = {
    "1d": (flat(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 2)), (3, 2, 6)),
    "2d, strides and padding": (
        flat(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2)),
        (3, 1, 6, 6),
    ),
    "3d": (flat(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 2, 2)), (2, 1, 4, 3, 3)),
    "groups and dilation": (
        flat(nn.Conv2d(4, 4, 2, groups=2, dilation=(2, 1)), nn.Tanh(), nn.Conv2d(4, 2, 2)),
        (3, 4, 6, 4),
    ),
    "no bias": (flat(nn.Conv2d(1, 3, 3, bias=False), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False)), (3, 1, 5, 5)),
    "same padding": (flat(nn.Conv2d(1, 3, 3, padding="same"), nn.Tanh(), nn.Conv2d(3, 2, 2)), (3, 1, 4, 4)),
    "circular padding": (flat(nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()), (3, 1, 4, 4)),
    "transposed 1d": (flat(nn.ConvTranspose1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 2)), (3, 2, 4)),
    "transposed 2d": (
        flat(
            nn.Conv2d(1, 4, 2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
        ),
        (3, 1, 4, 4),
    ),
    "transposed 3d": (flat(nn.ConvTranspose3d(1, 2, 2, dilation=2)), (2, 1, 2, 2, 2)),
}


def dense(model, names, x):
    """The Jacobian (outputs, parameters) by reverse mode over the plain network."""
    params = {n: p.detach() for n, p in model.named_parameters() if n in names}
    blocks = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    return torch.cat([b.flatten(2) for b in blocks.values()], 2).flatten(0, 1)


def columns(n, k, seed):
    return torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("which", ["all", "weights", "biases", "first", "last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_dense_jacobian(name, which):
    model, shape = NETWORKS[name]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    all_names = [n for n, _ in model.named_parameters()]
    chosen = {
        "all": all_names,
        "weights": [n for n in all_names if n.endswith("weight")],
        "biases": [n for n in all_names if n.endswith("bias")] or all_names,
        "first": all_names[:1],
        "last": all_names[-1:],
    }[which]
    J, operator = dense(model, chosen, x), Jacobian(model, params=chosen, data=x)
    V, U = columns(J.shape[1], 3, 2), columns(J.shape[0], 3, 3)
    for k in (1, 3):
        torch.testing.assert_close(operator @ V[:, :k], J @ V[:, :k], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(operator.mH @ U[:, :k], J.T @ U[:, :k], rtol=1e-11, atol=1e-11)


def test_functions_with_unbatched_inputs_and_with_vmap():
    W, x = columns(18, 1, 0).reshape(2, 1, 3, 3), columns(3, 25, 1).reshape(3, 1, 5, 5)
    J = jacrev(lambda w: F.conv2d(x, w).tanh())(W).reshape(-1, 18)
    one = lambda w, z: F.conv2d(z, w).tanh()  # noqa: E731
    each = {
        "unbatched": lambda w, x: torch.stack([one(w, z) for z in x]),
        "vmap": lambda w, x: torch.vmap(one, (None, 0))(w, x),
        "keywords": lambda w, x: F.conv2d(input=x, weight=w, bias=None, stride=(1, 1), padding=0).tanh(),
    }
    V = columns(18, 4, 2)
    for name, f in each.items():
        torch.testing.assert_close(
            Jacobian(f, params=W, data=x) @ V, J @ V, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


class Counted(TorchDispatchMode):
    def __init__(self):
        self.forward, self.backward = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.aten.convolution.default
        self.backward += func is torch.ops.aten.convolution_backward.default
        return func(*args, **(kwargs or {}))


def test_a_product_computes_no_convolution_for_nothing():
    # J v: x ∗ W₁', then h ∗ W₂' and h' ∗ W₂; Jᵀ u: one pull-back a layer. torch alone computes eight for the same J v.
    model, shape = NETWORKS["2d, strides and padding"]
    x, y = torch.randn(shape, dtype=torch.float64), torch.tensor([0, 1, 2])
    G = GGN(model, CrossEntropy(), None, (x, y))
    v = columns(G.shape[0], 1, 0).squeeze(1)
    G @ v
    with Counted() as counted:
        G @ v
    assert (counted.forward, counted.backward) == (3, 2)


def test_products_stay_differentiable_where_that_is_asked_for():
    model, shape = NETWORKS["2d, strides and padding"]
    x, y = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])
    names = [n for n, _ in model.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in model.parameters()]
    v = columns(sum(p.numel() for p in params), 1, 2).squeeze(1)

    def f(p, x):
        return functional_call(model, dict(zip(names, p)), (x,))

    def value(*p):
        return v @ (GGN(f, CrossEntropy(), list(p), (x, y), hyperparameters=p) @ v)

    assert torch.autograd.gradcheck(value, params, fast_mode=True)


def inner(w, z):
    """A force: the network takes a gradient itself."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        energy = F.conv1d(z, w).tanh().sum()
        return torch.autograd.grad(energy, z, create_graph=True)[0].flatten(1)


def shared(w, z):
    return F.conv1d(F.conv1d(z, w[:, :1]).tanh(), w).flatten(1)


def with_checkpoint(w, z):
    return checkpoint(lambda z: F.conv1d(z, w).tanh(), z, use_reentrant=False).flatten(1)


def with_forward_mode(w, z):
    return torch.func.jvp(lambda q: F.conv1d(q, w).tanh(), (z,), (torch.ones_like(z),))[1].flatten(1)


def with_grad_transform(w, z):
    return torch.func.grad(lambda q: F.conv1d(q, w).tanh().sum())(z).flatten(1)


def with_dual_numbers(w, z):
    with fwAD.dual_level():
        return fwAD.unpack_dual(F.conv1d(fwAD.make_dual(z, torch.ones_like(z)), w).tanh()).tangent.flatten(1)


UNUSUAL = (inner, shared, with_checkpoint, with_forward_mode, with_grad_transform, with_dual_numbers)


# torch warns of its own script compiler where it loads the rules of forward mode.
@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
@pytest.mark.parametrize("f", UNUSUAL, ids=lambda f: f.__name__)
def test_networks_that_differentiate_themselves_and_share_weights(f):
    w, z = columns(12, 1, 0).reshape(2, 2, 3), columns(3 * 9, 1, 1).reshape(3, 1, 9)
    z = z if f is shared else z.expand(3, 2, 9).contiguous()
    # Differences of the outputs, which no recording has a say in.
    steps = 1e-6 * torch.eye(12, dtype=torch.float64).reshape(12, 2, 2, 3)
    J = torch.stack([(f(w + e, z) - f(w - e, z)).detach().flatten() / 2e-6 for e in steps], 1)
    operator = Jacobian(f, params=w, data=z)
    V, U = columns(12, 2, 2), columns(J.shape[0], 2, 3)
    torch.testing.assert_close(operator @ V, J @ V, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(operator.mH @ U, J.T @ U, rtol=1e-7, atol=1e-7)


def test_autocast():
    x = columns(4 * 6, 1, 1).reshape(4, 1, 6)
    model = flat(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Conv1d(2, 2, 2))
    J = dense(model, [n for n, _ in model.named_parameters()], x)
    single = copy.deepcopy(model).float()

    def lowered(p, x):
        with torch.autocast("cpu", torch.bfloat16):
            return functional_call(single, p, (x,)).float()

    params = {n: p.detach() for n, p in single.named_parameters()}
    V = columns(J.shape[1], 2, 2)
    got = Jacobian(lowered, params=params, data=x.float()) @ V.float()
    torch.testing.assert_close(got, (J @ V).float(), rtol=0.1, atol=0.1)
