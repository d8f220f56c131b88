"""The data behind a curvature operator: one batch, or a loader that is read once, in micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError


@dataclass(frozen=True)
class Batch:
    """Inputs and targets; ``size`` examples."""

    x: Any
    y: Any
    size: int


def read(data: Any, micro_batch: int | None, *, targets: bool = True) -> list[Batch]:
    """Batches from what a user has.

    Args:
        data: (x, y), or an iterable of such pairs (a DataLoader), which is read once and kept: a loader that shuffles
            or augments would make every product one of another matrix. Without ``targets`` inputs alone are taken too.
        micro_batch: examples at a time; None leaves batches as they are.
    """
    if isinstance(data, Tensor) and not targets:
        pairs: list[Any] = [(data, None)]
    elif isinstance(data, (tuple, list) if targets else tuple) and len(data) == 2 and _is_pair(data):
        pairs = [tuple(data)]
    elif isinstance(data, Iterable) and not isinstance(data, (Tensor, str, dict)):
        pairs = [_pair(item, targets) for item in data]
    else:
        raise OperandError(
            f"data is a {type(data).__name__}; expected a pair (inputs, targets), or a DataLoader or list of pairs"
        )
    if not pairs:
        raise OperandError("data holds no batch; expected at least one")
    batches = [Batch(x, y, _size(x, y)) for x, y in pairs]
    if any(b.size == 0 for b in batches):
        raise OperandError("data has an empty batch; drop it")
    if micro_batch is None:
        return batches
    return [piece for batch in batches for piece in _pieces(batch, micro_batch)]


def _is_pair(data: Any) -> bool:
    """(inputs, targets), and not two batches."""
    return not (isinstance(data[0], (tuple, list)) and len(data[0]) == 2 and isinstance(data[1], (tuple, list)))


def _pair(item: Any, targets: bool) -> tuple[Any, Any]:
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    if not targets:
        return item[0] if isinstance(item, (tuple, list)) and len(item) == 1 else item, None
    raise OperandError(
        f"a batch is a {type(item).__name__}; expected a pair (inputs, targets): wrap the loader in a generator that "
        "yields pairs"
    )


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_of(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_of(item)


def _size(x: Any, y: Any) -> int:
    first = next((t for t in tensors_of((x, y)) if t.ndim), None)
    if first is None:
        raise OperandError("a batch holds no tensor with a leading dimension of examples")
    return first.shape[0]


def narrow(tree: Any, start: int, length: int, size: int) -> Any:
    """Examples start … start + length of every tensor whose leading dimension counts examples."""
    if isinstance(tree, Tensor):
        return tree.narrow(0, start, length) if tree.ndim and tree.shape[0] == size else tree
    if isinstance(tree, dict):
        return {k: narrow(v, start, length, size) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return _like(tree, [narrow(v, start, length, size) for v in tree])
    return tree


def _like(tree: Any, items: list[Any]) -> Any:
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def _pieces(batch: Batch, length: int) -> Iterator[Batch]:
    for start in range(0, batch.size, length):
        n = min(length, batch.size - start)
        yield Batch(narrow(batch.x, start, n, batch.size), narrow(batch.y, start, n, batch.size), n)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the parameters are."""
    return Batch(_moved(batch.x, device), _moved(batch.y, device), batch.size)


def _moved(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {k: _moved(v, device) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return _like(tree, [_moved(v, device) for v in tree])
    return tree
