"""Nested containers of tensors as one vector, and back: how parameters of a network become an operator's operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import OperandError


def ravel(tree: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Flatten a nested dict, list or tuple of tensors into one vector.

    Args:
        tree: tensors of one dtype and device in dicts (in insertion order), lists, tuples or named tuples.

    Returns:
        The vector (n,), and ``unravel``, which maps a vector (n,) back to the structure. Both are differentiable.

    Raises:
        OperandError: something that is not a tensor or a container, tensors of several dtypes or devices, no tensor at
            all; from ``unravel``, a vector of another length.

    Example:
        >>> import torch
        >>> vector, unravel = ravel({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
        >>> vector
        tensor([1., 1., 1., 1., 0., 0.])
        >>> unravel(2 * vector)["weight"]
        tensor([[2., 2.],
                [2., 2.]])
    """
    leaves: list[Tensor] = []
    _collect(tree, leaves)
    if not leaves:
        raise OperandError("ravel got no tensor; expected a tensor, or a dict, list or tuple with tensors in it")
    kinds = {(t.dtype, t.device) for t in leaves}
    if len(kinds) > 1:
        raise OperandError(f"ravel got tensors of several dtypes or devices ({kinds}); convert them to one")
    vector = torch.cat([t.reshape(-1) for t in leaves])

    def unravel(x: Tensor) -> Any:
        if x.shape != vector.shape:
            raise OperandError(f"unravel got a tensor of shape {tuple(x.shape)}; expected {tuple(vector.shape)}")
        parts = iter(x.split([t.numel() for t in leaves]))
        return _rebuild(tree, parts)

    return vector, unravel


def _collect(tree: Any, leaves: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        leaves.append(tree)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(item, leaves)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _collect(item, leaves)
    else:
        raise OperandError(f"ravel met a {type(tree).__name__}; expected tensors in dicts, lists and tuples")


def _rebuild(tree: Any, parts: Any) -> Any:
    if isinstance(tree, Tensor):
        return next(parts).reshape(tree.shape)
    if isinstance(tree, dict):
        return {key: _rebuild(item, parts) for key, item in tree.items()}
    items = [_rebuild(item, parts) for item in tree]
    if isinstance(tree, tuple):
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return items
