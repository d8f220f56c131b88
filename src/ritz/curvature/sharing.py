"""How a layer whose weight is used at many positions of one example becomes rows of two factors, and what they count.

A layer sees inputs a (n, R, d_in) and output gradients g (n, R, d_out): n examples, R positions (tokens, pixels of an
output). The Kronecker factors are A = mean of a aᵀ and B = (sum of g gᵀ of the loss terms) / (number of loss terms).

Reference: Eschenhagen, Immer, Turner, Schneider, Hennig, "Kronecker-factored approximate curvature for modern neural
network architectures" (2023): which of the two is exact for which use of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import OperandError


@dataclass(frozen=True)
class Expand:
    """Every position is an example of its own: n·R rows of both factors. Exact where each position has its own loss."""

    def inputs(self, a: Tensor) -> Tensor:
        """Rows (n·R, d_in) of inputs (n, R, d_in)."""
        return a.flatten(0, 1)

    def outputs(self, g: Tensor) -> Tensor:
        """Rows (n·R, d_out) of output gradients (n, R, d_out)."""
        return g.flatten(0, 1)


@dataclass(frozen=True)
class Reduce:
    """Inputs are averaged, output gradients summed over the positions: n rows. Exact for deep linear networks that pool
    their positions by a mean; cheaper than :class:`Expand` by a factor R."""

    def inputs(self, a: Tensor) -> Tensor:
        """Rows (n, d_in): means over the positions."""
        return a.mean(1)

    def outputs(self, g: Tensor) -> Tensor:
        """Rows (n, d_out): sums over the positions."""
        return g.sum(1)


WeightSharing = Expand | Reduce


@dataclass(frozen=True)
class PerExample:
    """One loss term per example: the leading dimension of each layer's input (the default)."""

    def __call__(self, examples: float, positions: float) -> float:
        """The number of loss terms behind the gradients, from a layer's counts."""
        return examples


@dataclass(frozen=True)
class PerPosition:
    """One loss term per position, as in a mean over tokens: n·R of each layer."""

    def __call__(self, examples: float, positions: float) -> float:
        """The number of loss terms behind the gradients, from a layer's counts."""
        return positions


@dataclass(frozen=True)
class Count:
    """A number that the user gives: an int, or a callable that is asked at every update.

    It is the number of loss terms behind ``.grad`` when the optimizer steps: all micro-batches of this process
    together.
    """

    terms: int | Callable[[], int]

    def __call__(self, examples: float, positions: float) -> float:
        """The user's number, whatever the layer counted."""
        found = self.terms() if callable(self.terms) else self.terms
        if not found > 0:
            raise OperandError(f"num_loss_terms gave {found!r}; expected a positive number of loss terms")
        return float(found)


LossTerms = PerExample | PerPosition | Count


def loss_terms(given: int | Callable[[], int] | LossTerms | None) -> LossTerms:
    """The rule behind ``num_loss_terms``: None counts examples, a number or a callable is taken as it is."""
    if given is None:
        return PerExample()
    if isinstance(given, (PerExample, PerPosition, Count)):
        return given
    if callable(given) or (isinstance(given, int) and not isinstance(given, bool) and given > 0):
        return Count(given)
    raise OperandError(
        f"num_loss_terms={given!r}; expected a positive int, a callable that returns one, PerExample(), PerPosition() "
        "or None"
    )
