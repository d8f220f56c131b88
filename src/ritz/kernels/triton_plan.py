"""What a Triton launch is made of: the profile's number and factor, blocks, parts. Pure functions of shape and dtype.

No autotuning: its choice would depend on the run, and with it the last bits of every result. benchmarks/gpu_kernels.py
times other sizes than these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .profiles import Gaussian, MaternProfile, Profile, RationalQuadraticProfile

DIRECT, SPLIT, DOT = 0, 1, 2  # how distances are made; the numbers of triton_code.py
FEW = 4  # coordinates up to which differences, exact, cost about what a tensor-core product padded to 16 does
CHUNK = 32  # coordinates in one product, and columns of the gradient in one program: what registers hold
VECTORS = 64  # columns of a product that one program makes; beyond, others make the same tiles anew
PROGRAMS = 1024  # a launch is divided until it has about as many: four to each multiprocessor of a large GPU


class Recipe(NamedTuple):
    """A profile as the device code knows it: k of s = factor²·r²."""

    number: int
    factor: float  # of the coordinates
    alpha: float  # the shape parameter; 0 where there is none


def recipe(profile: Profile) -> Recipe | None:
    """The profile's recipe, or None for a profile without device code."""
    log2e = 1 / math.log(2)
    if type(profile) is Gaussian:
        return Recipe(0, math.sqrt(log2e / 2), 0.0)
    if type(profile) is MaternProfile:
        return Recipe({0.5: 1, 1.5: 2, 2.5: 3}[profile.nu], math.sqrt(2 * profile.nu) * log2e, 0.0)
    if type(profile) is RationalQuadraticProfile:
        return Recipe(4, math.sqrt(1 / (2 * profile.alpha)), profile.alpha)
    return None


def distance(wide: bool, dtype: torch.dtype, q: int) -> int:
    """How to make distances of q coordinates; ``wide``: float64 coordinates of a float32 matrix."""
    if wide:
        return SPLIT
    return DIRECT if dtype == torch.float64 or q <= FEW else DOT


@dataclass(frozen=True)
class Blocks:
    """Rows and columns of a tile (powers of two from 16), warps (of 32 threads) of it, stages of prefetching."""

    rows: int
    columns: int
    warps: int
    stages: int


def product_blocks(dtype: torch.dtype, vectors: int, how: int, q: int) -> Blocks:
    """Of a product with a block of ``vectors`` columns, and of filling (``vectors`` = 1); ``how``: :func:`distance`.

    | dtype | vectors | distances | q | rows × columns, warps, stages |
    |---|---|---|---|---|
    | float32 | 16, 32 | DOT | ≤ 64 | 64 × 64, 4, 2 |
    | float32 | any | other | ≤ 64 | 64 × 32, 4, 2 |
    | float32 | any | any | > 64 | 64 × 32, 4, 1 |
    | float64 | any | any | any | 32 × 32, 4, 1 |

    Read off the compiled code: as large as tiles can be without registers spilled on compute capability 9.0 (on 8.0 at
    most 96 bytes a thread), within 69 KiB of shared memory. Not yet chosen by times.
    """
    if dtype == torch.float64:
        return Blocks(32, 32, 4, 1)
    if q > 2 * CHUNK:
        return Blocks(64, 32, 4, 1)
    return Blocks(64, 64 if how == DOT and vectors in (16, 32) else 32, 4, 2)


def contract_blocks(dtype: torch.dtype, q: int) -> Blocks:
    """Of a contraction, which holds four tiles at a time; chosen in the same way.

    64 × 32, 4 warps in float32, with 2 stages up to q = 64 and 1 beyond; 32 × 32, 4 warps and 1 stage in float64.
    """
    return Blocks(32, 32, 4, 1) if dtype == torch.float64 else Blocks(64, 32, 4, 2 if q <= 2 * CHUNK else 1)


def width(k: int, most: int = CHUNK) -> int:
    """The least power of two from 16 to ``most`` that holds k: tensor cores take no fewer than 16. ``most`` beyond."""
    return min(max(16, 1 << (k - 1).bit_length()), most)


def padded(size: int, block: int) -> int:
    """The least multiple of ``block`` that is at least ``size``."""
    return -(-size // block) * block


def reach(columns: int, block: int, programs: int) -> int:
    """Columns that one program goes over: all of them, or fewer where ``programs`` row blocks would leave a GPU idle.

    The parts are added up afterwards in a fixed order. At least eight tiles a part, so that the additions do not show.
    """
    tiles = columns // block
    parts = max(1, min(PROGRAMS // max(programs, 1), tiles // 8))
    return -(-tiles // parts) * block
