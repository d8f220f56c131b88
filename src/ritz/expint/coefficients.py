"""Coefficients of differential operators: numbers, tensors on a grid or functions of position, read and checked."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DomainError, NonFiniteError, OperandError
from ..numerics import check_finite, refuse_vmap
from .grid import Grid


class Precision(NamedTuple):
    """Dtypes and device of an operator."""

    real: torch.dtype  # of the coefficients
    vectors: torch.dtype  # the same, or its complex companion
    device: torch.device


def precision(given: Sequence[Any], dtype: torch.dtype | None, device: torch.device | str | None) -> Precision:
    """Dtypes and device by the tensors among ``given`` (the parameters of modules count), else by the arguments."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    tensors += [p for x in given if isinstance(x, nn.Module) for p in x.parameters()]
    if tensors:
        real = tensors[0].dtype
        where = tensors[0].device if device is None else torch.device(device)
    else:
        real = (dtype or torch.get_default_dtype()).to_real()
        where = torch.device("cpu" if device is None else device)
    if not real.is_floating_point:
        raise OperandError(f"a coefficient is {real}; expected a real floating-point dtype: convert it with .to(...)")
    vectors = real if dtype is None else dtype
    if vectors.to_real() != real:
        raise OperandError(
            f"dtype={dtype} came with a coefficient in {real}; expected {real} or {real.to_complex()}: convert one"
        )
    return Precision(real, vectors, where)


def as_tensor(value: Any, name: str, like: Precision) -> Tensor:
    """A number or a tensor as a finite tensor that fits."""
    if isinstance(value, numbers.Real):
        value = torch.tensor(float(value), dtype=like.real, device=like.device)
    if not isinstance(value, Tensor):
        raise OperandError(f"{name} is a {type(value).__name__}; expected a real number, a tensor, or a callable")
    if value.dtype != like.real or value.device != like.device:
        raise OperandError(
            f"{name} is {value.dtype} on {value.device}; the operator's coefficients are {like.real} on {like.device}: "
            "convert one with .to(...)"
        )
    check_finite(value.detach(), name)
    return value


def node_field(value: Any, name: str, grid: Grid, like: Precision) -> Tensor:
    """A coefficient at the nodes: a tensor of no dimension, or of the grid's shape."""
    if callable(value) and not isinstance(value, Tensor):
        points = grid.coordinates(dtype=like.real, device=like.device)
        return evaluate(value, points, name, like).reshape(grid.shape)
    field = as_tensor(value, name, like)
    if field.ndim and field.shape != grid.shape:
        raise OperandError(
            f"{name} has shape {tuple(field.shape)}; expected a number, or one value a node in the grid's shape "
            f"{grid.shape}"
        )
    return field


def evaluate(function: Callable[[Tensor], Any], points: Tensor, name: str, like: Precision) -> Tensor:
    """A function of position at (m, ndim) points, (m,)."""
    values = function(points)
    m = points.shape[0]
    if not isinstance(values, Tensor) or tuple(values.shape) not in ((m,), (m, 1)):
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise OperandError(f"{name} returned {got} at {m} points {tuple(points.shape)}; expected ({m},) or ({m}, 1)")
    return as_tensor(values.reshape(m), name, like)


def refuse_negative(value: Tensor, name: str, what: str) -> None:
    """Raise where a coefficient is negative or not finite."""
    refuse_vmap(value, name)
    smallest = float(value.detach().min()) if value.numel() else 0.0
    if smallest >= 0:
        return
    if smallest != smallest:
        raise NonFiniteError(f"{name} has NaN; expected finite numbers: check the step that made it")
    raise DomainError(
        f"negative {what}: {name} has {int((value.detach() < 0).sum())} negative among {value.numel()} values, the "
        f"smallest {smallest:.3g}; expected >= 0: parametrise it through exp or softplus"
    )


def face_values(c: Tensor, grid: Grid, axis: int, harmonic: bool) -> Tensor:
    """A coefficient given at the nodes, at the faces across an axis: the mean of both sides, at a border its node's."""
    if c.ndim == 0:
        return c.expand(grid.face_shape(axis))
    n, border = grid.shape[axis], grid.border[axis]
    a, b = c.narrow(axis, 0, n - 1), c.narrow(axis, 1, n - 1)
    if border == "periodic":
        a, b = c, c.roll(-1, axis)
    inside = 2 * a * b / (a + b).clamp_min(torch.finfo(c.dtype).tiny) if harmonic else (a + b) / 2
    if border != "dirichlet":
        return inside
    return torch.cat([c.narrow(axis, 0, 1), inside, c.narrow(axis, n - 1, 1)], axis)


def check_grid(grid: Any) -> None:
    """Raise unless this is a :class:`Grid`."""
    if not isinstance(grid, Grid):
        raise OperandError(f"grid is a {type(grid).__name__}; expected a Grid, as in Grid((64, 64), border='periodic')")
