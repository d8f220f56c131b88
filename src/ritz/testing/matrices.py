"""Classical test matrices and shipped data sets, as plain torch tensors.

Everything here is a pure function of its arguments. Sparse matrices are CSR tensors in float64, with column indices
sorted in each row.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.resources import files
from io import BufferedIOBase
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ..operators.sparse import announce_csr

__all__ = [
    "CoraGraph",
    "advection_diffusion_1d",
    "cora_graph",
    "graph_laplacian",
    "hilbert",
    "laplacian_1d",
    "laplacian_2d",
    "laplacian_3d",
    "read_matrix_market",
    "suitesparse",
]


def hilbert(n: int) -> Tensor:
    """Return the Hilbert matrix H_ij = 1 / (i + j + 1), i, j from 0.

    It is positive definite with condition number about e^(3.5 n).

    Args:
        n: size; beyond 12 the smallest eigenvalue is below rounding, so that the stored matrix need not be definite.

    Returns:
        A dense float64 tensor (n, n).
    """
    i = torch.arange(_positive(n), dtype=torch.float64)
    return 1.0 / (i[:, None] + i[None, :] + 1.0)


def laplacian_1d(n: int, *, spacing: float = 1.0) -> Tensor:
    """Return −Δ on n interior points of an interval with zero boundary values: tridiag(−1, 2, −1) / spacing².

    Its eigenvalues are (2 − 2 cos(jπ / (n + 1))) / spacing², j = 1 … n; they are positive.

    Args:
        n: number of interior grid points.
        spacing: distance between grid points. With 1 / (n + 1) the smallest eigenvalue tends to π².

    Returns:
        A sparse CSR float64 tensor (n, n).
    """
    return _grid_laplacian((n,), spacing)


def laplacian_2d(n: int, *, spacing: float = 1.0) -> Tensor:
    """Return −Δ on an n × n grid with zero boundary values (five-point stencil), size (n², n²), sparse CSR.

    Eigenvalues are the sums of two eigenvalues of `laplacian_1d(n, spacing=spacing)`; most are repeated.
    """
    return _grid_laplacian((n, n), spacing)


def laplacian_3d(n: int, *, spacing: float = 1.0) -> Tensor:
    """Return −Δ on an n × n × n grid with zero boundary values (seven-point stencil), size (n³, n³), sparse CSR."""
    return _grid_laplacian((n, n, n), spacing)


def advection_diffusion_1d(n: int, *, velocity: float = 1.0) -> Tensor:
    """Return −u'' + velocity · u' on n points by upwind differences at spacing 1, sparse CSR.

    The matrix is tridiagonal, and for velocity > 0 neither symmetric nor normal. Its eigenvalues
    2 + velocity − 2 sqrt(1 + velocity) cos(jπ / (n + 1)), j = 1 … n, are real and positive.
    """
    if velocity < 0:
        raise ValueError(
            f"velocity must be nonnegative, because the differences look upwind from the left; got {velocity}"
        )
    i = torch.arange(_positive(n))
    diagonal = torch.full((n,), 2.0 + velocity, dtype=torch.float64)
    lower = torch.full((n - 1,), -1.0 - velocity, dtype=torch.float64)
    upper = torch.full((n - 1,), -1.0, dtype=torch.float64)
    return _csr(
        torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]]), torch.cat([diagonal, lower, upper]), (n, n)
    )


def graph_laplacian(edges: Tensor, n: int, *, normalised: bool = False) -> Tensor:
    """Return the Laplacian D − W of an undirected graph, or I − D^(−1/2) W D^(−1/2), which is positive semi-definite.

    Args:
        edges: integer tensor (m, 2); each undirected edge once, no loops. W has a one in both directions for each.
        n: number of nodes.
        normalised: divide by the square roots of the degrees; eigenvalues then lie in [0, 2]. Isolated nodes get a
            zero row.

    Returns:
        A sparse CSR float64 tensor (n, n).
    """
    i, j = edges[:, 0].long(), edges[:, 1].long()
    if bool((i == j).any()):
        raise ValueError("edges contains loops (i, i), for which the Laplacian is not defined; remove them")
    degree = torch.bincount(torch.cat([i, j]), minlength=n).to(torch.float64)
    weight, diagonal = torch.ones(len(edges), dtype=torch.float64), degree
    if normalised:
        weight = (degree[i] * degree[j]).rsqrt()
        diagonal = (degree > 0).to(torch.float64)
    nodes = torch.arange(n)
    return _csr(torch.cat([nodes, i, j]), torch.cat([nodes, j, i]), torch.cat([diagonal, -weight, -weight]), (n, n))


@dataclass(frozen=True, eq=False)
class CoraGraph:
    """The Cora citation graph: 2708 papers in 7 classes, 1433 words.

    Attributes:
        edges: int64 (5278, 2), each undirected edge once, smaller index first, no loops.
        features: sparse CSR float32 (2708, 1433), one where a word occurs.
        labels: int64 (2708,), values 0 … 6.
        train, val, test: int64 node indices of the standard split, 140, 500 and 1000 of them.
    """

    edges: Tensor
    features: Tensor
    labels: Tensor
    train: Tensor
    val: Tensor
    test: Tensor


def cora_graph() -> CoraGraph:
    """Read the Cora citation graph that is shipped with the package."""
    with _open("cora.npz") as file, np.load(file, allow_pickle=False) as data:
        directed = torch.from_numpy(data["edges"]).long()
        parts = [torch.from_numpy(data["x_" + name]) for name in ("indptr", "indices", "data")]
        shape = tuple(int(m) for m in data["x_shape"])
        rest = {name: torch.from_numpy(data[name]) for name in ("labels", "train", "val", "test")}
    # The file stores both directions of every edge.
    edges = torch.unique(directed.sort(dim=1).values, dim=0)
    announce_csr()
    features = torch.sparse_csr_tensor(parts[0].long(), parts[1].long(), parts[2], size=shape, check_invariants=True)
    return CoraGraph(edges=edges, features=features, **rest)


def suitesparse(name: str) -> Tensor:
    """Read a shipped matrix of the SuiteSparse collection, `"1138_bus"` or `"bloweybq"`, as a sparse CSR float64
    tensor.

    Raises:
        ValueError: for any other name.
    """
    if name not in ("1138_bus", "bloweybq"):
        raise ValueError(f'name must be "1138_bus" or "bloweybq", the matrices that are shipped; got {name!r}')
    with _open(name + ".mtx.gz") as raw, gzip.open(raw) as file:
        return _read_coordinates(file)


def read_matrix_market(path: str | Path) -> Tensor:
    """Read a real MatrixMarket coordinate file, plain or compressed by gzip (by its suffix `.gz`).

    Args:
        path: a file with the header `matrix coordinate real|integer|pattern general|symmetric|skew-symmetric`.

    Returns:
        A sparse CSR float64 tensor. Both triangles of a symmetric matrix are stored; repeated entries are summed,
        and zeros that the file lists stay in the pattern.

    Raises:
        ValueError: for another header, or when entries are missing.
    """
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        return _read_coordinates(file)


def _read_coordinates(file: BufferedIOBase) -> Tensor:
    header = file.readline().decode().lower().split()
    known = header[:3] == ["%%matrixmarket", "matrix", "coordinate"] and len(header) == 5
    if (
        not known
        or header[3] not in ("real", "integer", "pattern")
        or header[4] not in ("general", "symmetric", "skew-symmetric")
    ):
        raise ValueError(f"expected the header of a real MatrixMarket coordinate matrix, got {' '.join(header)!r}")
    line = file.readline()
    while line.startswith(b"%") or not line.strip():
        line = file.readline()
    rows, columns, count = (int(word) for word in line.split())
    table = np.loadtxt(file, ndmin=2) if count else np.zeros((0, 3))
    if len(table) != count:
        raise ValueError(f"the file announces {count} entries but has {len(table)}")
    i, j = (torch.from_numpy(table[:, column].astype(np.int64) - 1) for column in (0, 1))
    values = torch.ones(count, dtype=torch.float64) if header[3] == "pattern" else torch.from_numpy(table[:, 2].copy())
    if header[4] != "general":
        # The file holds the lower triangle only.
        off = i != j
        mirrored = -values[off] if header[4] == "skew-symmetric" else values[off]
        i, j, values = torch.cat([i, j[off]]), torch.cat([j, i[off]]), torch.cat([values, mirrored])
    return _csr(i, j, values, (rows, columns))


def _grid_laplacian(shape: tuple[int, ...], spacing: float) -> Tensor:
    if not spacing > 0:
        raise ValueError(f"spacing must be positive, got {spacing}")
    points = torch.arange(_positive(int(np.prod(shape)))).reshape(shape)
    left = torch.cat([points.narrow(axis, 0, m - 1).flatten() for axis, m in enumerate(shape)])
    right = torch.cat([points.narrow(axis, 1, m - 1).flatten() for axis, m in enumerate(shape)])
    diagonal = torch.full((points.numel(),), 2.0 * len(shape), dtype=torch.float64)
    off = -torch.ones(len(left), dtype=torch.float64)
    i, j = torch.cat([points.flatten(), left, right]), torch.cat([points.flatten(), right, left])
    return _csr(i, j, torch.cat([diagonal, off, off]) / spacing**2, (points.numel(), points.numel()))


def _csr(i: Tensor, j: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # check_invariants is given explicitly: the index arrays may come from a file.
    coo = torch.sparse_coo_tensor(torch.stack([i, j]), values, shape, check_invariants=True)
    return coo.coalesce().to_sparse_csr()


def _open(name: str) -> IO[bytes]:
    return files("ritz.testing").joinpath("data", name).open("rb")


def _positive(n: int) -> int:
    if n < 1:
        raise ValueError(f"the size must be at least 1, got {n}")
    return n
