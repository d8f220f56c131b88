"""A plain callable as an operator: blocks, captured tensors and the adjoint product are found, not declared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdjointUnavailableError, NonFiniteError, OperandError, TransformError
from ..numerics import (
    Autocast,
    in_transform,
    refuse_transforms,
    refuse_vmap,
    under_autocast,
    user_autocast,
    version,
    without_cast_cache,
)
from .base import Gradients, LinearOperator
from .capture import Seen, captured_tensors, depends, sequence_number

Product = Callable[[Tensor], Tensor]


class FunctionOperator(LinearOperator):
    """A matrix given by its product ``fn``.

    Args:
        fn: takes a vector (m,) and returns (n,), or a block (m, k) and returns (n, k); linear.
        shape, dtype, device: of the matrix.
        adjoint: the adjoint product, if there is a better one than autograd's.
        block: True: ``fn`` takes blocks, False: vectors only, None: two columns are probed once, and a column loop is
            used where the block comes out wrong.

    Gradients reach every tensor that ``fn`` closes over, whether leaf, non-leaf or module parameter.
    """

    def __init__(
        self,
        fn: Product,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        hermitian: bool | None = None,
        psd: bool | None = None,
        adjoint: Product | None = None,
        block: bool | None = None,
    ) -> None:
        super().__init__(shape, dtype, device, hermitian=hermitian, psd=psd)
        self.fn, self.adjoint_fn = fn, adjoint
        self._blocks: dict[str, bool | None] = {"product": block, "adjoint": block}  # shared with bound forms
        self._autocast: dict[str, Autocast] | None = None

    # -- products -------------------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        return self._apply(self.fn, "product", X, self.shape[0])

    def _apply(self, fn: Product, which: str, X: Tensor, rows: int) -> Tensor:
        block = self._blocks[which]
        if block is None and X.shape[1] != 1:
            block = self._blocks[which] = self._takes_blocks(fn, X.shape[0])
        if block is None:
            try:
                return self._call(fn, X, False, rows)
            except Exception as error:
                if isinstance(error, (TransformError, NonFiniteError, torch.OutOfMemoryError)):
                    raise
                try:  # perhaps it takes blocks only
                    Y = self._call(fn, X, True, rows)
                except Exception as other:
                    raise error from other
                self._blocks[which] = True
                return Y
        return self._call(fn, X, block, rows)

    def _call(self, fn: Product, X: Tensor, block: bool, rows: int) -> Tensor:
        with under_autocast(self._user_autocast(), self.device):
            if block:
                return _own(self._check(fn(X), (rows, X.shape[1])), X)
            columns = [self._check(fn(x), (rows,)) for x in X.unbind(1)]
            return _own(columns[0].unsqueeze(1), X) if len(columns) == 1 else torch.stack(columns, dim=1)

    def _user_autocast(self) -> dict[str, Autocast]:
        return self._autocast or user_autocast()

    def _tolerance(self) -> float:
        """How closely two ways to the same product should agree."""
        enabled, lower = self._user_autocast().get(self.device.type, (False, self.dtype))
        return max(4 * torch.finfo(lower).eps if enabled else 0.0, torch.finfo(self.dtype).eps ** 0.5, 1e-6)

    def _takes_blocks(self, fn: Product, columns: int) -> bool:
        """Probe two columns: a callable such as ``lambda x: d * x`` takes a block without a word and gets it wrong.

        Gradients stay on as they are: a callable may cache what it computes on its first call.
        """
        X = _probe(columns, 2, self.dtype, self.device)
        with under_autocast(self._user_autocast(), self.device):
            try:
                single = torch.stack([fn(X[:, 0]), fn(X[:, 1])], dim=1)
            except Exception as error:
                if isinstance(error, (TransformError, torch.OutOfMemoryError)):
                    raise
                return True  # it wants blocks; if not even those, the call itself tells what is wrong
            try:
                block = fn(X)
            except Exception as error:
                if isinstance(error, (TransformError, torch.OutOfMemoryError)):
                    raise
                return False
        if not isinstance(block, Tensor) or block.shape != single.shape:
            return False
        refuse_vmap(single, "the product")
        single, block = single.detach(), block.detach()
        if not bool(torch.isfinite(single).all()):
            raise NonFiniteError(
                "the product of the callable with finite numbers returned NaN or Inf; check its tensors"
            )
        return bool((block - single).norm() <= self._tolerance() * single.norm())

    def _check(self, y: Any, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(y, Tensor) or tuple(y.shape) != shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise OperandError(
                f"the product returned {got}; expected a tensor of shape {shape}: check the callable or shape= "
                "(block=True says that it takes blocks, block=False that it takes vectors)"
            )
        if y.device != self.device:
            raise OperandError(f"the product returned a tensor on {y.device}; the operator is on {self.device}")
        if y.dtype != self.dtype:
            if not (y.is_floating_point() or y.is_complex()) or not torch.is_autocast_enabled(self.device.type):
                raise OperandError(f"the product returned {y.dtype}; the operator is {self.dtype}: pass dtype=")
            y = y.to(self.dtype)
        return y

    # -- adjoint --------------------------------------------------------------------------------------------------

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.adjoint_product(X.shape[1])(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        if self.hermitian:
            return self._matmat
        if (adjoint := self.adjoint_fn) is not None:
            return lambda X: self._apply(adjoint, "adjoint", X, self.shape[1])
        return self._recorded_adjoint(width)

    def _recorded_adjoint(self, width: int) -> Callable[[Tensor], Tensor]:
        """Record one forward product (its VJP does not depend on the point), replay the VJP for every block."""
        point = _probe(self.shape[1], width, self.dtype, self.device)
        if in_transform():  # requires_grad_ is refused there
            with torch.enable_grad():
                pullback = torch.func.vjp(self._matmat, point)[1]
            return lambda X: pullback(X)[0]
        try:
            with torch.enable_grad():
                Y = self._matmat(point.requires_grad_())
            if not Y.requires_grad or not depends(Y, point):
                raise RuntimeError("its output does not depend on its input through differentiable operations")
        except RuntimeError as error:
            raise self._no_adjoint(str(error)) from error
        checked = False

        def replay(X: Tensor) -> Tensor:
            nonlocal checked
            record = torch.is_grad_enabled()
            (out,) = torch.autograd.grad(Y, point, X, retain_graph=True, create_graph=record)
            if not checked:  # costs nothing but two inner products, since the point was not zero
                checked = self._check_adjoint(point.detach(), Y.detach(), X.detach(), out.detach())
            return out

        return replay

    def _check_adjoint(self, x: Tensor, Y: Tensor, X: Tensor, out: Tensor) -> bool:
        """⟨A x, X⟩ = ⟨x, Aᴴ X⟩ must hold; returns whether X could tell."""
        left, right = (torch.vdot(a.reshape(-1), b.reshape(-1)) for a, b in ((Y, X), (x, out)))
        gap, scale = float((left - right).abs()), float(Y.norm() * X.norm())
        if gap > self._tolerance() * scale:
            raise self._no_adjoint(
                f"<Ax, y> and <x, A^H y> differ by {gap / scale:.1e} of |Ax||y|: a part of the product is hidden from "
                "autograd (NumPy, detach), or the callable is not linear"
            )
        return scale > 0

    def _no_adjoint(self, why: str) -> AdjointUnavailableError:
        return AdjointUnavailableError(
            f"the adjoint product of the callable was needed, and autograd could not give it ({why}); "
            "pass adjoint=..., or hermitian=True if the operator is Hermitian"
        )

    # -- gradients ------------------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        zero = torch.zeros(self.shape[1], 1, dtype=self.dtype, device=self.device)
        return self.capture(zero)[1].tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self.capture(Q[:, :1])[1].pair(Lam, Q)

    def capture(self, X: Tensor) -> tuple[Tensor, LinearOperator]:
        bound = CapturedFunction(self)
        if in_transform():
            with torch.no_grad():
                return bound._matmat(X), bound  # not deferrable: the pairing records the product instead
        with torch.enable_grad():
            if self._blocks["product"] is None and X.shape[1] != 1:  # before, so that the product runs only once
                self._blocks["product"] = bound._takes_blocks(self.fn, self.shape[1])
            operand = X.detach()
            seen, before = Seen(operand), sequence_number()
            with without_cast_cache(), seen:
                Y = bound._matmat(operand)
        refuse_transforms(Y, "the product")  # here: detach drops a forward-mode tangent
        captured, complete = captured_tensors(Y, seen, before)
        bound.set_captured(captured, complete, unchanged=seen.versions(captured))
        return Y.detach(), bound


class CapturedFunction(FunctionOperator):
    """A callable together with the tensors that one product was seen to depend on, for one run."""

    def __init__(self, source: FunctionOperator) -> None:
        super().__init__(
            source.fn,
            source.shape,
            source.dtype,
            source.device,
            hermitian=source.hermitian,
            psd=source.psd,
            adjoint=source.adjoint_fn,
        )
        self._blocks = source._blocks
        self._autocast = user_autocast()
        self._captured: tuple[Tensor, ...] = ()
        self._complete = False
        self._versions: list[tuple[Tensor, int]] = []
        self._replay: tuple[int, Product] | None = None  # the adjoint product recorded last, and its width

    def set_captured(self, tensors: tuple[Tensor, ...], complete: bool, unchanged: list[tuple[Tensor, int]]) -> None:
        """Fix what the product depends on; ``complete`` says that nothing else can have been missed."""
        self._captured, self._complete, self._versions = tensors, complete, unchanged

    @property
    def deferrable(self) -> bool:
        return self._complete

    def tensors(self) -> tuple[Tensor, ...]:
        return self._captured

    def capture(self, X: Tensor) -> tuple[Tensor, LinearOperator]:
        with torch.no_grad():
            return self._matmat(X), self

    def _rmatmat(self, X: Tensor) -> Tensor:
        # A run over A.mH or A.mH @ A comes here at every step; without this it would pay a forward product each time.
        if torch.is_grad_enabled() or in_transform():
            return super()._rmatmat(X)
        if self._replay is None or self._replay[0] != X.shape[1]:
            self._replay = X.shape[1], self.adjoint_product(X.shape[1])
        return self._replay[1](X)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        from ..pairing import pair_by_autograd

        if not self._complete:  # a Run never comes here: it records the products of such a callable instead
            raise OperandError(
                "the callable uses a tensor together with one computed from it, or hides a tensor from PyTorch's "
                "function mode; its gradient cannot be paired later: differentiate A @ X or a ritz function"
            )
        return pair_by_autograd(self._matmat, self._captured, Lam, Q)

    def check_unchanged(self) -> None:
        for tensor, before in self._versions:
            if version(tensor) != before:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} that the operator's callable closes over was changed in "
                    "place between the forward pass and backward; its gradient would be wrong: change a copy, or call "
                    "backward first"
                )


def _probe(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fixed block without structure (quadratic phases), not from a generator: those are refused under vmap."""
    i = torch.arange(rows, dtype=torch.float64).unsqueeze(1)
    j = torch.arange(columns, dtype=torch.float64)
    phase = 0.7 * i * i + (1.3 + j) * i + 2.1 * j * j + 0.5
    X = torch.complex(phase.sin(), (1.7 * phase).cos()) if dtype.is_complex else phase.sin()
    return X.to(dtype).to(device)


def _own(Y: Tensor, X: Tensor) -> Tensor:
    """Y, copied where it is X or a view of it: callers write into products."""
    base = X if X._base is None else X._base
    return Y.clone() if Y is X or (Y._base is not None and Y._base is base) else Y
