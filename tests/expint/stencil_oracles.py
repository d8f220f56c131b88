"""Matrices of differential operators by loops over nodes, written from the definitions; differentiable in torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ritz.expint.grid import Grid

D = torch.float64
Node = tuple[int, ...]


def nodes(grid: Grid) -> list[Node]:
    return list(itertools.product(*(range(n) for n in grid.shape)))


def neighbour(grid: Grid, i: Node, axis: int, direction: int) -> Node | str:
    """The next node, or what stands in its place: "zero" or "itself"."""
    j = list(i)
    j[axis] += direction
    if 0 <= j[axis] < grid.shape[axis]:
        return tuple(j)
    if grid.border[axis] == "periodic":
        j[axis] %= grid.shape[axis]
        return tuple(j)
    return "zero" if grid.border[axis] == "dirichlet" else "itself"


def unit(grid: Grid, i: Node | str, instead: Node) -> Tensor:
    """The row that reads the value at a node."""
    row = torch.zeros(grid.size, dtype=D)
    i = instead if i == "itself" else i
    if i != "zero":
        row[nodes(grid).index(i)] = 1
    return row


def position(grid: Grid, i: Node) -> list[float]:
    start = {"dirichlet": 1.0, "neumann": 0.5, "periodic": 0.0}
    return [(k + start[b]) * h for k, b, h in zip(i, grid.border, grid.h)]


def arithmetic(a: Tensor, b: Tensor) -> Tensor:
    return (a + b) / 2


def harmonic(a: Tensor, b: Tensor) -> Tensor:
    return 2 / (1 / a + 1 / b)


def diffusion_of_nodes(grid: Grid, c: list[Tensor], mean: Callable = arithmetic) -> Tensor:
    """∇·(c∇u) from node values c[axis] of the grid's shape."""
    A = torch.zeros(grid.size, grid.size, dtype=D)
    for row, i in enumerate(nodes(grid)):
        for axis, direction in itertools.product(range(grid.ndim), (1, -1)):
            j = neighbour(grid, i, axis, direction)
            if j == "itself":
                continue
            face = c[axis][i] if j == "zero" else mean(c[axis][i], c[axis][j])
            flux = face * (unit(grid, j, i) - unit(grid, i, i)) / grid.h[axis] ** 2
            A = A + torch.outer(unit(grid, i, i), flux)
        assert row == nodes(grid).index(i)
    return A


def diffusion_of_function(grid: Grid, c: Callable[[Tensor], Tensor]) -> Tensor:
    """∇·(c∇u) with c evaluated half a step from every node."""
    A = torch.zeros(grid.size, grid.size, dtype=D)
    for i in nodes(grid):
        for axis, direction in itertools.product(range(grid.ndim), (1, -1)):
            j = neighbour(grid, i, axis, direction)
            if j == "itself":
                continue
            middle = torch.tensor(position(grid, i), dtype=D)
            middle[axis] += direction * grid.h[axis] / 2
            if grid.border[axis] == "periodic" and middle[axis] < 0:
                middle[axis] += grid.lengths[axis]
            flux = c(middle[None]).reshape(()) * (unit(grid, j, i) - unit(grid, i, i)) / grid.h[axis] ** 2
            A = A + torch.outer(unit(grid, i, i), flux)
    return A


def freed(K: Tensor, free: list[int]) -> Tensor:
    """The Schur complement of K on the axes that are not free."""
    known = [a for a in range(K.shape[0]) if a not in free]
    E = K[known][:, known]
    if free and known:
        E = E - K[known][:, free] @ torch.linalg.inv(K[free][:, free]) @ K[free][:, known]
    return E


def diffusion_of_tensor(grid: Grid, K: Tensor) -> Tensor:
    """∇·(K∇u): minus the energy of the one-sided gradients in all quadrants of every node, also on Dirichlet borders.

    A quadrant beyond a border without flux has the energy that is least over the missing difference.
    """
    d, A = grid.ndim, torch.zeros(grid.size, grid.size, dtype=D)
    for i, signs in itertools.product(nodes(grid), itertools.product((1, -1), repeat=d)):
        here, k = unit(grid, i, i), K[(slice(None), slice(None), *i)]
        ends = [neighbour(grid, i, axis, sign) for axis, sign in enumerate(signs)]
        free = [a for a in range(d) if ends[a] == "itself"]
        known = [a for a in range(d) if a not in free]
        if not known:
            continue
        G = torch.stack([signs[a] * (unit(grid, ends[a], i) - here) / grid.h[a] for a in known])
        E = freed(k, free)
        A = A - G.mT @ E @ G / 2**d
        for at, a in enumerate(known):
            if ends[a] == "zero":  # the quadrant of the node on the border, whose other neighbours are zero as well
                A = A - E[at, at] * torch.outer(here, here) / grid.h[a] ** 2 / 2**d
    return A


def advection(grid: Grid, v: list[Tensor], scheme: str) -> Tensor:
    A = torch.zeros(grid.size, grid.size, dtype=D)
    for i in nodes(grid):
        here = unit(grid, i, i)
        for axis in range(grid.ndim):
            speed, h = v[axis][i], grid.h[axis]
            before = unit(grid, neighbour(grid, i, axis, -1), i)
            after = unit(grid, neighbour(grid, i, axis, 1), i)
            if scheme == "central":
                slope = (after - before) / (2 * h)
            else:
                slope = (here - before) / h if speed >= 0 else (after - here) / h
            A = A - torch.outer(here, speed * slope)
    return A
