"""Who makes which tile: panels of tiles for the threads of torch's own OpenMP pool.

Inside of an OpenMP parallel region torch's operations and its BLAS run in the calling thread. So a region is entered
once for many tiles, by `GOMP_parallel` (GNU's OpenMP runtime has it, and LLVM's), and every thread makes tiles of its
own: it waits for the others a few times a product instead of several times a tile. A pool of our own would not do: its
threads would compete with torch's, which spin for a while when they have nothing to do, and each of them would start
threads for its products, unless a setting of the whole process were changed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

Panel = list[tuple[int, int]]  # block rows and columns of tiles


def rounds(rows: int, columns: int, threads: int, *, same: bool, apart: bool) -> list[list[Panel]]:
    """Panels in rounds: those of a round, at most ``threads``, touch different rows, and may be made at the same time.

    Args:
        rows, columns: numbers of blocks.
        threads: at most columns/2 with ``same``, rows otherwise, and columns too with ``apart``.
        same: only tiles on and above the diagonal, which touch their columns' rows as well. The blocks form 2·threads
            groups, and pairs of groups meet as in a round-robin tournament; each thread has one pair in each round.
        apart: panels of a round must have different columns as well.
    """
    if threads == 1:
        return [[[(i, j) for i in range(rows) for j in range(i if same else 0, columns)]]]
    if not same:
        I = _groups(rows, threads)
        J = _groups(columns, threads if apart else 1)
        turns = range(len(J))
        return [[[(i, j) for i in I[t] for j in J[(t + r) % len(J)]] for t in range(threads)] for r in turns]
    groups = _groups(columns, 2 * threads)
    triangles = [[(i, j) for i in g for j in g if j >= i] for g in groups]
    out = [[triangles[2 * t] + triangles[2 * t + 1] for t in range(threads)]]
    ring = list(range(2 * threads))
    for _ in range(2 * threads - 1):
        pairs = [sorted((ring[t], ring[-1 - t])) for t in range(threads)]
        out.append([[(i, j) for i in groups[a] for j in groups[b]] for a, b in pairs])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return out


def _groups(count: int, parts: int) -> list[range]:
    """0 … count − 1 in contiguous parts of nearly equal length."""
    cuts = [count * p // parts for p in range(parts + 1)]
    return [range(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def pool() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP runtime in this process, or None."""
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):  # no such runtime; on Windows CDLL(None) is a TypeError
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return found


def together(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks, one in each thread of torch's pool, and wait; in the calling thread if there is one or no pool.

    Tasks allocate nothing that outlives them in another mode than the caller's: gradients are off in all threads, and
    inference mode is the caller's.
    """
    parallel = pool() if len(tasks) > 1 else None
    if parallel is None:
        for task in tasks:
            task()
        return
    inference = torch.is_inference_mode_enabled()
    waiting, errors = iter(tasks), []

    def work(_: Any) -> None:
        try:
            # Modes of autograd belong to threads. The pool may have fewer threads than there are tasks.
            with torch.inference_mode(inference), torch.no_grad():
                for task in waiting:
                    task()
        except BaseException as error:  # noqa: B036 - it cannot pass through the runtime, and is raised below
            errors.append(error)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
    parallel(ctypes.cast(callback, ctypes.c_void_p), None, len(tasks), 0)
    if errors:
        raise errors[0]
