"""The report: every parameter once, with the bytes that its state really has."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.optim.problems import OPTIMIZERS, Net, train
from torch import Tensor, nn

from ritz.operators.structured import BlockDiagonal, Diagonal, Hierarchical, LowerToeplitz, UpperTriangular
from ritz.optim import KFAC, SINGD

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no momentum": {"momentum": 0.0},
    "curvature in float32": {"curvature_dtype": torch.float32},
}


def real_bytes(optimizer: torch.optim.Optimizer) -> int:
    found = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.element_size() for v in found)


def covered(optimizer: Any) -> Counter[str]:
    """The parameters that the rows speak of; "x.weight + bias" is two of them."""
    names: Counter[str] = Counter()
    for row in optimizer.report().rows:
        name, _, bias = row.name.partition(" + ")
        names[name] += 1
        if bias:
            names[name.removesuffix("weight") + bias] += 1
    return names


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_bytes_after_two_steps(name, settings, dtype):
    model = Net(dtype=dtype)
    optimizer = OPTIMIZERS[name](model, 0.01, update_interval=1, **SETTINGS[settings])
    promised = optimizer.report().state_bytes
    train(model, optimizer, 2)
    assert optimizer.report().state_bytes == promised == real_bytes(optimizer)
    assert covered(optimizer) == Counter(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("structure", [BlockDiagonal(4), LowerToeplitz(), UpperTriangular(), Hierarchical(2, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_bytes_of_structures(structure, alpha):
    model = Net()
    optimizer = SINGD(model, 0.01, structures=structure, riemannian_momentum=alpha)
    train(model, optimizer, 2)
    assert optimizer.report().state_bytes == real_bytes(optimizer)


def test_rules_and_reasons():
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 6).double()
            self.tied = nn.Linear(6, 6, bias=False).double()
            self.tied.weight = self.inner[0].weight

    model = Model()
    rows = SINGD(model, structures=Diagonal()).report().rows
    assert {row.name: (row.rule, row.structures, row.shape) for row in rows} == {
        "first.weight + bias": ("linear", "diagonal; diagonal", "6 × 6"),
        "norm.weight": ("diagonal", "—", "6"),
        "norm.bias": ("diagonal", "—", "6"),
        "inner.0.weight": ("linear", "diagonal; diagonal", "6 × 6"),
        "inner.0.bias": ("diagonal", "—", "6"),
        "inner.1.weight + bias": ("linear", "diagonal; diagonal", "6 × 7"),
        "head.weight": ("linear", "diagonal; diagonal", "3 × 6"),
        "table.weight": ("embedding", "diagonal; diagonal", "6 × 4"),
        "mix": ("AdamW: Model.mix has no rule", "—", "6 × 6"),
    }


def test_the_table():
    optimizer = KFAC(Net(), 0.01)
    lines = str(optimizer.report()).splitlines()
    assert lines[0].split()[:2] == ["parameter", "rule"]
    assert lines[2].startswith("first.weight + bias") and lines[2].endswith("864 B")  # (6·6 + 6·6 + 6·6)·8
    assert lines[-1].startswith("total") and f"{optimizer.report().state_bytes} B" in lines[-1]
    assert len(lines) == 2 + len(optimizer.report().rows) + 1


def test_cached_products_are_counted_apart():
    model = Net()
    optimizer = SINGD(model, 0.01, row_form=False)
    assert optimizer.cache_bytes() == 0
    train(model, optimizer, 1)
    sizes = [layer.sizes for layer in optimizer._layers]
    assert optimizer.cache_bytes() == 8 * sum(a * a + b * b for a, b in sizes)
