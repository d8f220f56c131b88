"""Benchmark: products and Lanczos steps of a stencil, compiled (numba) and by torch operations, one thread.

    python benchmarks/stencils.py           # 128 × 128 and 16 × 16 points, float64 and float32

The operator is C(−Δ)C of the wave equation. "whole": value and gradient of ‖u(t)‖² in all speeds, by a space of 14
steps; at 16 × 16 points, where nothing is compiled by itself, all of it is the overhead of single operations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import _common
import torch
from torch import Tensor

import ritz
from ritz.expint import Grid, WaveOperator, compiled, wave_multiply

STEPS = 14


def microseconds(call: Callable[[], object]) -> float:
    return 1e6 * statistics.median(_common.measure(call))


def calls(N: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    c = (0.7 + 0.6 * torch.rand(N, N, generator=generator, dtype=dtype)).requires_grad_()
    x = torch.randn(N * N, generator=generator, dtype=dtype)
    S = WaveOperator(c, Grid((N, N), border="neumann"))
    method = ritz.Lanczos(STEPS, reorthogonalize=False)

    def steps() -> object:
        with torch.no_grad():
            return ritz.krylov.lanczos(S, x, STEPS, reorthogonalize=False)

    def product() -> Tensor:
        with torch.no_grad():
            return S @ x

    def whole() -> object:
        c.detach().mul_(1.0)  # as after an optimizer's step: what depends on c is made anew
        u = wave_multiply(S, x, None, 1e-3, method=method)[0]
        return torch.autograd.grad(u.square().sum(), c)

    return {"product": product, f"{STEPS} steps": steps, "whole": whole}


def main() -> None:
    torch.set_num_threads(1)
    usual = compiled.SMALL
    print("µs                             torch  compiled  torch/compiled")
    for N in (128, 16):
        for dtype in (torch.float64, torch.float32):
            times: list[list[float]] = []
            for compiled.SMALL in (10**9, usual if N == 128 else 0):
                times.append([microseconds(call) for call in calls(N, dtype).values()])
            for name, slow, fast in zip(calls(N, dtype), *times, strict=True):
                where = f"{N:3d} × {N:3d}  {str(dtype).removeprefix('torch.'):8s} {name:9s}"
                print(f"{where}  {slow:7.1f}   {fast:7.1f}   {slow / fast:5.2f}", flush=True)
    compiled.SMALL = usual


if __name__ == "__main__":
    main()
