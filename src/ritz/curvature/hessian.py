"""The Hessian of the training loss, as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .batches import Batch
from .data_operator import KEEP_BYTES, DataOperator, Known, Problem
from .linearize import SecondDerivative
from .network import Selection


class Hessian(DataOperator):
    """∂²/∂θ² of the loss over the data, (P, P), symmetric.

    ``loss`` may also be any callable (outputs, targets) -> scalar; it averages over the leading dimension of the
    outputs where ``reduction="mean"`` (the default), so that batches are weighted by their sizes. Other arguments,
    errors and scaling: as in :class:`~ritz.curvature.GGN`.

    Cost: a product costs about two backward passes over the data a column, through graphs that are recorded once.
    """

    def __init__(
        self,
        model_or_fn: Any,
        loss: Any,
        params: Selection = None,
        data: Any = None,
        *,
        reduction: str | None = None,
        num_data: int | None = None,
        num_loss_terms: float | None = None,
        micro_batch: int | None = None,
        seed: int | None = None,
        hyperparameters: Sequence[Tensor] = (),
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        problem = Problem(
            model_or_fn, loss, params, data, reduction=reduction, num_data=num_data, num_loss_terms=num_loss_terms,
            micro_batch=micro_batch, seed=seed,
        )  # fmt: skip
        P = problem.network.numel
        super().__init__(
            problem.network, problem.batches, (P, P), hyperparameters=hyperparameters, keep_bytes=keep_bytes,
            hermitian=True,
        )  # fmt: skip
        self.loss, self.scale, self.reduction = problem.loss, problem.scale, problem.reduction

    def _record(self, batch: Batch, recorded: Sequence[Tensor]) -> SecondDerivative:
        def value(leaves: Sequence[Tensor]) -> Tensor:
            return self.loss.value(self.network(leaves, batch.x), batch.y)

        return SecondDerivative(self.network, value, recorded)

    def _accumulate(self, X: Tensor, over: Known) -> Tensor:
        V, total = X.mT.contiguous(), None
        for i in range(len(self.batches)):
            found = over(i)[0].product(V)
            total = found if total is None else total + found
        return self.scale * total.mT  # type: ignore[union-attr]
