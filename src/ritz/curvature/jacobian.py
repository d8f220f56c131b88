"""The Jacobian of a network's outputs over its data, and the neural tangent kernel, as operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batches import Batch, read, to_device
from .data_operator import KEEP_BYTES, DataOperator, Known
from .factored import Factored, factor
from .linearize import Linearization
from .network import Network, Selection
from .output_vectors import MOST_VECTORS, unit_vectors
from .preflight import largest_side


class Jacobian(DataOperator):
    """∂f/∂θ over all outputs of the data, (M, P): rows in the order of the batches, each flattened by rows.

    Args:
        model_or_fn, params, micro_batch, seed, hyperparameters, keep_bytes: as in :class:`~ritz.curvature.GGN`.
        loss: has no part in it and may be None; it is there so that all curvature operators are called alike.
        data: inputs, pairs (inputs, targets), or a DataLoader of either.
        sum_outputs: the Jacobian of Σ_c f_c, one row for each loss term instead of one for each output.

    Cost: a product costs about one backward pass over the data a column, the adjoint product another one.
    """

    def __init__(
        self,
        model_or_fn: Any,
        loss: Any = None,
        params: Selection = None,
        data: Any = None,
        *,
        sum_outputs: bool = False,
        micro_batch: int | None = None,
        seed: int | None = None,
        hyperparameters: Sequence[Tensor] = (),
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        network = Network(model_or_fn, params, seed=seed)
        batches = read(data, micro_batch, targets=False)
        network.check_deterministic(to_device(batches[0], network.device).x)
        self.sum_outputs = sum_outputs
        with torch.no_grad():
            at_all = (network(network.parameters, to_device(b, network.device).x) for b in batches)
            self._output_shapes = [f.shape for f in at_all]
        self._rows = [self._summed(s).numel() for s in self._output_shapes]
        super().__init__(
            network, batches, (sum(self._rows), network.numel), hyperparameters=hyperparameters, keep_bytes=keep_bytes
        )

    def _summed(self, shape: torch.Size) -> torch.Size:
        return shape[:-1] if self.sum_outputs and len(shape) > 1 else shape

    def _record(self, batch: Batch, recorded: Sequence[Tensor]) -> Linearization:
        return Linearization(self.network, batch.x, recorded)

    def _factor(self, i: int, batch: Batch, limit: int) -> Factored | None:
        def vectors(f: Tensor) -> Sequence[Tensor]:
            shape = self._summed(f.shape)
            if shape[1:].numel() > MOST_VECTORS:
                return ()
            units = unit_vectors(f.new_zeros(shape))
            return [u.unsqueeze(-1).expand(f.shape) if u.ndim < f.ndim else u for u in units]

        return factor(self.network, batch.x, batch.size, vectors, limit)

    def _accumulate(self, X: Tensor, over: Known) -> Tensor:
        V, parts = X.mT.contiguous(), []
        for i in range(len(self.batches)):
            at = over(i)[0]
            if isinstance(at, Factored):
                parts.append(at.rows(V).flatten(0, 1).mT)
                continue
            U = at.jvp(V)
            parts.append((U.sum(-1) if self.sum_outputs and U.ndim > 2 else U).reshape(V.shape[0], -1))
        return torch.cat(parts, 1).mT

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self._run(self._accumulate_adjoint, X)

    def _accumulate_adjoint(self, X: Tensor, over: Known) -> Tensor:
        total = None
        for i, part in enumerate(X.mT.split(self._rows, 1)):
            shape, at = self._output_shapes[i], over(i)[0]
            if isinstance(at, Factored):
                found = at.adjoint(part.mT.reshape(shape[0], at.q, X.shape[1]))
                total = found if total is None else total + found
                continue
            U = part.reshape((X.shape[1],) + self._summed(shape))
            U = U.unsqueeze(-1).expand((X.shape[1],) + shape) if U.ndim <= len(shape) else U
            found = at.vjp(U)
            total = found if total is None else total + found
        return total.mT  # type: ignore[union-attr]


class NTK(Jacobian):
    """The empirical neural tangent kernel Θ = J Jᵀ, (M, M), one row for each output of each example.

    With ``sum_outputs``, the kernel of the summed logits, (N, N), which approximates Θ for one output. Arguments: as
    in :class:`Jacobian`. Between two sets of inputs: ``Jacobian(..., data=x) @ Jacobian(..., data=z).mT``.

    Reference: Jacot, Gabriel, Hongler, "Neural tangent kernel" (2018); Mohamadi, Bae, Sutherland, "A fast, well-founded
    approximation to the empirical neural tangent kernel" (2023).
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        M = self.shape[0]
        self.shape, self.hermitian, self.psd = (M, M), True, True

    def _matmat(self, X: Tensor) -> Tensor:
        return self._run(self._accumulate, self._run(self._accumulate_adjoint, X))

    _rmatmat = _matmat

    def _what_fits(self) -> str:
        each = self.shape[0] // max(1, sum(b.size for b in self.batches))
        most = largest_side(self.dtype) // max(1, each)
        return f"at most {most} examples fit, of {each} rows each; products and ritz.trace need no matrix"
