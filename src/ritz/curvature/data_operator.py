"""What all curvature operators share: a network, a loss, data in batches, their scaling, and what is kept of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite
from ..operators import LinearOperator
from .batches import Batch, read, to_device
from .factored import Factored
from .losses import Loss
from .network import Network, Selection
from .preflight import largest_columns, largest_side, last_parameters, refuse
from .torch_losses import as_loss

Known = Callable[[int], tuple[Any, Batch]]  # the recorded pass and the data of a batch

FEW_COLUMNS = 8  # columns after which the backward passes behind rows in factored form are worth it
KEEP_BYTES = 1 << 30  # graphs of all batches that are kept between products; beyond, each is recorded anew


class DataOperator(LinearOperator):
    """A sum over batches of data. A subclass gives the shape, ``_record`` and ``_accumulate``.

    Args:
        network: the function of the selected parameters.
        batches: the data.
        hyperparameters: tensors that the products are differentiable in, such as a temperature inside the model, the
            strength of a data augmentation, or selected parameters themselves.
        keep_bytes: memory for recorded passes.
    """

    def __init__(
        self,
        network: Network,
        batches: list[Batch],
        shape: Sequence[int],
        *,
        hyperparameters: Sequence[Tensor] = (),
        keep_bytes: int = KEEP_BYTES,
        hermitian: bool | None = None,
        psd: bool | None = None,
    ) -> None:
        super().__init__(shape, network.dtype, network.device, hermitian=hermitian, psd=psd)
        for t in hyperparameters:
            if not isinstance(t, Tensor):
                raise OperandError(f"hyperparameters has a {type(t).__name__}; expected tensors")
        self.network, self.batches = network, batches
        self.hyperparameters, self.keep_bytes = tuple(hyperparameters), keep_bytes
        self._kept: dict[int, Any] = {}
        self._kept_bytes = 0
        self._columns = 0  # that went through products without a graph
        self._no_rows: set[int] = set()

    @property
    def num_parameters(self) -> int:
        """Length of the parameter vector."""
        return self.network.numel

    def tensors(self) -> tuple[Tensor, ...]:
        return self.hyperparameters

    def check_unchanged(self) -> None:
        self.network.check_unchanged()

    def unravel(self, v: Tensor) -> dict[str, Tensor]:
        """A parameter vector (P,) as tensors by name."""
        if v.shape != (self.network.numel,):
            raise OperandError(f"unravel got {tuple(v.shape)}; expected a parameter vector ({self.network.numel},)")
        return dict(zip(self.network.names, self.network.split(v)))

    # -- products -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _record(self, batch: Batch, recorded: Sequence[Tensor]) -> Any:
        """The recorded pass of a batch."""

    def _factor(self, i: int, batch: Batch, limit: int) -> Factored | None:
        """The batch in factored form, where it has one that fits."""
        return None

    @abstractmethod
    def _accumulate(self, X: Tensor, over: Known) -> Tensor:
        """The product with X (m, k), from the recorded pass and the data of each batch."""

    def _matmat(self, X: Tensor) -> Tensor:
        return self._run(self._accumulate, X)

    def _run(self, product: Callable[[Tensor, Known], Tensor], X: Tensor) -> Tensor:
        """A product with kept passes, or, where its gradient is wanted, with passes that are recorded for it."""
        self.network.check_unchanged()
        if torch.is_grad_enabled() and (X.requires_grad or any(t.requires_grad for t in self.hyperparameters)):
            recorded = self.hyperparameters or (X,)
            return product(X, lambda i: self._anew(i, recorded))
        self._columns += X.shape[1]
        with torch.no_grad():
            found = product(X, self._known)
        check_finite(found, f"a product with {type(self).__name__}")
        return found

    def to_dense(self) -> Tensor:
        refuse(self.shape, self.dtype, f"{type(self).__name__}.to_dense()", self._what_fits())
        return super().to_dense()

    def _what_fits(self) -> str:
        """Instead of a matrix that does not."""
        n, m = self.shape
        most = largest_side(self.dtype) if n == m else largest_columns(n, self.dtype)
        fits = last_parameters(self.network.names, self.network.sizes, most)
        return f"{fits}; products (A @ x), ritz.trace, ritz.logdet, ritz.solve and ritz.eigsh need no matrix"

    def _anew(self, i: int, recorded: Sequence[Tensor]) -> tuple[Any, Batch]:
        batch = to_device(self.batches[i], self.device)
        return self._record(batch, recorded), batch

    def _known(self, i: int) -> tuple[Any, Batch]:
        """What is kept of a batch; its rows once as many columns went through as their backward passes cost."""
        batch = to_device(self.batches[i], self.device)
        kept = self._kept.get(i)
        if not isinstance(kept, Factored) and i not in self._no_rows and self._columns >= FEW_COLUMNS:
            room = self.keep_bytes - self._kept_bytes + (kept.bytes if kept is not None else 0)
            rows = self._factor(i, batch, room) if room > 0 else None
            if rows is None:
                self._no_rows.add(i)
            else:
                return self._keep(i, rows), batch
        return kept if kept is not None else self._keep(i, self._record(batch, ())), batch

    def _keep(self, i: int, found: Any) -> Any:
        """Keep a batch, in place of what was kept of it, where there is room."""
        old = self._kept.pop(i, None)
        self._kept_bytes -= old.bytes if old is not None else 0
        if self._kept_bytes + found.bytes <= self.keep_bytes:
            self._kept[i] = found
            self._kept_bytes += found.bytes
        return found


class Problem:
    """The arguments that all curvature operators have, checked and made into values.

    ``scale`` is what a sum over loss terms is multiplied by: 1 for ``reduction="sum"``, 1/(number of terms) for "mean",
    times num_data/(number of examples) where the data is a part of a larger set.
    """

    def __init__(
        self,
        model_or_fn: Any,
        loss: Any,
        params: Selection,
        data: Any,
        *,
        reduction: str | None = None,
        num_data: int | None = None,
        num_loss_terms: float | None = None,
        micro_batch: int | None = None,
        seed: int | None = None,
    ) -> None:
        if micro_batch is not None and (not isinstance(micro_batch, int) or micro_batch < 1):
            raise OperandError(f"micro_batch={micro_batch!r}; expected a whole number of examples, at least 1, or None")
        self.loss, self.reduction = as_loss(loss, reduction)
        self.network = Network(model_or_fn, params, seed=seed)
        self.batches = read(data, micro_batch)
        first = to_device(self.batches[0], self.network.device)
        self.network.check_deterministic(first.x)
        examples = sum(b.size for b in self.batches)
        self.scale = 1.0
        if num_data is not None:
            if self.reduction == "mean":
                raise OperandError("num_data was given with reduction='mean', which does not need it; leave it out")
            self.scale = num_data / examples
        if self.reduction == "mean":
            self.scale = 1.0 / (self._terms() if num_loss_terms is None else float(num_loss_terms))
        elif num_loss_terms is not None:
            raise OperandError("num_loss_terms was given with reduction='sum', which needs none; leave it out")

    def _terms(self) -> float:
        total = 0.0
        with torch.no_grad():
            for batch in self.batches:
                moved = to_device(batch, self.network.device)
                total += self.loss.terms(self.network(self.network.parameters, moved.x), moved.y)
        if not total > 0:
            raise OperandError(f"the data holds {total:g} loss terms; expected more (are all targets ignored?)")
        return total


class LossOperator(DataOperator):
    """A symmetric matrix (P, P) that a loss over data has: a :class:`DataOperator` of a :class:`Problem`.

    The arguments are described by :class:`~ritz.curvature.GGN`.
    """

    def __init__(
        self,
        model_or_fn: Any,
        loss: Any,
        params: Selection = None,
        data: Any = None,
        *,
        hyperparameters: Sequence[Tensor] = (),
        keep_bytes: int = KEEP_BYTES,
        reduction: str | None = None,
        num_data: int | None = None,
        num_loss_terms: float | None = None,
        micro_batch: int | None = None,
        seed: int | None = None,
    ) -> None:
        problem = Problem(
            model_or_fn, loss, params, data, reduction=reduction, num_data=num_data, num_loss_terms=num_loss_terms,
            micro_batch=micro_batch, seed=seed,
        )  # fmt: skip
        P = problem.network.numel
        super().__init__(
            problem.network, problem.batches, (P, P), hyperparameters=hyperparameters, keep_bytes=keep_bytes,
            hermitian=True, psd=self._semidefinite(problem.loss),
        )  # fmt: skip
        self.loss, self.scale, self.reduction = problem.loss, problem.scale, problem.reduction

    def _semidefinite(self, loss: Loss) -> bool | None:
        """Whether the matrix is known to have no negative eigenvalue."""
        return None

    @abstractmethod
    def _of_batch(self, i: int, batch: Batch, at: Any, V: Tensor) -> Tensor:
        """The product with rows V (k, P) at one batch, from what is kept of it, for the sum over its loss terms."""

    def _accumulate(self, X: Tensor, over: Known) -> Tensor:
        V, total = X.mT.contiguous(), None
        for i in range(len(self.batches)):
            at, batch = over(i)
            found = self._of_batch(i, batch, at, V)
            total = found if total is None else total + found
        assert total is not None
        return self.scale * total.mT
