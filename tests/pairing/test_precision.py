"""Autocast, and precision that belongs to the process."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.pairing.common import N, W, only_pairing, operator, randn, rows

import ritz
from ritz.errors import TransformError
from ritz.numerics import full_precision
from ritz.operators import Dense
from ritz.pairing import Cotangents, Pair, Run

# torch.jit.script is what PyTorch itself imports on the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def test_the_callable_runs_under_the_users_autocast_and_own_numerics_do_not():
    weight = torch.randn(N, N, requires_grad=True)
    states = []

    def fn(x):
        states.append(torch.is_autocast_enabled("cpu"))
        return weight @ x

    A = ritz.aslinearoperator(fn, shape=N)
    inside = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Run(A) as run:
            Y = run.matmat(torch.ones(N, 2))
            inside.append(torch.is_autocast_enabled("cpu"))
            inside.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        rule = lambda g: (inside.append(torch.is_autocast_enabled("cpu")), Cotangents([Pair(g * Y)], []))[1]
        (value,) = run.attach([Y.square().sum() / 2], rule, [torch.ones(N, 2)], name="half a square")
        assert torch.is_autocast_enabled("cpu")
    value.backward()
    assert run.bound.deferrable  # autocast's cached cast of the weight, left by the probe, must not hide the weight
    assert inside == [False, torch.float32, False]
    assert len(states) > 3 and all(states)  # the probe, the product, the pairing in backward
    expected = weight.detach().bfloat16().float() @ torch.ones(N, 2)
    torch.testing.assert_close(Y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad, (Y @ torch.ones(2, N)), rtol=2e-2, atol=2e-2)


def test_own_numerics_in_a_backward_pass_that_runs_inside_autocast():
    theta = torch.randn(N, requires_grad=True)
    inside = []
    with Run(ritz.aslinearoperator(lambda x: rows(theta, x), shape=N)) as run:
        Y = run.matmat(torch.ones(N, 2))
    rule = lambda g: (inside.append(torch.is_autocast_enabled("cpu")), Cotangents([Pair(g * Y)], []))[1]
    (value,) = run.attach([Y.sum()], rule, [torch.ones(N, 2)], name="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value.backward()
    assert inside == [False]


def test_a_product_taken_under_no_grad_inside_autocast_does_not_cost_the_gradient():
    """Autocast caches casts of parameters; one made without a graph must not be found again."""
    weight = torch.randn(N, N, requires_grad=True)
    A = ritz.aslinearoperator(lambda x: weight @ x, shape=N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            A @ torch.ones(N)
        only_pairing(A, torch.ones(N, 3)).backward()
    assert weight.grad is not None and bool(weight.grad.any())


def test_a_closure_may_open_its_own_autocast_region_and_use_ritz_in_there():
    states = []
    inner = ritz.aslinearoperator(lambda x: (states.append(torch.is_autocast_enabled("cpu")), 2 * x)[1], shape=N)

    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with Run(inner) as run:
                return run.matmat(x.reshape(N, -1)).reshape(x.shape)

    with Run(ritz.aslinearoperator(fn, shape=N)) as run:
        run.matmat(torch.ones(N, 1))
    assert states == [True]


def test_own_products_do_not_follow_autocast():
    M = torch.randn(N, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Dense(M, hermitian=False) @ torch.ones(N)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, M.sum(1))


def _precision() -> tuple:
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    return (torch.get_float32_matmul_precision(),)


@pytest.fixture
def low_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield _precision()
    torch.set_float32_matmul_precision(before)


def test_state_is_restored_after_an_exception(low_precision):
    def fn(x):
        raise ValueError("from the callable")

    with pytest.raises(ValueError, match="from the callable"):
        with torch.autocast("cpu", dtype=torch.bfloat16), Run(operator(fn, block=True)) as run:
            assert _precision() != low_precision
            run.matmat(randn(N, 2))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert _precision() == low_precision
    assert ritz.numerics._outer_autocast.get() is None
    assert torch.overrides._len_torch_function_stack() == 0


def test_state_is_restored_when_entering_is_refused(low_precision):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(randn(N), randn(N))
        with pytest.raises(TransformError), Run(Dense(W), dual):
            pass
    assert torch.is_grad_enabled() and _precision() == low_precision


def test_threads_do_not_take_each_others_precision_for_the_users(low_precision):
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with full_precision():
            first_in.set()
            second_in.wait(5)
        first_out.set()

    def second():
        first_in.wait(5)
        with full_precision():
            second_in.set()
            first_out.wait(5)
            seen.append(_precision())

    threads = [threading.Thread(target=t) for t in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen[0] != low_precision  # the second still computes in full precision
    assert _precision() == low_precision
