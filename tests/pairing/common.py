"""Small computations by the pairing, and what their callables close over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ritz
from ritz.pairing import Cotangents, Pair, Run

N = 5


REAL, COMPLEX = torch.float64, torch.complex128


DTYPES = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = REAL) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def squared_norm(A: ritz.LinearOperator, v: Tensor) -> Tensor:
    """‖A v‖² for a vector or a block, by the pairing."""
    V = v.detach().reshape(v.shape[0], -1)
    with Run(A, v) as run:
        Y = run.matmat(V)
        value = torch.vdot(Y.reshape(-1), Y.reshape(-1)).real

    def rule(g: Tensor) -> Cotangents:
        Lam = 2 * g * Y
        return Cotangents([Pair(Lam)], [run.adjoint(V.shape[1])(Lam).reshape(v.shape)])

    (out,) = run.attach([value], rule, [V], name="squared norm")
    return out


def only_pairing(A: ritz.LinearOperator, v: Tensor) -> Tensor:
    """The same without a gradient for v, so without adjoint products."""
    V = v.detach().reshape(v.shape[0], -1)
    with Run(A) as run:
        Y = run.matmat(V)
    rule = lambda g: Cotangents([Pair(2 * g * Y)], [])
    return run.attach([torch.vdot(Y.reshape(-1), Y.reshape(-1)).real], rule, [V], name="squared norm")[0]


def operator(fn, n: int = N, dtype: torch.dtype = REAL, **options) -> ritz.LinearOperator:
    return ritz.aslinearoperator(fn, shape=n, dtype=dtype, **options)


class Calls:
    """Counts calls of a callable and the widths that it saw."""

    def __init__(self, fn) -> None:
        self.fn, self.widths = fn, []

    def __call__(self, x: Tensor) -> Tensor:
        self.widths.append(1 if x.ndim == 1 else x.shape[1])
        return self.fn(x)


def rows(w: Tensor, x: Tensor) -> Tensor:
    return w.reshape(-1, *[1] * (x.ndim - 1)) * x


W = randn(N, N, seed=1)


def close_leaf(theta):
    return lambda x: rows(theta, W @ x)


def close_nested(theta):
    h = theta.exp()
    return lambda x: rows(theta, W @ x) + rows(h, x)


def close_cached(theta):
    """Computes a factor on its first call and keeps it, graph and all."""
    cache = {}

    def fn(x):
        if "h" not in cache:
            cache["h"] = theta.square().sin()
        return rows(cache["h"], W @ x)

    return fn
