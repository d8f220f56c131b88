"""Gauss–Newton and Fisher matrices of a network over its data, as operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import Batch
from .data_operator import LossOperator
from .factored import Factored, factor
from .linearize import Linearization
from .losses import CustomLoss, Loss
from .network import Selection
from .output_vectors import by_term, label_gradients, root_vectors
from .statistics import EmpiricalFisher, MonteCarloFisher


class GGN(LossOperator):
    """The generalised Gauss–Newton matrix G = c Σ_n J_nᵀ H_n J_n, (P, P), over all loss terms of the data.

    J_n is the Jacobian of the outputs in the selected parameters, H_n the Hessian of the loss in the outputs, in closed
    form: the loss is never differentiated twice.

    Args:
        model_or_fn: a module, or a function (params, x) -> outputs.
        loss: ``CrossEntropy()``, ``SquaredError()``, ``BinaryCrossEntropy()``, ``Poisson()``, ``CustomLoss(...)``, or
            torch's module of the same meaning, such as ``nn.CrossEntropyLoss()``.
        params: of a module: None for all that require a gradient, parameters, or names (of submodules too); of a
            function: what it is called with, a tensor, list or dict.
        data: a pair (x, y), or a DataLoader of pairs, which is read once and kept. Inputs may be nested in dicts or
            tuples (a tuple is the argument list of a module).
        reduction: "mean" (c = 1/number of terms of all data) or "sum" (c = 1); None: the module's own, else "mean".
        num_data: with "sum", how many examples the data stands for: c = num_data / number of examples.
        num_loss_terms: with "mean", the number to divide by where it is not that of the data.
        micro_batch: examples at a time; None leaves batches as they come. Only where examples do not see each other.
        seed: fixes the draws of dropout; without it a network that is random is refused.
        hyperparameters: tensors that products are differentiable in.
        keep_bytes: recorded passes are kept between products up to this; 0 records each anew for every product.

    Raises:
        OperandError: unknown parameters or losses, targets that do not fit, batch statistics, dropout without a seed,
            outputs that do not depend on the parameters; in products, parameters that were changed in place since.

    Cost: a product costs a backward pass through each of two recorded graphs a column, and their recording where they
    are not kept; after a few columns two matrix products a layer, where all layers have rows (:mod:`.factored`).
    Columns go through together as memory allows. Derivatives: in ``hyperparameters`` and in the operand, to
    any order. Attention is computed by its formula, since fused kernels have no second derivative.
    """

    def _semidefinite(self, loss: Loss) -> bool | None:
        return None if isinstance(loss, CustomLoss) else True  # a loss of one's own need not be convex

    def _record(self, batch: Batch, recorded: Sequence[Tensor]) -> Linearization:
        return Linearization(self.network, batch.x, recorded)

    def _factor(self, i: int, batch: Batch, limit: int) -> Factored | None:
        return factor(self.network, batch.x, batch.size, lambda f: self._roots(i, batch, f), limit)

    def _roots(self, i: int, batch: Batch, f: Tensor) -> Sequence[Tensor]:
        """Output vectors u with Σ_q u uᵀ = H for every example, each of f's shape."""
        return root_vectors(self.loss, f, batch)

    def _middle(self, i: int, batch: Batch, f: Tensor, U: Tensor) -> Tensor:
        """H U for U (k, *shape of f)."""
        return self.loss.hessian(f, batch.y).product(U)

    def _of_batch(self, i: int, batch: Batch, at: Any, V: Tensor) -> Tensor:
        return at.gram(V) if isinstance(at, Factored) else at.vjp(self._middle(i, batch, at.f, at.jvp(V)))


@dataclass(frozen=True)
class ExactFisher:
    """The expectation over the model's labels, in closed form: for these losses the Gauss–Newton matrix."""


class Fisher(GGN):
    """The Fisher information F = c Σ_n E[∇ℓ_n ∇ℓ_nᵀ], (P, P).

    Args:
        kind: :class:`ExactFisher` (the default), ``MonteCarloFisher(samples)``: labels drawn from the model once and
            for all, or ``EmpiricalFisher()``: the labels of the data.
        others: as in :class:`GGN`.

    A loss term is a row of outputs (f of shape (n, …, C) has n·…, and one-dimensional f one an entry): the empirical
    matrix is a sum of their gradients' outer products. Of a matrix that is estimated from labels, products are
    differentiable in ``hyperparameters`` at fixed labels.
    """

    def __init__(
        self,
        model_or_fn: Any,
        loss: Any,
        params: Selection = None,
        data: Any = None,
        *,
        kind: ExactFisher | MonteCarloFisher | EmpiricalFisher = ExactFisher(),
        **settings: Any,
    ) -> None:
        super().__init__(model_or_fn, loss, params, data, **settings)
        self.kind = kind
        self._gradients: dict[int, list[Tensor]] = {}

    def _middle(self, i: int, batch: Batch, f: Tensor, U: Tensor) -> Tensor:
        if isinstance(self.kind, ExactFisher):
            return super()._middle(i, batch, f, U)
        axis = self.loss._axis(f)
        total = torch.zeros_like(U)
        for g in self._label_gradients(i, batch, f):
            # A one-dimensional f has one output a term.
            total = total + g * (g * U if f.ndim == 1 else (g * U).sum(axis, keepdim=True))
        return total

    def _roots(self, i: int, batch: Batch, f: Tensor) -> Sequence[Tensor]:
        if isinstance(self.kind, ExactFisher):
            return super()._roots(i, batch, f)
        return by_term(self.loss, f, self._label_gradients(i, batch, f))

    def _label_gradients(self, i: int, batch: Batch, f: Tensor) -> list[Tensor]:
        """Gradients at the labels; drawn ones are kept, since all products must be those of one matrix."""
        assert not isinstance(self.kind, ExactFisher)
        if isinstance(self.kind, EmpiricalFisher):
            return label_gradients(self.kind, self.loss, f, batch, i)
        if i not in self._gradients:
            self._gradients[i] = label_gradients(self.kind, self.loss, f, batch, i)
        return self._gradients[i]
