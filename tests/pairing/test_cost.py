"""What the gradient costs in products and memory."""

from __future__ import annotations

import gc
import weakref

import torch
from tests.pairing.common import Calls, N, W, only_pairing, operator, randn, rows, squared_norm

import ritz
from ritz.pairing import PAIR_CHUNK, Cotangents, Pair, Run


def test_nothing_extra_is_computed_where_nothing_requires_grad():
    calls = Calls(lambda x: W @ x)
    squared_norm(operator(calls), randn(N))
    assert calls.widths == [1]
    calls = Calls(lambda x: W @ x)
    value = squared_norm(operator(calls, block=True), randn(N, 3))
    assert calls.widths == [3]
    assert value.grad_fn is None


def test_nothing_extra_is_computed_under_no_grad():
    theta = randn(N).requires_grad_()
    modes = []
    calls = Calls(lambda x: (modes.append(torch.is_grad_enabled()), rows(theta, W @ x))[1])
    with torch.no_grad():
        value = squared_norm(operator(calls), randn(N).requires_grad_())
    assert calls.widths == [1] and modes == [False] and value.grad_fn is None


def test_the_forward_pass_spends_no_product_on_gradients_and_backward_is_chunked():
    theta = randn(N).requires_grad_()
    calls = Calls(lambda x: rows(theta, W @ x))
    A = ritz.Counting(operator(calls, block=True))
    k = 2 * PAIR_CHUNK + 5
    X = randn(N, k)
    with Run(A) as run:
        Y = torch.cat([run.matmat(x.unsqueeze(1)) for x in X.unbind(1)], 1)
    (value,) = run.attach([Y.square().sum()], lambda g: Cotangents([Pair(2 * g * Y)], []), [X], name="sum")
    assert calls.widths == [1] * k == [1] * A.num_forward and run.num_matvecs == k
    value.backward()
    assert calls.widths[k:] == [PAIR_CHUNK, PAIR_CHUNK, 5]
    assert A.num_paired == k and A.num_adjoint == 0
    torch.testing.assert_close(theta.grad, 2 * theta.detach() * (W @ X).square().sum(1))


class Weight:
    """Something that lives as long as the graph that holds it."""


class HeavyScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, x, alive):
        ctx.save_for_backward(w, x)
        ctx.weight = Weight()
        alive.append(weakref.ref(ctx.weight))
        return w.unsqueeze(1) * x

    @staticmethod
    def backward(ctx, g):
        w, x = ctx.saved_tensors
        return (g * x).sum(1), g * w.unsqueeze(1), None


def test_the_graph_of_one_chunk_is_alive_at_a_time():
    theta = randn(50).requires_grad_()
    alive: list[weakref.ref] = []
    peaks: list[int] = []

    def fn(x):
        y = HeavyScale.apply(theta, x, alive)
        peaks.append(sum(r() is not None for r in alive))
        return y

    value = only_pairing(operator(fn, 50, block=True), randn(50, 5 * PAIR_CHUNK))
    alive.clear()
    peaks.clear()
    value.backward()
    assert len(peaks) == 5
    assert max(peaks) <= 2  # the one being made, and the last one until its name is bound anew


def test_deferred_pairs_keep_no_graph_until_backward():
    theta = randn(N).requires_grad_()
    alive: list[weakref.ref] = []
    value = only_pairing(operator(lambda x: HeavyScale.apply(theta, x, alive), block=True), randn(N, 100))
    assert value.requires_grad and len(alive) == 1 and alive[0]() is None


def test_a_finished_value_does_not_keep_itself_alive():
    """A block that is also an output would hold its own graph in a cycle, until the garbage collector comes."""
    theta = randn(N).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        with Run(operator(lambda x: rows(theta, x), block=True)) as run:
            Y = run.matmat(randn(N, 2))
        (value,) = run.attach([Y], lambda g: Cotangents([Pair(g)], []), [Y], name="a solution")
        dead = weakref.ref(value.grad_fn.plan if hasattr(value.grad_fn, "plan") else value.grad_fn)
        del value, Y, run
        assert dead() is None
    finally:
        gc.enable()
