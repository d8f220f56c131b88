"""The compiled form of a product by diagonals, where numba is installed and the vectors are long enough for it."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..krylov.one import Steps
from ..krylov.progress import not_finite

# Real numbers in a vector below which no compiler is loaded: what a step saves is too little for the half second that
# numba takes to import.
SMALL = 2**13
# Real numbers in a block above which torch operations by several threads are ahead of one compiled one.
LARGE = 2**18


class Bands(Protocol):
    """A matrix as :mod:`~ritz.expint.bands` keeps it."""

    diagonal: Tensor
    memory: Tensor
    terms: list[tuple[int, int]]
    border: tuple[Tensor, Tensor, Tensor] | None


def compiled_form(bands: Bands) -> Compiled | None:
    """The compiled form, or None where torch operations serve: on other devices, for short vectors, without numba."""
    d = bands.diagonal
    known = type(d) is Tensor and d.device.type == "cpu" and d.dtype in (torch.float32, torch.float64)
    if not known or len(d) < SMALL:
        return None
    if "numba" not in sys.modules and importlib.util.find_spec("numba") is None:  # the search takes 100 µs
        return None
    try:
        _code()
    except ImportError:  # it is there, and does not work with the NumPy that is there
        return None
    return Compiled(bands)


def _code() -> Any:
    from . import bands_code  # here, so that importing ritz does not import numba

    return bands_code


def is_plain(x: Tensor) -> bool:
    """Whether memory may be read behind torch's back: nobody traces, counts or fakes its operations."""
    return type(x) is Tensor and not torch._C._len_torch_dispatch_stack()


class Compiled:
    """Products and Lanczos steps of real vectors, contiguous and on the CPU, without a graph."""

    def __init__(self, bands: Bands) -> None:
        d = bands.diagonal
        none = torch.zeros(0, dtype=torch.int64)
        rows, columns, values = bands.border or (none, none, d[:0])
        starts, offsets = (np.array([term[i] for term in bands.terms], dtype=np.int64) for i in (0, 1))
        self._matrix: tuple[Any, ...] = (
            *(x.detach().contiguous().numpy() for x in (d, bands.memory)),
            starts,
            offsets,
            *(x.detach().contiguous().numpy() for x in (rows, columns, values)),
        )

    def serves(self, X: Tensor) -> bool:
        """Whether :meth:`product` is the faster one, and allowed."""
        return is_plain(X) and (X.numel() <= LARGE or torch.get_num_threads() == 1)

    def product(self, X: Tensor) -> Tensor:
        """A x for every row of X (k, n)."""
        x = X.detach().resolve_neg().contiguous()
        out = torch.empty_like(x)
        y = x.numpy()
        _code().product(y.dtype)(*self._matrix, y, out.numpy())
        return out

    def lanczos(self, Q: Tensor, first: int, w: Tensor, length: float, largest: float, tol: float) -> Steps:
        """:func:`ritz.krylov.one.lanczos_steps` without orthogonalisation; sums are made in double precision."""
        rows, w = Q.numpy(), w.clone()
        alpha, beta = np.empty(len(Q) - first), np.empty(len(Q) - first)
        made = _code().lanczos(rows.dtype)(*self._matrix, rows, first, w.numpy(), length, largest, tol, alpha, beta)
        if made < 0:
            raise not_finite(-made)
        return Steps(w, alpha[:made].tolist(), beta[:made].tolist())
