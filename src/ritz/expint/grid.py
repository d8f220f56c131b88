"""Tensor-product grids in one, two or three dimensions: where the unknowns sit, and what lies beyond the border."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OperandError

BORDERS = ("dirichlet", "neumann", "periodic")


class Step(NamedTuple):
    """Nodes of one axis that have a neighbour in one direction, and that neighbour."""

    here: slice
    there: slice | None  # None: on the border, where the value is zero
    moved: int  # -1 or 1; 0 where the border mirrors the node itself
    wraps: bool  # across a periodic border


@dataclass(frozen=True)
class Grid:
    """A grid of shape (n₁, …, n_d), d = 1, 2 or 3, whose vectors are flattened row by row: ``u.reshape(grid.shape)``.

    Args:
        shape: number of unknowns along every axis; one number for a grid in one dimension.
        lengths: extent of the domain [0, L] along every axis; one number for all. None is 1.
        spacing: distance h of neighbouring nodes, in place of ``lengths``; one number for all axes, or one each.
        border: one of three words for all axes, or one each.
            "dirichlet": zero on the border; the unknowns are the interior nodes (i + 1)·h, h = L/(n + 1).
            "neumann": no flux; the unknowns are the cell centres (i + ½)·h, h = L/n.
            "periodic": the unknowns are i·h, h = L/n.

    After construction ``lengths``, ``spacing`` and ``border`` are tuples that agree with each other.

    Raises:
        OperandError: what is not a grid.

    Example:
        >>> grid = Grid((3, 4), lengths=(2.0, 1.0), border=("dirichlet", "neumann"))
        >>> grid.size, grid.h
        (12, (0.5, 0.25))
    """

    shape: tuple[int, ...]
    _: KW_ONLY
    lengths: Any = None
    spacing: Any = None
    border: Any = "neumann"

    def __post_init__(self) -> None:
        shape = self.shape if isinstance(self.shape, Sequence) else (self.shape,)
        if not 1 <= len(shape) <= 3 or not all(isinstance(n, numbers.Integral) and n >= 1 for n in shape):
            raise OperandError(f"a grid got the shape {self.shape!r}; expected one, two or three integers >= 1")
        shape = tuple(int(n) for n in shape)
        border = tuple(self.border) if isinstance(self.border, (list, tuple)) else (self.border,) * len(shape)
        if len(border) != len(shape) or any(b not in BORDERS for b in border):
            raise OperandError(
                f"a grid of shape {shape} got border={self.border!r}; expected 'dirichlet', 'neumann' or 'periodic', "
                "one for all axes or one each"
            )
        gaps = [n + 1 if b == "dirichlet" else n for n, b in zip(shape, border)]
        if self.spacing is None:
            lengths = _positive(1.0 if self.lengths is None else self.lengths, "lengths", shape)
            spacing = tuple(L / gap for L, gap in zip(lengths, gaps))
        else:
            spacing = _positive(self.spacing, "spacing", shape)
            lengths = tuple(h * gap for h, gap in zip(spacing, gaps))
            given = lengths if self.lengths is None else _positive(self.lengths, "lengths", shape)
            if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(given, lengths)):
                raise OperandError(
                    f"a grid of shape {shape} got lengths={self.lengths!r} and spacing={self.spacing!r}, which would "
                    f"make lengths of {lengths}; expected one of the two (of a grid by dataclasses.replace, None for "
                    "the other one)"
                )
        for name, value in (("shape", shape), ("border", border), ("lengths", lengths), ("spacing", spacing)):
            object.__setattr__(self, name, value)

    @property
    def size(self) -> int:
        """Number of unknowns."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def h(self) -> tuple[float, ...]:
        """Distance of neighbouring nodes along every axis."""
        return self.spacing  # type: ignore[no-any-return]

    def coordinates(self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Positions of the unknowns, (size, ndim), in the order of the flattened vectors."""
        return self._points([self._nodes(axis) for axis in range(self.ndim)], dtype, device)

    def face_shape(self, axis: int) -> tuple[int, ...]:
        """Shape of an array with one value for every face across ``axis`` through which something may flow.

        Dirichlet: n + 1, both borders included. Neumann: the n − 1 inside. Periodic: n, face i between i and i + 1.
        """
        n = self.shape[axis] + {"dirichlet": 1, "neumann": -1, "periodic": 0}[self.border[axis]]
        return (*self.shape[:axis], n, *self.shape[axis + 1 :])

    def faces(self, axis: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Midpoints of the faces across ``axis``, (m, ndim), in the order of an array of :meth:`face_shape`."""
        count, first = self.face_shape(axis)[axis], {"dirichlet": 0.5, "neumann": 1.0, "periodic": 0.5}
        nodes = [self._nodes(a) for a in range(self.ndim)]
        start = first[self.border[axis]]
        nodes[axis] = (torch.arange(count, dtype=torch.float64) + start) * self.h[axis]
        return self._points(nodes, dtype, device)

    def steps(self, axis: int, direction: int) -> list[Step]:
        """The nodes along ``axis`` split into those whose neighbour lies inside, and the one at the border."""
        n, border = self.shape[axis], self.border[axis]
        low, high, first, last = slice(0, n - 1), slice(1, n), slice(0, 1), slice(n - 1, n)
        inside, edge, opposite = (low, last, first) if direction > 0 else (high, first, last)
        beyond = {"dirichlet": None, "neumann": edge, "periodic": opposite}[border]
        return [
            Step(inside, high if direction > 0 else low, direction, False),
            Step(edge, beyond, 0 if border == "neumann" else direction, border == "periodic"),
        ]

    def _nodes(self, axis: int) -> Tensor:
        start = {"dirichlet": 1.0, "neumann": 0.5, "periodic": 0.0}[self.border[axis]]
        return (torch.arange(self.shape[axis], dtype=torch.float64) + start) * self.h[axis]

    def _points(self, nodes: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
        mesh = torch.meshgrid(*nodes, indexing="ij")
        points = torch.stack([x.reshape(-1) for x in mesh], 1)
        return points.to(dtype=dtype or torch.get_default_dtype(), device=device)


def _positive(value: Any, name: str, shape: tuple[int, ...]) -> tuple[float, ...]:
    values = (value,) * len(shape) if isinstance(value, numbers.Real) else value
    known = isinstance(values, Sequence) and all(isinstance(v, numbers.Real) for v in values)
    if not known or len(values) != len(shape) or not all(0 < float(v) < math.inf for v in values):
        raise OperandError(
            f"a grid of shape {shape} got {name}={value!r}; expected a positive number, or {len(shape)} of them"
        )
    return tuple(float(v) for v in values)
