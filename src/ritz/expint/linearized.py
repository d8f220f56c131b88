"""∂f/∂y and ∂f/∂t of a right-hand side at one point as operators, from one recorded evaluation.

The evaluation gives Jᵀu by one backward pass, and as Jᵀu is linear in u, a backward pass through *that* graph gives
J x. Nothing is evaluated anew between products; on small problems this is four times faster than forward mode, and it
asks less of the operations inside of f (kernels and custom functions rarely have forward derivatives).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import in_transform, under_autocast, user_autocast
from ..operators import LinearOperator
from ..operators.base import Gradients
from ..operators.capture import nested
from ..pairing import Cotangents, Pair, Run
from .watch import Found, watch

Rate = Callable[[Tensor, Tensor], Tensor]


class _Record:
    """One evaluation at leaves t, y, with what has been differentiated of it so far."""

    def __init__(self, t: Tensor, y: Tensor, value: Tensor) -> None:
        self.t, self.y, self.value = t, y, value
        self.u = torch.zeros_like(value, requires_grad=True)
        self._transposed: dict[str, Tensor | None] = {}

    def transposed(self, which: str) -> Tensor | None:
        """Jᵀu or (∂f/∂t)ᵀu as a function of u; None where f does not depend on it."""
        if which not in self._transposed:
            g = None
            if self.value.requires_grad:
                with torch.enable_grad():
                    g = _grad([self.value], [getattr(self, which)], [self.u], create=True)[0]
            self._transposed[which] = g if g is not None and g.requires_grad else None
        return self._transposed[which]


class Linearization:
    """The derivatives of f at (t, y).

    Args:
        f: (t, y) -> (n,), t of no dimension and y (n,); both may carry a graph, which reaches them by the pairings.
    """

    def __init__(self, f: Rate, t: Tensor, y: Tensor) -> None:
        self.f, self.t, self.y = f, t, y
        self.found: Found | None = None
        self._autocast = user_autocast()  # backward may evaluate f again, under the state of this moment
        self._record: _Record | None = None

    def record(self) -> _Record:
        """The recorded evaluation, made where there is none."""
        if self._record is None:
            # Derivatives are taken here whatever the mode of the caller, inference mode included.
            with torch.inference_mode(False), torch.enable_grad(), under_autocast(self._autocast, self.y.device):
                t, y = (x.clone() if x.is_inference() else x.detach() for x in (self.t, self.y))
                t, y = t.requires_grad_(), y.requires_grad_()
                if self.found is None:
                    value, self.found = watch(lambda: self.f(t, y), lambda out: [out], t, y)
                else:
                    value = self.f(t, y)
                self._record = _Record(t, y, value)
        return self._record

    def release(self) -> None:
        """Drop the recorded graph; the next product makes it anew."""
        self._record = None

    @property
    def captured(self) -> tuple[Tensor, ...]:
        """The tensors with gradient that f closes over."""
        if self.found is None:
            self.record()
        assert self.found is not None
        return tuple(self.found.tensors.values())

    def recording(self, *operands: Tensor) -> bool:
        """Whether a product must be differentiable by autograd."""
        if in_transform():
            return True
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.t, self.y, *operands, *self.captured))

    def aliased(self) -> tuple[Tensor, Tensor, Tensor]:
        """t, y and f(t, y) on the caller's graph, as tensors that can be differentiated in."""
        t, y = (x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (self.t, self.y))
        with under_autocast(self._autocast, y.device):
            return t, y, self.f(t, y)


