"""Losses by what curvature needs of them: their value, their Hessian in closed form, gradients at sampled labels.

All act on network outputs f (..., C) and targets y, and mean the *sum* over loss terms: whoever averages divides by
``terms``. :func:`~ritz.curvature.torch_losses.as_loss` makes them from torch's loss modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import OperandError
from .output_hessians import DiagonalHessian, OutputHessian, ProductHessian, SoftmaxHessian


class Loss(ABC):
    """A loss of outputs f (..., C) and targets y; a *row* of f, its last axis, holds the outputs of one term."""

    @abstractmethod
    def value(self, f: Tensor, y: Any) -> Tensor:
        """The sum over loss terms, a scalar."""

    @abstractmethod
    def hessian(self, f: Tensor, y: Any = None) -> OutputHessian:
        """∂²/∂f² of the sum; without targets, that of terms of equal weight."""

    @abstractmethod
    def terms(self, f: Tensor, y: Any) -> float:
        """How many terms a mean divides by."""

    @abstractmethod
    def sampled_gradient(self, f: Tensor, generator: torch.Generator | None = None, y: Any = None) -> Tensor:
        """∂/∂f at labels drawn from the model; its second moment is the Hessian. Targets only say what is left out."""

    def gradient(self, f: Tensor, y: Any) -> Tensor:
        """∂/∂f of the sum."""
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf, y), leaf)[0]

    def _axis(self, f: Tensor) -> int:
        """The axis (negative) that holds the outputs of one term."""
        return -1

    def root_columns(self, f: Tensor) -> Iterator[Tensor]:
        """The C columns of a root R Rᵀ of the Hessian, for all rows at once, each of f's shape."""
        hessian, axis = self.hessian(_wide(f)), self._axis(f)
        for c in range(f.shape[axis]):
            unit = torch.zeros_like(f, dtype=_wide(f).dtype)
            unit.select(axis, c).fill_(1.0)
            yield hessian.root(unit).to(f.dtype)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """−log softmax(f)_y: H = s (diag(p) − p pᵀ).

    Args:
        label_smoothing, weight, ignore_index: as in ``torch.nn.CrossEntropyLoss``; ``weight`` is a tuple with one
            number a class. s is the weight of the term, 0 where it is ignored.
        class_axis: where the classes lie in f; torch's module has them second.

    Targets: class numbers of f's shape without the class axis, or probabilities of f's shape.
    """

    label_smoothing: float = 0.0
    ignore_index: int = -100
    weight: tuple[float, ...] | None = None
    class_axis: int = -1

    def _axis(self, f: Tensor) -> int:
        return self.class_axis if self.class_axis < 0 else self.class_axis - f.ndim

    def _rows(self, f: Tensor) -> Tensor:
        last = f.movedim(self._axis(f), -1)
        return last.reshape(-1, last.shape[-1])

    def _weights(self, f: Tensor) -> Tensor | None:
        return None if self.weight is None else torch.tensor(self.weight, dtype=f.dtype, device=f.device)

    def _check(self, f: Tensor, y: Any) -> bool:
        """Whether the targets are probabilities, not class numbers."""
        axis = self._axis(f)
        rows = f.shape[:axis] + (f.shape[axis + 1 :] if axis < -1 else ())
        if not isinstance(y, Tensor) or y.shape != (f.shape if y.is_floating_point() else rows):
            got = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise OperandError(
                f"CrossEntropy got outputs {tuple(f.shape)} with classes on axis {axis} and targets {got}; expected "
                f"whole class numbers {tuple(rows)} or floating-point probabilities {tuple(f.shape)}"
            )
        if y.is_floating_point():
            return True
        C = f.shape[axis]
        if bool(((y != self.ignore_index) & ((y < 0) | (y >= C))).any()):
            raise OperandError(
                f"CrossEntropy got class numbers from {int(y.min())} to {int(y.max())}; expected 0 to {C - 1}, or "
                f"ignore_index={self.ignore_index}"
            )
        return False

    def value(self, f: Tensor, y: Any) -> Tensor:
        targets = self._rows(y).to(f.dtype) if self._check(f, y) else y.reshape(-1).long()
        return F.cross_entropy(
            self._rows(f), targets, self._weights(f), reduction="sum", ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def _scale(self, f: Tensor, y: Any, smoothing: float) -> Tensor | None:
        """The weight of every term, with the class axis kept as 1; None where all are 1."""
        if y is None:
            return None
        axis, w = self._axis(f), self._weights(f)
        if self._check(f, y):
            w = f.new_ones(f.shape[axis]) if w is None else w
            inside = y.to(f.dtype) * (1.0 - smoothing) + smoothing / f.shape[axis]
            return (inside.movedim(axis, -1) @ w).unsqueeze(axis)
        kept = y != self.ignore_index
        if w is None:
            return None if bool(kept.all()) else kept.to(f.dtype).unsqueeze(axis)
        own = w[y.long().masked_fill(~kept, 0)] * (1.0 - smoothing) + smoothing * w.mean()
        return (own * kept).unsqueeze(axis)

    def hessian(self, f: Tensor, y: Any = None) -> SoftmaxHessian:
        axis = self._axis(f)
        return SoftmaxHessian(torch.softmax(f, axis), self._scale(f, y, self.label_smoothing), axis)

    def terms(self, f: Tensor, y: Any) -> float:
        if self._check(f, y):
            return float(self._rows(f).shape[0])  # as torch counts them, weighted or not
        scale = self._scale(f, y, 0.0)
        return float(y.numel() if scale is None else scale.double().sum())

    def sampled_gradient(self, f: Tensor, generator: torch.Generator | None = None, y: Any = None) -> Tensor:
        axis = self._axis(f)
        p = torch.softmax(_wide(f), axis).movedim(axis, -1)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(*p.shape[:-1], 1)
        g = p.scatter_add(-1, drawn, p.new_full(drawn.shape, -1.0)).movedim(-1, axis)
        scale = self._scale(f, y, self.label_smoothing)
        return (g if scale is None else g * scale.sqrt()).to(f.dtype)


class _Entrywise(Loss):
    """A loss whose Hessian is diagonal: every output entry by itself."""

    @abstractmethod
    def _h(self, f: Tensor, y: Any) -> Tensor:
        """The second derivative, entry by entry."""

    def hessian(self, f: Tensor, y: Any = None) -> DiagonalHessian:
        return DiagonalHessian(self._h(f, y))

    def terms(self, f: Tensor, y: Any) -> float:
        return float(f.numel())

    def _same_shape(self, f: Tensor, y: Any) -> None:
        if not isinstance(y, Tensor) or y.shape != f.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise OperandError(
                f"{type(self).__name__} got outputs {tuple(f.shape)} and targets {got}; expected equal shapes"
            )


@dataclass(frozen=True)
class SquaredError(_Entrywise):
    """Half the sum of squares ½ scale ‖f − y‖²: H = scale · I.

    A term is a row of outputs, or, with ``per_entry``, a single output. torch's ``mse_loss`` has no ½ and averages over
    all entries: that is ``SquaredError(2.0, per_entry=True)``. A Gaussian likelihood of variance σ² is scale = 1/σ².
    """

    scale: float = 1.0
    per_entry: bool = False

    def value(self, f: Tensor, y: Any) -> Tensor:
        self._same_shape(f, y)
        return 0.5 * self.scale * (f - y).square().sum()

    def _h(self, f: Tensor, y: Any) -> Tensor:
        return torch.full_like(f, self.scale)

    def terms(self, f: Tensor, y: Any) -> float:
        return float(f.numel() if self.per_entry or f.ndim < 2 else f.numel() // f.shape[-1])

    def sampled_gradient(self, f: Tensor, generator: torch.Generator | None = None, y: Any = None) -> Tensor:
        """√scale times a standard normal vector."""
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return self.scale**0.5 * noise


@dataclass(frozen=True)
class BinaryCrossEntropy(_Entrywise):
    """−y log σ(f) − (1 − y) log(1 − σ(f)), f logits, every entry a term: H = σ(1 − σ).

    ``pos_weight``: factor of the first term, one number or one an output, as in ``torch.nn.BCEWithLogitsLoss``.
    """

    pos_weight: float | tuple[float, ...] | None = None

    def _positive(self, f: Tensor) -> Tensor | None:
        return None if self.pos_weight is None else torch.tensor(self.pos_weight, dtype=f.dtype, device=f.device)

    def value(self, f: Tensor, y: Any) -> Tensor:
        self._same_shape(f, y)
        y = y.to(f.dtype)
        return F.binary_cross_entropy_with_logits(f, y, pos_weight=self._positive(f), reduction="sum")

    def _h(self, f: Tensor, y: Any) -> Tensor:
        p, w = torch.sigmoid(f), self._positive(f)
        h = p * torch.sigmoid(-f)
        if w is None or y is None:
            return h
        self._same_shape(f, y)
        return h * (1.0 + (w - 1.0) * y.to(f.dtype))

    def sampled_gradient(self, f: Tensor, generator: torch.Generator | None = None, y: Any = None) -> Tensor:
        p = torch.sigmoid(_wide(f))
        return (p - torch.bernoulli(p, generator=generator)).to(f.dtype)


@dataclass(frozen=True)
class Poisson(_Entrywise):
    """exp(f) − y f, f the logarithm of a rate, every entry a term: H = exp(f)."""

    def value(self, f: Tensor, y: Any) -> Tensor:
        self._same_shape(f, y)
        return (f.exp() - y * f).sum()

    def _h(self, f: Tensor, y: Any) -> Tensor:
        return f.exp()

    def sampled_gradient(self, f: Tensor, generator: torch.Generator | None = None, y: Any = None) -> Tensor:
        rate = _wide(f).exp()
        return (rate - torch.poisson(rate, generator=generator)).to(f.dtype)


@dataclass(frozen=True)
class CustomLoss(Loss):
    """A loss of your own.

    Args:
        of_sum: (f, y) -> scalar, the sum over terms.
        hessian_product: (f, y, v) -> H v for v of f's shape. Without it, only ``Hessian`` and ``Jacobian`` work.
        count: (f, y) -> how many terms; default the leading dimension of f.
    """

    of_sum: Callable[[Tensor, Any], Tensor]
    hessian_product: Callable[[Tensor, Any, Tensor], Tensor] | None = None
    count: Callable[[Tensor, Any], float] | None = None

    def value(self, f: Tensor, y: Any) -> Tensor:
        return self.of_sum(f, y)

    def hessian(self, f: Tensor, y: Any = None) -> ProductHessian:
        given = self.hessian_product
        if given is None:
            raise OperandError(
                "a loss of your own has no Hessian in its outputs; give CustomLoss(fn, hessian_product=...), which "
                "returns H v for (f, y, v): it is never differentiated twice here"
            )
        return ProductHessian(lambda v: given(f, y, v), f.ndim)

    def terms(self, f: Tensor, y: Any) -> float:
        return float(f.shape[0] if self.count is None else self.count(f, y))

    def sampled_gradient(self, f: Tensor, generator: torch.Generator | None = None, y: Any = None) -> Tensor:
        raise OperandError("a loss of your own has no labels to draw; use GGN, or Fisher with EmpiricalFisher()")


def _wide(f: Tensor) -> Tensor:
    return f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
