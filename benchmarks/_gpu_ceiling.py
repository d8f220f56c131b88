"""What the device can do at most: rates of its three units, measured, and the least time of a kernel product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ritz.kernels import triton_plan

EXPONENTIALS = 512  # in a row, per number


@triton.jit
def _exponentials(out, REPEATS: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = place.to(tl.float32) * 1e-6
    for _ in range(REPEATS):
        x = tl.exp2(-x)
    tl.store(out + place, x)


def rates(seconds: Callable[[Callable[[], Any]], float], device: torch.device, size: int = 8192) -> dict[str, float]:
    """Per second: TF32 and float32 operations of torch.matmul (a multiplication with addition is two), exponentials."""
    A, B = (torch.randn(size, size, device=device) for _ in range(2))
    found = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, allowed in (("tf32", True), ("float32", False)):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found[name] = 2 * size**3 / seconds(lambda: A @ B)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    programs, block = 4096, 2048
    out = torch.empty(programs * block, device=device)
    time = seconds(lambda: _exponentials[(programs,)](out, REPEATS=EXPONENTIALS, SIZE=block, enable_fp_fusion=True))
    found["exp"] = programs * block * EXPONENTIALS / time
    return found


def least_time(rate: dict[str, float], n: int, q: int, k: int) -> dict[str, float]:
    """Seconds of each unit for one Gaussian product in float32 with n² entries; they work side by side.

    Tensor cores: three TF32 products for each float32 one, over q and k as padded. Float32 unit: two operations a
    coordinate (a difference, a multiplication with addition) for few of them, else two to put a distance together; one
    for one vector. A multiplication with addition counts as two, as in the rate, and so does any other instruction.
    """
    direct = triton_plan.distance(False, torch.float32, q) != triton_plan.DOT
    padded = 0 if direct else triton_plan.padded(q, triton_plan.width(q))
    vectors = 0 if k == 1 else triton_plan.padded(k, triton_plan.width(k, triton_plan.VECTORS))
    plain = (2 * q if direct else 2) + (1 if k == 1 else 0)
    return {
        "tensor cores": n * n * 3 * 2 * (padded + vectors) / rate["tf32"],
        "float32": n * n * 2 * plain / rate["float32"],
        "exponentials": n * n / rate["exp"],
    }
