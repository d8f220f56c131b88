"""Which output gradients enter a Kronecker factor, and the sums that a layer collects between two steps.

Sums and counts are kept apart and divided when the step comes, so that micro-batches of different sizes, several uses
of a weight and several processes add up to what one large batch would give, for mean and for sum losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import Loss


@dataclass(frozen=True)
class EmpiricalFisher:
    """Gradients of the loss itself, from the backward pass that training makes: no extra cost (the default)."""


@dataclass(frozen=True)
class MonteCarloFisher:
    """Gradients at labels drawn from the model: ``samples`` more backward passes an update; unbiased for the Fisher."""

    samples: int = 1
    generator: torch.Generator | None = None

    def vectors(self, f: Tensor, loss: Loss) -> Iterator[Tensor]:
        """What to propagate from the outputs, per loss term."""
        for _ in range(self.samples):
            yield loss.sampled_gradient(f, self.generator) / self.samples**0.5


@dataclass(frozen=True)
class GaussNewton:
    """The columns of a root of the loss Hessian ("type-2"): one further backward pass per output, exact."""

    def vectors(self, f: Tensor, loss: Loss) -> Iterator[Tensor]:
        """What to propagate from the outputs, per loss term."""
        yield from loss.root_columns(f)


Statistics = EmpiricalFisher | MonteCarloFisher | GaussNewton


class Sums:
    """What one layer has seen since the last step: Σ a aᵀ and Σ g gᵀ (projected), and how many rows and examples."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.rows = self.examples = self.positions = self.terms = 0.0
        self._batch, self._here = -1, (0.0, 0.0)

    def count(self, examples: int, positions: int, batch: int) -> None:
        """Count a use. Uses with the same ``batch`` (one backward pass) see the same examples; others, further ones."""
        seen = self._here if batch == self._batch else (0.0, 0.0)
        now = (max(seen[0], examples), max(seen[1], positions))
        self.examples += now[0] - seen[0]
        self.positions += now[1] - seen[1]
        self._batch, self._here = batch, now

    def add_inputs(self, outer: Tensor, rows: int) -> None:
        """Add Π(Σ a aᵀ) of some rows; sums of low-precision factors are kept in float32."""
        self.rows += rows
        self.inputs = accumulate(self.inputs, outer)

    def add_outputs(self, outer: Tensor) -> None:
        """Add Π(Σ g gᵀ) of some rows."""
        self.outputs = accumulate(self.outputs, outer)


def accumulate(total: Tensor | None, x: Tensor) -> Tensor:
    """total + x in float32 or better."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x if total is None else total.add_(x)
