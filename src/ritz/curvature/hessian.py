"""The Hessian of the training loss, as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .batches import Batch
from .data_operator import LossOperator
from .linearize import SecondDerivative


class Hessian(LossOperator):
    """∂²/∂θ² of the loss over the data, (P, P), symmetric.

    ``loss`` may also be any callable (outputs, targets) -> scalar; it averages over the leading dimension of the
    outputs where ``reduction="mean"`` (the default), so that batches are weighted by their sizes. Other arguments,
    errors and scaling: as in :class:`~ritz.curvature.GGN`.

    Cost: a product costs about two backward passes over the data a column, through graphs that are recorded once.
    """

    def _record(self, batch: Batch, recorded: Sequence[Tensor]) -> SecondDerivative:
        def value(leaves: Sequence[Tensor]) -> Tensor:
            return self.loss.value(self.network(leaves, batch.x), batch.y)

        return SecondDerivative(self.network, value, recorded)

    def _of_batch(self, i: int, batch: Batch, at: Any, V: Tensor) -> Tensor:
        return at.product(V)
