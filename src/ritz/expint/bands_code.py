"""Products by diagonals, and whole Lanczos loops of them, compiled: one pass over a piece that stays in the cache.

Imported by :mod:`~ritz.expint.compiled` at the first product that is large enough to be worth it, and by nobody else:
importing ritz does not import numba. A torch operation on 16 384 numbers costs as much again as the work it does, and
reads and writes them from a farther cache; ``benchmarks/stencils.py`` measures both.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

PIECE = 2048  # numbers of the result that are finished before the next ones: they stay in the first cache
OPTIONS: dict[str, Any] = {
    "fastmath": {"contract", "reassoc", "nsz"},  # sums may be reassociated, which is what makes them vectors
    "error_model": "numpy",
    "nogil": True,
}

njit: Any = numba.njit


@njit(**OPTIONS)
def _row(
    diagonal: Any, memory: Any, starts: Any, offsets: Any, rows: Any, columns: Any, values: Any, x: Any, y: Any
) -> None:
    """y ← A x: row i has ``memory[starts[b] + i]`` at column i + offsets[b], and the entries across borders."""
    n = x.shape[0]
    for first in range(0, n, PIECE):
        last = min(first + PIECE, n)
        d, u, v = diagonal[first:last], x[first:last], y[first:last]
        for i in range(last - first):
            v[i] = d[i] * u[i]
        for b in range(offsets.shape[0]):
            o, s = offsets[b], starts[b]
            low, high = max(first, -o), min(last, n - o)
            if high > low:
                # Slices, since an index that might be negative is looked at, and keeps the loop from vectors.
                c, u, v = memory[s + low : s + high], x[low + o : high + o], y[low:high]
                for i in range(high - low):
                    v[i] += c[i] * u[i]
    for i in range(rows.shape[0]):
        y[rows[i]] += values[i] * x[columns[i]]


def _product(
    diagonal: Any, memory: Any, starts: Any, offsets: Any, rows: Any, columns: Any, values: Any, X: Any, Y: Any
) -> None:
    """The same for every row of X (k, n)."""
    for j in range(X.shape[0]):
        _row(diagonal, memory, starts, offsets, rows, columns, values, X[j], Y[j])


def _lanczos(
    diagonal: Any,
    memory: Any,
    starts: Any,
    offsets: Any,
    rows: Any,
    columns: Any,
    values: Any,
    Q: Any,
    first: Any,
    w: Any,
    length: Any,
    largest: Any,
    tol: Any,
    alpha: Any,
    beta: Any,
) -> Any:
    """Steps of the three-term recurrence from row ``first`` of Q on, the residual in w: how many, or −j where step j
    was not finite. Sums in double precision."""
    j, n = first, w.shape[0]
    while j < Q.shape[0] and length > 0:
        q = Q[j]
        for i in range(n):
            q[i] = w[i] / length
        _row(diagonal, memory, starts, offsets, rows, columns, values, q, w)
        a = 0.0
        if j > 0:
            before = Q[j - 1]
            for i in range(n):
                t = w[i] - length * before[i]
                w[i] = t
                a += t * q[i]
        else:
            for i in range(n):
                a += np.float64(w[i]) * q[i]
        square = 0.0
        for i in range(n):
            t = w[i] - a * q[i]
            w[i] = t
            square += t * t
        b = math.sqrt(square)
        if not abs(a) + b < np.inf:  # math.isfinite is folded away where sums may be reassociated
            return -(j + 1)
        largest = max(largest, abs(a) + b)
        length = b if b > tol * largest else 0.0
        alpha[j - first], beta[j - first] = a, length
        j += 1
    return j - first


# Compiled code has to live somewhere between calls, and it is the same for everybody: nothing here depends on who asks.
_compiled: dict[tuple[Callable[..., Any], Any], Any] = {}
_lock = threading.Lock()


def product(dtype: Any) -> Any:
    """``_product`` for a NumPy dtype."""
    return _get(_product, dtype)


def lanczos(dtype: Any) -> Any:
    """``_lanczos`` for a NumPy dtype."""
    return _get(_lanczos, dtype)


def _get(function: Callable[..., Any], dtype: Any) -> Any:
    with _lock:
        key = function, np.dtype(dtype)
        if key not in _compiled:
            _compiled[key] = _compile(function, numba.from_dtype(np.dtype(dtype)))
        return _compiled[key]


def _compile(function: Callable[..., Any], real: Any) -> Any:
    """Compiled for arrays of ``real``; on disk for the next process, if it can be."""
    v, M, index, d = real[::1], real[:, ::1], types.int64[::1], types.float64
    matrix = (v, v, index, index, index, index, v)
    more = (M, M) if function is _product else (M, types.int64, v, d, d, d, d[::1], d[::1])
    result = types.void if function is _product else types.int64
    try:
        return njit(result(*matrix, *more), cache=True, **OPTIONS)(function)
    except (RuntimeError, OSError):  # no place for the cache, or no room in it
        return njit(result(*matrix, *more), **OPTIONS)(function)
