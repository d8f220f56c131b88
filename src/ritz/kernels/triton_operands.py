"""Coordinates and vectors as the Triton kernels read them: scaled, laid out, padded by zeros to whole blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .distances import Coordinates
from .triton_plan import DOT, SPLIT, Recipe, distance, padded, width


class Operands(NamedTuple):
    """Scaled coordinates of rows and columns; strides are between points (DOT), or between coordinates (else)."""

    U: Tensor
    V: Tensor
    NU: Tensor  # ½‖w‖² (DOT), else a stand-in
    NV: Tensor
    stride_u: int
    stride_v: int
    distance: int
    Q: int
    chunk: int

    def swapped(self) -> Operands:
        """Rows for columns."""
        return self._replace(U=self.V, V=self.U, NU=self.NV, NV=self.NU, stride_u=self.stride_v, stride_v=self.stride_u)


def operands(recipe: Recipe, points: Coordinates, dtype: torch.dtype, block: int) -> Operands:
    """The operands, both sides padded to whole blocks."""
    q = points.U.shape[1]
    how = distance(points.U.dtype != dtype, dtype, q)
    if how != DOT:
        U = _by_coordinate(points.U * recipe.factor, how, dtype, block)
        V = _by_coordinate(points.V * recipe.factor, how, dtype, block)
        return Operands(U, V, U, V, U.shape[1], V.shape[1], how, q, 0)
    chunk = width(q)
    U, V = (
        pad(P * (recipe.factor * math.sqrt(2.0)), padded(P.shape[0], block), padded(q, chunk))
        for P in (points.U, points.V)
    )
    # The norms of what is multiplied, rounding included, or the diagonal's neighbours would not be near 0.
    NU, NV = (P.double().square().sum(1).mul_(0.5).to(dtype) for P in (U, V))
    return Operands(U, V, NU, NV, U.shape[1], V.shape[1], how, U.shape[1], chunk)


def _by_coordinate(P: Tensor, how: int, dtype: torch.dtype, block: int) -> Tensor:
    """(q, n) from (n, q), or (2q, n) with each coordinate as a rounded number and the rest."""
    if how == SPLIT:
        head = P.to(dtype)
        P = torch.stack([head, (P - head.double()).to(dtype)], 2).flatten(1)
    return pad(P.mT, P.shape[1], padded(P.shape[0], block))


def pad(P: Tensor, rows: int, columns: int) -> Tensor:
    """P in the upper left corner of zeros (rows, columns), contiguous."""
    out = torch.zeros(rows, columns, dtype=P.dtype, device=P.device)
    out[: P.shape[0], : P.shape[1]] = P
    return out


def with_ones(P: Tensor, factor: float, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Scaled coordinates as rows, then a row of ones, then zeros: (rows, columns) from (n, q)."""
    out = torch.zeros(rows, columns, dtype=dtype, device=P.device)
    n, q = P.shape
    out[:q, :n] = P.mT * factor
    out[q, :n] = 1.0
    return out
