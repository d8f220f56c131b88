"""torch's loss modules and functions as :class:`~ritz.curvature.losses.Loss` values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OperandError
from .losses import BinaryCrossEntropy, CrossEntropy, CustomLoss, Loss, Poisson, SquaredError

FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
}


def as_loss(loss: Any, reduction: str | None = None) -> tuple[Loss, str]:
    """A loss value and its reduction.

    Args:
        loss: a value of :mod:`ritz.curvature`; a module of torch (``CrossEntropyLoss``, ``MSELoss``,
            ``BCEWithLogitsLoss``, ``PoissonNLLLoss``) or its function; or a callable (f, y) -> scalar, which has no
            Hessian in closed form.
        reduction: "mean" or "sum" over loss terms; None takes the module's own, else "mean".

    Raises:
        OperandError: an unknown reduction, one that contradicts the module's, options of a module without a rule here.
    """
    if reduction not in (None, "mean", "sum"):
        raise OperandError(f"reduction={reduction!r}; expected 'mean', 'sum' or None (that of the loss module)")
    try:
        loss = FUNCTIONS[loss]() if loss in FUNCTIONS else loss
    except TypeError:
        pass  # not hashable
    if isinstance(loss, Loss):
        return loss, reduction or "mean"
    if isinstance(loss, nn.modules.loss._Loss):
        if any(type(loss).forward is kind.forward for kind in FUNCTIONS.values()):
            return _module(loss, reduction)
        if type(loss).__module__.startswith("torch."):
            return _module(loss, reduction)  # which refuses it by name
        reduction = reduction or str(loss.reduction)  # a subclass that computes something else
    if callable(loss):
        kind = reduction or "mean"
        return CustomLoss(_summed(loss) if kind == "mean" else loss), kind
    raise OperandError(
        f"the loss is a {type(loss).__name__}; expected CrossEntropy(), SquaredError(), BinaryCrossEntropy(), "
        "Poisson(), CustomLoss(...), a loss module of torch, or a callable (outputs, targets) -> scalar"
    )


def _summed(loss: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """The sum behind a callable that averages over the leading dimension."""

    def of_sum(f: Tensor, y: Any) -> Tensor:
        return loss(f, y) * f.shape[0]

    return of_sum


def _module(loss: nn.Module, reduction: str | None) -> tuple[Loss, str]:
    name, own = type(loss).__name__, str(loss.reduction)
    if own not in ("mean", "sum"):
        raise OperandError(f"{name}(reduction={own!r}) is no scalar; expected 'mean' or 'sum'")
    if reduction is not None and reduction != own:
        raise OperandError(f"reduction={reduction!r} was asked of {name}(reduction={own!r}); make them agree")
    if isinstance(loss, nn.CrossEntropyLoss):
        weight = None if loss.weight is None else tuple(loss.weight.tolist())
        return CrossEntropy(loss.label_smoothing, loss.ignore_index, weight, class_axis=1), own
    if isinstance(loss, nn.MSELoss):
        return SquaredError(2.0, per_entry=True), own
    if isinstance(loss, nn.BCEWithLogitsLoss) and loss.weight is None:
        w = None if loss.pos_weight is None else loss.pos_weight.tolist()
        return BinaryCrossEntropy(tuple(w) if isinstance(w, list) else w), own
    if isinstance(loss, nn.PoissonNLLLoss) and loss.log_input and not loss.full:
        return Poisson(), own
    raise OperandError(
        f"{loss} has no output Hessian here; expected CrossEntropyLoss, MSELoss, BCEWithLogitsLoss(weight=None), "
        "PoissonNLLLoss(log_input=True, full=False), or CustomLoss(fn, hessian_product=...)"
    )
