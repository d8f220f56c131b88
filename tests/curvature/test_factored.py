"""Rows of the Jacobian kept in factored form: equal to passes through the network, and refused where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ritz.curvature import (
    GGN,
    NTK,
    BinaryCrossEntropy,
    CrossEntropy,
    EmpiricalFisher,
    Fisher,
    Jacobian,
    MonteCarloFisher,
    SquaredError,
)
from ritz.curvature.data_operator import FEW_COLUMNS
from ritz.curvature.factored import Factored

from .layered import CASES as ALL
from .layered import made

CASES = [name for name in ALL if name != "norm between"]  # whose parameters have no rows
DOUBLE = {"dtype": torch.float64}


def is_factored(A: Any) -> bool:
    A @ torch.zeros(A.shape[1], FEW_COLUMNS, dtype=A.dtype)
    return all(isinstance(A._kept.get(i), Factored) for i in range(len(A.batches)))


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_network(name):
    model, x, y = made(name)
    for make in (
        lambda **o: GGN(model, CrossEntropy(), None, (x, y), **o),
        lambda **o: GGN(model, SquaredError(2.0), None, (x, torch.zeros(0)), reduction="sum", **o),
        lambda **o: Fisher(model, CrossEntropy(), None, (x, y), kind=EmpiricalFisher(), **o),
        lambda **o: Fisher(model, CrossEntropy(), None, (x, y), kind=MonteCarloFisher(2), **o),
        lambda **o: GGN(model, CrossEntropy(), None, (x, y), micro_batch=2, **o),
        lambda **o: Jacobian(model, None, None, x, **o),
        lambda **o: Jacobian(model, None, None, x, sum_outputs=True, **o),
        lambda **o: NTK(model, None, None, x, micro_batch=3, **o),
    ):
        fast, slow = make(), make(keep_bytes=0)
        assert is_factored(fast) and not is_factored(slow)
        V = torch.randn(fast.shape[1], 9, **DOUBLE)
        torch.testing.assert_close(fast @ V, slow @ V)
        torch.testing.assert_close(fast @ V[:, 0], slow @ V[:, 0])
        W = torch.randn(fast.shape[0], 9, **DOUBLE)
        torch.testing.assert_close(fast.mH @ W, slow.mH @ W)


@pytest.mark.parametrize("params", ["0.weight", "0.bias", ["2.weight", "0.bias"], "2"])
def test_subsets(params):
    model, x, y = made("linear")
    fast = GGN(model, CrossEntropy(), params, (x, y))
    slow = GGN(model, CrossEntropy(), params, (x, y), keep_bytes=0)
    assert is_factored(fast)
    torch.testing.assert_close(fast.to_dense(), slow.to_dense())


class Mixing(nn.Module):
    """Examples see each other, as in a graph network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5, **DOUBLE), nn.Linear(5, 3, **DOUBLE)
        self.A = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.A @ torch.tanh(self.first(self.A @ x)))


def test_what_has_no_such_form_is_found_out():
    _, x, y = made("linear")
    normed = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    grouped = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3)).double()
    for model, inputs in ((Mixing(), x), (normed, x), (grouped, x.reshape(6, 2, 2))):
        A = GGN(model, CrossEntropy(), None, (inputs, y))
        assert not is_factored(A)
        want = GGN(model, CrossEntropy(), None, (inputs, y), keep_bytes=0)
        torch.testing.assert_close(A.to_dense(), want.to_dense())
    by_function = GGN(lambda p, z: z @ p, CrossEntropy(), torch.randn(4, 3, **DOUBLE), (x, y))
    assert not is_factored(by_function)


def test_memory_bounds_it_and_few_columns_do_not_pay_for_it():
    model, x, y = made("linear")
    A = GGN(model, CrossEntropy(), None, (x, y), micro_batch=2)
    A @ torch.ones(A.shape[0], FEW_COLUMNS - 1, **DOUBLE)
    assert not any(isinstance(at, Factored) for at in A._kept.values())
    A @ torch.ones(A.shape[0], **DOUBLE)
    assert all(isinstance(at, Factored) for at in A._kept.values())
    assert A._kept_bytes == sum(at.bytes for at in A._kept.values())
    one = A._kept[0].bytes
    B = GGN(model, CrossEntropy(), None, (x, y), micro_batch=2, keep_bytes=one)  # room for one batch of three
    V = torch.randn(A.shape[0], 10, **DOUBLE)
    torch.testing.assert_close(B @ V, A @ V)
    assert B._kept_bytes <= one


def test_many_outputs_go_through_the_network():
    torch.manual_seed(0)
    model, x = nn.Linear(2, 300, **DOUBLE), torch.randn(3, 2, **DOUBLE)
    A = GGN(model, BinaryCrossEntropy(), None, (x, torch.ones(3, 300, **DOUBLE)))
    assert not is_factored(A)


@pytest.mark.parametrize("name", ["convolutions", "sequence"])
def test_bytes_are_those_of_the_memory_that_is_held(name):
    """What rows were made of goes with them: a slice of it would hold all of it."""
    model, x, y = made(name)
    A = GGN(model, CrossEntropy(), None, (x, y))
    assert is_factored(A)
    held = {}
    for block in A._kept[0].blocks:
        for t in vars(block).values():
            if isinstance(t, Tensor):
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    assert sum(held.values()) <= A._kept_bytes
