"""Sizes that are refused before they are allocated, with the largest choice that fits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import OperandError

LIMIT = 8 << 30  # bytes of one matrix, as in Direct(max_bytes=)


def largest_side(dtype: torch.dtype) -> int:
    """Rows of the largest square matrix that fits."""
    return math.isqrt(LIMIT // dtype.itemsize)


def largest_columns(rows: int, dtype: torch.dtype) -> int:
    """Columns of the largest matrix of so many rows that fits."""
    return LIMIT // (dtype.itemsize * max(1, rows))


def refuse(shape: tuple[int, int], dtype: torch.dtype, what: str, instead: str) -> None:
    """Raise where a matrix does not fit; ``instead`` names what does."""
    size = shape[0] * shape[1] * dtype.itemsize
    if size > LIMIT:
        raise OperandError(
            f"{what}, {shape[0]} × {shape[1]} in {dtype}, takes {size / 2**30:.1f} GiB (limit {LIMIT / 2**30:.0f} "
            f"GiB); {instead}"
        )


def last_parameters(names: Sequence[str], sizes: Sequence[int], most: int) -> str:
    """The longest tail of the parameters with at most ``most`` entries, as an argument."""
    chosen: list[str] = []
    total = 0
    for name, size in zip(reversed(names), reversed(sizes)):
        if total + size > most:
            break
        chosen.insert(0, name)
        total += size
    if not chosen:
        return f"none of the last parameters has at most {most} entries"
    shown = chosen if len(chosen) <= 4 else [chosen[0], "…", chosen[-1]]
    return f"params={shown} fits ({total} entries of at most {most})"