class _Derivative(LinearOperator):
    """∂f/∂y (n, n) or ∂f/∂t (n, 1)."""

    which = "y"

    def __init__(self, at: Linearization) -> None:
        n = at.y.numel()
        super().__init__((n, n if self.which == "y" else 1), at.y.dtype, at.y.device)
        self.at = at

    @property
    def zero(self) -> bool:
        """Whether autograd saw no dependence at all; inside of a transform nobody looks."""
        return not in_transform() and self.at.record().transposed(self.which) is None

    def _matmat(self, X: Tensor) -> Tensor:
        if in_transform():
            return torch.stack([self._forward_mode(x) for x in X.unbind(1)], 1)
        if self.at.recording(X):
            with torch.enable_grad():
                record = _Record(*self.at.aliased())
                g = record.transposed(self.which)
            return X.new_zeros(self.shape[0], X.shape[1]) if g is None else _columns([g], record.u, self._in(X), True)
        record = self.at.record()
        g = record.transposed(self.which)
        return X.new_zeros(self.shape[0], X.shape[1]) if g is None else _columns([g], record.u, self._in(X), False)

    def _in(self, X: Tensor) -> Tensor:
        """Columns as cotangents of Jᵀu, (k, …), the shape of y or of t."""
        return X.mT if self.which == "y" else X[0].to(self.at.t.dtype)

    def _forward_mode(self, x: Tensor) -> Tensor:
        at = self.at
        if self.which == "y":
            return torch.func.jvp(lambda y: at.f(at.t, y), (at.y,), (x,))[1]
        return torch.func.jvp(lambda t: at.f(t, at.y), (at.t,), (x[0].to(at.t.dtype),))[1]

    def _rmatmat(self, X: Tensor) -> Tensor:
        at = self.at
        if in_transform():
            point = at.y if self.which == "y" else at.t
            call = (lambda y: at.f(at.t, y)) if self.which == "y" else (lambda t: at.f(t, at.y))
            pull = torch.func.vjp(call, point)[1]
            return torch.stack([pull(x)[0].reshape(-1).to(X.dtype) for x in X.unbind(1)], 1)
        if at.recording(X):
            with torch.enable_grad():
                t, y, value = at.aliased()
            return _columns([value], y if self.which == "y" else t, X.mT, True).to(X.dtype)
        record = at.record()
        return _columns([record.value], record.y if self.which == "y" else record.t, X.mT, False).to(X.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        if self.zero:
            return ()
        return (self.at.y, self.at.t, *self.at.captured)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        """Σ_j λ_jᵀ J q_j = Σ_j ⟨Jᵀλ_j, q_j⟩, differentiated: twice through f, and y is a leaf of its own there."""
        if not self.deferrable:  # a Run never comes here: it records the products instead
            raise OperandError(
                "func uses a tensor together with one computed from it, or hides one; its Jacobian cannot be paired "
                "later: differentiate J @ X"
            )
        record, tensors = self.at.record(), self.tensors()
        wanted = [record.y, record.t, *tensors[2:]]
        none: Gradients = (None,) * len(tensors)
        if not record.value.requires_grad:
            return none
        total: list[Tensor | None] = [None] * len(wanted)
        point = record.y if self.which == "y" else record.t
        for lam, q in zip(Lam.unbind(1), Q.unbind(1), strict=True):
            with torch.enable_grad():
                g = _grad([record.value], [point], [lam], create=True)[0]
                if g is None or not g.requires_grad:
                    return none
                s = (g.reshape(-1) * q.to(g.dtype)).sum()
            parts = _grad([s], wanted, None)
            total = [b if a is None else (a if b is None else a + b) for a, b in zip(total, parts, strict=True)]
        return tuple(g if x.requires_grad else None for g, x in zip(total, tensors, strict=True))

    @property
    def deferrable(self) -> bool:
        if in_transform():
            return False
        captured = self.at.captured
        assert self.at.found is not None
        return not self.at.found.hidden and not nested(captured)

    def check_unchanged(self) -> None:
        if self.at.found is not None:
            self.at.found.check_unchanged()


class JacobianOperator(_Derivative):
    """∂f/∂y at one point, (n, n): products cost about one backward pass through f a column, adjoint ones half."""

    which = "y"


class TimeDerivative(_Derivative):
    """∂f/∂t at one point as a matrix of one column."""

    which = "t"


def attached(J: LinearOperator, x: Tensor, name: str) -> Tensor:
    """J x with first derivatives by the pairing: only x is kept for backward, not the graph of the product."""
    reaches = x.requires_grad
    with Run(J, x) as run:
        block = x.detach().unsqueeze(1)
        value = run.matmat(block)
        if not run.wants_gradient():
            return value.squeeze(1)

    def rule(g: Tensor) -> Cotangents:
        return Cotangents([Pair(g)], [run.adjoint(1)(g) if reaches else None])

    return run.attach([value], rule, [block], name=name)[0].squeeze(1)


def _grad(outputs: Any, inputs: Any, cotangents: Any, *, create: bool = False, batched: bool = False) -> Any:
    with torch.inference_mode(False):
        return torch.autograd.grad(
            outputs, inputs, cotangents,
            retain_graph=True, create_graph=create, allow_unused=True, is_grads_batched=batched,
        )  # fmt: skip


def _columns(outputs: Sequence[Tensor], point: Tensor, V: Tensor, create: bool) -> Tensor:
    """The pull-back of the rows of V (k, …) to the point, as columns (n, k): all at once where the operations of f can
    be batched, one by one otherwise.
    """
    k = V.shape[0]
    zero = point.new_zeros(point.numel(), k)
    if not outputs[0].requires_grad:
        return zero
    if k > 1:
        try:
            g = _grad(outputs, [point], [V], create=create, batched=True)[0]
            # A copy: g may be an expanded view, or the memory of V, and callers write into products.
            return zero if g is None else g.reshape(k, -1).mT.clone()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # not an operation that can be batched; if it is something else, it fails below as well
            pass
    parts = [_grad(outputs, [point], [v], create=create)[0] for v in V.unbind(0)]
    return zero if parts[0] is None else torch.stack([p.reshape(-1) for p in parts], 1)
