"""Random probe vectors, fixed by a seed: a loss that uses them is a function."""

from __future__ import annotations

from dataclasses import dataclass

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
