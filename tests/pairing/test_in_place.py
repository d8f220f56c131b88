"""In-place changes between forward and backward."""

from __future__ import annotations

import pytest
import torch
from tests.pairing.common import REAL, N, W, close_cached, close_leaf, only_pairing, operator, randn, rows, squared_norm

from ritz.pairing import PAIR_CHUNK, Cotangents, Pair, Run

IN_PLACE = {
    "a captured leaf": lambda s: s["theta"],
    "a constant": lambda s: s["constant"],
    "a constant through a view": lambda s: s["constant"][1:3],
    "the operand": lambda s: s["v"],
    "a tensor that is only used detached": lambda s: s["detached"],
    "a captured non-leaf": lambda s: s["h"],
}


@pytest.mark.parametrize("hooks", [False, True], ids=["plain", "saved tensors on the CPU"])
@pytest.mark.parametrize("what", IN_PLACE)
def test_a_change_in_place_before_backward_raises(what, hooks):
    s = {name: randn(N, seed=i).requires_grad_() for i, name in enumerate(["theta", "v", "detached"])}
    s["constant"] = randn(N, seed=9)
    s["h"] = s["theta"].square()

    def fn(x):
        return rows(s["theta"] + s["constant"] * s["detached"].detach(), W @ x) + rows(s["h"], x) * 1.0

    def nonleaf(x):
        return rows(s["h"] * s["constant"] * s["detached"].detach(), W @ x)

    A = operator(nonleaf if what == "a captured non-leaf" else fn)
    if hooks:
        with torch.autograd.graph.save_on_cpu():
            value = squared_norm(A, s["v"])
    else:
        value = squared_norm(A, s["v"])
    with torch.no_grad():
        IN_PLACE[what](s).mul_(2)
    with pytest.raises(RuntimeError, match="in.?place|inplace"):
        value.backward()


def test_a_change_in_place_of_a_leaf_alone_raises():
    """No nested tensors here, so the pairing is deferred and would read the new numbers."""
    for name in ("theta", "constant", "detached"):
        s = {"theta": randn(N).requires_grad_(), "constant": randn(N), "detached": randn(N).requires_grad_()}
        A = operator(lambda x, s=s: rows(s["theta"] * s["constant"] * s["detached"].detach(), W @ x))
        value = squared_norm(A, randn(N))
        with torch.no_grad():
            s[name].mul_(2)
        with pytest.raises(RuntimeError, match="in.?place|inplace"):
            value.backward()


def test_a_workspace_that_the_callable_itself_changes_is_no_reason_to_raise():
    theta, counter = randn(N).requires_grad_(), torch.zeros(1)

    def fn(x):
        counter.add_(1)
        return rows(theta, W @ x)

    v = randn(N)
    (got,) = torch.autograd.grad(squared_norm(operator(fn), v), theta)
    torch.testing.assert_close(got, torch.autograd.grad((theta * (W @ v)).square().sum(), theta)[0])


def test_writing_into_the_basis_that_the_first_product_came_from_is_no_reason_to_raise():
    """A Krylov basis is filled row by row; the operand of the first product is a view of it."""
    theta = randn(N).requires_grad_()
    Q = torch.zeros(3, N, dtype=REAL)
    Q[0] = randn(N)
    with Run(operator(lambda x: rows(theta, x))) as run:
        y = run.matmat(Q[0].unsqueeze(1))
        Q[1] = y[:, 0]
    rule = lambda g: Cotangents([Pair(2 * g * y)], [])
    (value,) = run.attach([y.square().sum()], rule, [Q[:1].mT], name="form")
    (got,) = torch.autograd.grad(value, theta)
    torch.testing.assert_close(got, 2 * theta.detach() * Q[0].square())


def test_changing_a_value_in_place_does_not_reach_the_rule():
    theta, v = randn(N).requires_grad_(), randn(N)
    with Run(operator(lambda x: rows(theta, x))) as run:
        y = run.matmat(v[:, None])
    rule = lambda g: Cotangents([Pair(2 * y * g)], [])  # reads its own value: d (y²) = 2 y dy
    (value,) = run.attach([y.square()], rule, [v[:, None]], name="square")
    (out,) = run.attach([y], lambda g: Cotangents([Pair(g)], []), [v[:, None]], name="product")
    out.data.mul_(5)
    (got,) = torch.autograd.grad(value.sum(), theta)
    torch.testing.assert_close(got, 2 * theta.detach() * v * v)


def test_changing_a_value_that_is_also_a_block_raises():
    theta, v = randn(N).requires_grad_(), randn(N, 1)
    with Run(operator(lambda x: rows(theta, x))) as run:
        Y = run.matmat(v)
    (value,) = run.attach([Y], lambda g: Cotangents([Pair(g)], []), [Y], name="a solution")
    with torch.no_grad():
        value.mul_(2)
    with pytest.raises(RuntimeError, match="a solution: a tensor of shape .* in place"):
        value.sum().backward()


def test_a_factor_computed_inside_the_first_product_serves_every_chunk_and_every_backward():
    """With block=True nothing is probed before, so the cached factor's graph belongs to the captured product."""
    theta, X = randn(N).requires_grad_(), randn(N, 2 * PAIR_CHUNK + 1)
    A = operator(close_cached(theta), block=True)
    value = only_pairing(A, X) + only_pairing(A, 2 * X)
    (got,) = torch.autograd.grad(value, theta)
    plain = 5 * rows(theta.square().sin(), W @ X).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(plain, theta)[0])


def test_backward_twice_gives_the_same():
    theta = randn(N).requires_grad_()
    value = squared_norm(operator(close_cached(theta)), randn(N, 40))
    first = torch.autograd.grad(value, theta, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value, theta)[0], first, rtol=0, atol=0)


def test_checkpoint_gives_the_same():
    from torch.utils.checkpoint import checkpoint

    theta, v = randn(N).requires_grad_(), randn(N, 3, seed=1).requires_grad_()
    f = lambda v: squared_norm(operator(close_leaf(theta)), v)
    plain = torch.autograd.grad(f(v), (theta, v))
    again = torch.autograd.grad(checkpoint(f, v, use_reentrant=False), (theta, v))
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b)
