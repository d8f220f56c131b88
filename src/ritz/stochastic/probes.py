"""Random probe vectors, fixed by a seed: a loss that uses them is a function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError


@dataclass(frozen=True)
class Hutchinson:
    """Hutchinson's estimator with m Rademacher probes z, E[zᵀMz] = tr M.

    Args:
        m: number of probes. With m >= n the probes are the n scaled unit vectors, and the estimate is exact.
        seed: the probes are a pure function of (seed, n, m, dtype), drawn on the CPU: the same on every device and in
            every call. A ``generator=`` given to the estimating function overrides it.
    """

    m: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or self.m < 1:
            raise OperandError(f"Hutchinson(m={self.m!r}); expected a whole number of probes, at least one")

    def probes(
        self, n: int, dtype: torch.dtype, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor:
        """Probe block (n, m) with E[z zᴴ] = I; complex probes for complex dtypes have phases ±1, ±i."""
        if self.m >= n:
            return n**0.5 * torch.eye(n, dtype=dtype, device=device)
        if generator is None:
            generator = torch.Generator().manual_seed(self.seed)
        where = generator.device
        if dtype.is_complex:
            phases = torch.tensor([1, 1j, -1, -1j], dtype=dtype, device=where)
            z = phases[torch.randint(0, 4, (n, self.m), generator=generator, device=where)]
        else:
            z = (2 * torch.randint(0, 2, (n, self.m), generator=generator, device=where) - 1).to(dtype)
        return z.to(device)

    def is_exact(self, n: int) -> bool:
        """Whether the probes span the space, so that nothing is random."""
        return self.m >= n


def gaussian(
    n: int, m: int, dtype: torch.dtype, device: torch.device, seed: int, generator: torch.Generator | None
) -> Tensor:
    """Normal vectors (n, m), drawn where the generator lives (the CPU for a seed) and in float64."""
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    Z = torch.randn(n, m, **options)
    if dtype.is_complex:
        Z = torch.complex(Z, torch.randn(n, m, **options))
    return Z.to(device, dtype)


def rest_probes(Q: Tensor, m: int, seed: int, generator: torch.Generator | None) -> Tensor:
    """Probes (n, m), uniform on the sphere of radius √(n − c) in the complement of Q (n, c), orthonormal.

    A projected Rademacher vector has a random length, through which a constant in f (the log σ of log(A + σ)) would
    enter the variance. A projected Gaussian one has a uniform direction, and may be brought to one length.
    """
    n, columns = Q.shape
    Z = gaussian(n, m, Q.dtype, Q.device, seed, generator)
    for _ in range(2):
        Z = Z - Q @ (Q.mH @ Z)
    return Z * ((n - columns) ** 0.5 / torch.linalg.vector_norm(Z, dim=0))


def mean_and_error(samples: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Mean over the last axis, and its standard error (zero where exact, infinite for one random probe)."""
    m = samples.shape[-1]
    values = samples.detach()
    if exact:
        error = torch.zeros_like(values[..., 0])
    elif m == 1:
        error = torch.full_like(values[..., 0], torch.inf)
    else:
        error = values.std(dim=-1) / m**0.5
    return samples.mean(-1), error
