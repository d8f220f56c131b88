"""Anisotropic coefficients: a symmetric tensor at every node, K of shape (ndim, ndim, *grid.shape)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DomainError, NonFiniteError, OperandError
from ..numerics import refuse_vmap
from .bands import Key, Region, make_link
from .grid import Grid

Components = list[list[Tensor]]  # K[a][b], fields of the grid's shape


def components(K: Tensor) -> Components:
    """The fields of the symmetric part of K; one node of a graph for all, in place of one for every entry."""
    rows = [row.unbind(0) for row in K.unbind(0)]
    axes = range(len(rows))
    return [[rows[a][a] if a == b else (rows[a][b] + rows[b][a]) / 2 for b in axes] for a in axes]


def eliminate(K: Components, axis: int) -> Components:
    """K with the gradient along ``axis`` left free: its Schur complement, zero in that row and column."""
    pivot = K[axis][axis].clamp_min(torch.finfo(K[axis][axis].dtype).tiny)
    axes = range(len(K))
    return [[K[a][b] - K[a][axis] * K[axis][b] / pivot for b in axes] for a in axes]


def at_borders(K: Components, kept: tuple[int, int], grid: Grid, axes: Sequence[int] | None = None) -> Tensor:
    """Entry ``kept`` of K, averaged over the two sides of every other axis, of which a border without flux frees one.

    In the half of a border cell that faces the border, K∇u has no component across it, which determines the
    derivative in that direction: the energy of the rest is that of the Schur complement. ``axes`` are those that
    remain to be averaged.
    """
    if axes is None:
        axes = [a for a in range(grid.ndim) if a not in kept and grid.border[a] == "neumann"]
    if not axes:
        return K[kept[0]][kept[1]]
    axis, *rest = axes
    n, inside = grid.shape[axis], at_borders(K, kept, grid, rest)

    def end(i: int) -> Tensor:
        edge = [[x.narrow(axis, i, 1) for x in row] for row in K]
        freed = at_borders(eliminate(edge, axis), kept, grid, rest)
        return freed if n == 1 else (inside.narrow(axis, i, 1) + freed) / 2

    return end(0) if n == 1 else torch.cat([end(0), inside.narrow(axis, 1, n - 2), end(n - 1)], axis)


def refuse_indefinite(K: Tensor, name: str) -> None:
    """Raise unless K is symmetric positive semidefinite at every node, up to rounding."""
    refuse_vmap(K, name)
    K = K.detach()
    size = float(K.abs().max())
    if size != size:
        raise NonFiniteError(f"{name} has NaN; expected finite numbers: check the step that made it")
    tolerance = 16 * torch.finfo(K.dtype).eps
    if float((K - K.transpose(0, 1)).abs().max()) > tolerance * size:
        raise OperandError(f"{name}[a, b] and {name}[b, a] differ; expected a symmetric tensor: use (K + Kᵀ)/2")
    part, trace = components(K), K.diagonal(dim1=0, dim2=1).sum(-1)
    for axis in range(K.shape[0]):  # the pivots of a factorisation
        low = part[axis][axis] < -tolerance * trace
        if bool(low.any()):
            raise DomainError(
                f"negative diffusion: {name} is not positive semidefinite at {int(low.sum())} of {low.numel()} nodes; "
                "expected K = L Lᵀ: parametrise it through a Cholesky factor"
            )
        part = eliminate(part, axis)


class Crossing(NamedTuple):
    """What a mixed coefficient K_ab at some nodes adds to a link, or to the ground: −(D_a u) K_ab (D_b u) taken apart.

    With the neighbours x, y along a and z, w along b, (x − y)(z − w) is half of (x − w)² + (y − z)² − (x − z)² −
    (y − w)², so that a mixed term adds to and takes from weights of links like any other.
    """

    axes: tuple[int, int]
    sign: int
    node: Region
    link: int | None  # None: one end lies on a Dirichlet border
    where: Region


def crossings(grid: Grid, keys: list[Key]) -> list[Crossing]:
    """All contributions of mixed coefficients; appends the keys of diagonal neighbours that they need."""
    everywhere = [slice(0, n) for n in grid.shape]
    out = []
    for a in range(grid.ndim):
        for b in range(a + 1, grid.ndim):
            pairs = [(s, t, x, z) for s in (1, -1) for t in (1, -1) for x in grid.steps(a, s) for z in grid.steps(b, t)]
            for s, t, x, z in pairs:
                node, along_a, along_b = list(everywhere), list(everywhere), list(everywhere)
                node[a], node[b] = along_b[a], along_a[b] = x.here, z.here
                moved_out = [x.there is None, z.there is None]
                if all(moved_out) or not (x.moved or z.moved):
                    continue
                if any(moved_out):
                    if x.there is not None:
                        along_a[a] = x.there
                    if z.there is not None:
                        along_b[b] = z.there
                    end = along_b if moved_out[0] else along_a
                    out.append(Crossing((a, b), -s * t, tuple(node), None, tuple(end)))
                    continue
                assert x.there is not None and z.there is not None
                along_a[a], along_b[b] = x.there, z.there
                steps = {a: (-x.moved, x.wraps), b: (z.moved, z.wraps)}  # from along_a to along_b
                tail = along_a
                if (steps[a][0] or steps[b][0]) < 0:
                    steps, tail = {axis: (-move, wraps) for axis, (move, wraps) in steps.items()}, along_b
                key = tuple(steps.get(axis, (0, False)) for axis in range(grid.ndim))
                if key not in keys:
                    keys.append(key)
                first = make_link(grid, key).tail
                where = tuple(slice(r.start - f.start, r.stop - f.start) for r, f in zip(tail, first))
                out.append(Crossing((a, b), -s * t, tuple(node), keys.index(key), where))
    return out
