"""Tiles of a stationary kernel matrix on a CPU, with one compiled pass in place of several torch operations."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .distances import Coordinates
from .profiles import Gaussian, MaternProfile, Profile, RationalQuadraticProfile
from .torch_tiles import Tiles, TorchPass


@dataclass(frozen=True)
class NumbaTiles(Tiles):
    """Tiles as :class:`Tiles` makes them, with the profile computed by compiled code: needs numba, and no compiler.

    The pass has a vectorised exponential (within an ulp of the exact one), reads and writes each tile once, and for
    gradients forms T ∘ k' and ⟨T, k⟩ together. Profiles that it does not know (general Matérn, those of your own) and
    tensors that are not on a CPU, or of other dtypes than float32 and float64, are treated as by :class:`Tiles`.

    Numba is loaded and the pass compiled when the first tile is made; the result is kept on disk beside the package, or
    in numba's own cache directory, or only in memory where neither can be written.

    Args:
        edge: rows and columns of a tile; None is 512.
    """

    @staticmethod
    def available(device: torch.device) -> bool:
        """Whether tensors on ``device`` can be served: a CPU, and numba installed."""
        return device.type == "cpu" and importlib.util.find_spec("numba") is not None

    def _pass(self, profile: Profile, points: Coordinates, dtype: torch.dtype, area: int) -> TorchPass:
        code = _code(profile)
        served = points.left.device.type == "cpu" and dtype in (torch.float32, torch.float64)
        if code is None or not served:
            return super()._pass(profile, points, dtype, area)
        return CompiledPass(code, profile, points, dtype, area)


def _code(profile: Profile) -> int | None:
    """The number of a profile in numba_code, or None. Exact types: a subclass may compute something else."""
    if type(profile) is Gaussian:
        return 0
    if type(profile) is MaternProfile:
        return {0.5: 1, 1.5: 2, 2.5: 3}[profile.nu]
    return 4 if type(profile) is RationalQuadraticProfile else None


class CompiledPass(TorchPass):
    """:class:`TorchPass` by compiled code."""

    def __init__(self, code: int, profile: Profile, points: Coordinates, dtype: torch.dtype, area: int) -> None:
        from . import numba_code  # here, so that importing ritz does not import numba

        self.profile = profile
        self._sizes = (points.left.dtype.itemsize, dtype.itemsize)
        self._narrow = torch.empty(area if self._sizes == (8, 4) else 0, dtype=dtype, device=points.left.device)
        self._code = numba_code
        # What the compiled functions read, at addresses that do not move: see numba_code.
        self._facts = np.array([0, code], dtype=np.int64)
        self._shapes = np.array([1.0, 0.0])
        if isinstance(profile, RationalQuadraticProfile):
            # the profile's own upper end of t, which it applies to a tile
            top = profile.clamp_(torch.full((1,), torch.finfo(dtype).max, dtype=dtype, device=points.left.device))
            self._shapes[:] = profile.alpha, float(top)
        self._sums = np.zeros(2)
        self._data = np.array(
            [self._facts.ctypes.data, self._shapes.ctypes.data, 0, 0, self._sums.ctypes.data], dtype=np.uintp
        )

    def values(self, r2: Tensor) -> Tensor:
        k = self._narrow[: r2.numel()].view(r2.shape) if self._narrow.numel() else r2
        self._run(self._code.VALUES[self._sizes], r2, k)
        return k

    def pairing(self, r2: Tensor, T: Tensor, sums: Tensor | None) -> Tensor:
        self._run(self._code.PAIRING[self._sizes], r2, T)
        if sums is not None:
            sums += torch.from_numpy(self._sums[: sums.numel()])
        return r2

    def _run(self, function: Any, t: Tensor, second: Tensor) -> None:
        self._facts[0] = t.numel()
        self._data[2], self._data[3] = t.data_ptr(), second.data_ptr()
        # ctypes lets other Python threads run meanwhile
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._code.address(function))(self._data.ctypes.data)
