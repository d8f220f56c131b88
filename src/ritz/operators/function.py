"""A plain callable as an operator: blocks, captured tensors and the adjoint product are found, not declared."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import AdjointUnavailableError, NonFiniteError, OperandError
from ..numerics import Autocast, under_autocast, user_autocast
from .base import Gradients, LinearOperator

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
        self.block, self.adjoint_block = block, block
        self._autocast: dict[str, Autocast] | None = None

    # -- products -------------------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        if self.block is None and X.shape[1] == 1:
            try:
                return self._call(self.fn, X, False, self.shape[0])
            except (RuntimeError, ValueError, IndexError, TypeError):
                self.block = True  # perhaps it takes blocks only; if not, the call below says what is wrong
        if self.block is None:
            self.block = _takes_blocks(self.fn, self.shape[1], self.dtype, self.device)
        return self._call(self.fn, X, self.block, self.shape[0])

    def _call(self, fn: Product, X: Tensor, block: bool | None, rows: int) -> Tensor:
        with under_autocast(self._autocast or user_autocast(), self.device):
            if block:
                return self._check(fn(X), (rows, X.shape[1]))
            columns = [self._check(fn(x), (rows,)) for x in X.unbind(1)]
            return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, dim=1)

    def _check(self, y: Any, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(y, Tensor) or tuple(y.shape) != shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise OperandError(
                f"the product returned {got}; expected a tensor of shape {shape}: check the callable or shape= "
                "(block=True says that it takes blocks, block=False that it takes vectors)"
            )
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
        if self.adjoint_fn is not None:
            if self.adjoint_block is None and width > 1:
                self.adjoint_block = _takes_blocks(self.adjoint_fn, self.shape[0], self.dtype, self.device)
            return lambda X: self._call(self.adjoint_fn, X, self.adjoint_block, self.shape[1])  # type: ignore[arg-type]
        return self._recorded_adjoint(width)

    def _recorded_adjoint(self, width: int) -> Callable[[Tensor], Tensor]:
        """Record one forward product (its VJP does not depend on the point), replay the VJP for every block."""
        from ..pairing import in_transform

        zero = torch.zeros(self.shape[1], width, dtype=self.dtype, device=self.device)
        try:
            if in_transform():  # requires_grad_ is refused there
                with torch.enable_grad():
                    pullback = torch.func.vjp(self._matmat, zero)[1]
                return lambda X: pullback(X)[0]
            with torch.enable_grad():
                point = zero.requires_grad_()
                Y = self._matmat(point)
            if not Y.requires_grad or _depends(Y, point) is False:
                raise RuntimeError("its output does not depend on its input through differentiable operations")
        except RuntimeError as error:
            raise AdjointUnavailableError(
                f"the adjoint product of the callable was needed, and autograd could not give it ({error}); "
                "pass adjoint=..., or hermitian=True if the operator is Hermitian"
            ) from error

        def replay(X: Tensor) -> Tensor:
            record = torch.is_grad_enabled()
            (out,) = torch.autograd.grad(Y, point, X, retain_graph=True, create_graph=record)
            return out

        return replay

    # -- gradients ------------------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        zero = torch.zeros(self.shape[1], 1, dtype=self.dtype, device=self.device)
        return self.capture(zero)[1].tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self.capture(Q[:, :1])[1].pair(Lam, Q)

    def capture(self, X: Tensor) -> tuple[Tensor, LinearOperator]:
        from ..pairing import in_transform, refuse_transforms

        bound = CapturedFunction(self)
        if self.block is None and X.shape[1] > 1:
            with torch.no_grad():
                self.block = bound.block = _takes_blocks(self.fn, self.shape[1], self.dtype, self.device)
        if in_transform():
            with torch.no_grad():
                return bound._matmat(X), bound  # not deferrable: the pairing records the product instead
        seen = _Seen()
        before = _sequence_number()
        with torch.enable_grad(), seen:
            Y = bound._matmat(X.detach())
        refuse_transforms(Y, "the product")  # here: detach drops a forward-mode tangent
        bound.set_captured(*_captured(Y, seen, before), unchanged=seen.versions())
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
            block=source.block,
        )
        self._autocast = user_autocast()
        self._captured: tuple[Tensor, ...] = ()
        self._complete = False
        self._versions: list[tuple[Tensor, int]] = []

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

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        from ..pairing import pair_by_autograd

        return pair_by_autograd(self._matmat, self._captured, Lam, Q)

    def check_unchanged(self) -> None:
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} that the operator's callable closes over was changed in "
                    "place between the forward pass and backward; its gradient would be wrong: change a copy, or call "
                    "backward first"
                )


class _Seen(TorchFunctionMode):
    """Notes the tensors that a callable touches but did not make."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self.outside: dict[int, tuple[Tensor, int | None]] = {}
        self.inner_leaves: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        required = set()
        for t in _tensors_in((args, kwargs)):
            known = self._made.get(id(t))
            if known is not None and known() is t:
                continue
            if t.requires_grad:
                required.add(id(t))
            if id(t) not in self.outside:
                self.outside[id(t)] = (t, None if t.is_inference() else t._version)
        out = func(*args, **kwargs)
        for t in _tensors_in(out):
            if id(t) not in self.outside:
                self._made[id(t)] = weakref.ref(t)
            if t.requires_grad and t.is_leaf and id(t) not in required:
                self.inner_leaves[id(t)] = weakref.ref(t)
        return out

    def versions(self) -> list[tuple[Tensor, int]]:
        """Outside tensors without gradient and their versions, except those that the callable changes itself."""
        return [(t, v) for t, v in self.outside.values() if v is not None and not t.requires_grad and t._version == v]


def _tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [t for item in tree for t in _tensors_in(item)]
    if isinstance(tree, dict):
        return [t for item in tree.values() for t in _tensors_in(item)]
    return []


def _sequence_number() -> int:
    """Autograd's running number: nodes made from now on have larger ones."""
    with torch.enable_grad():
        return int((torch.zeros((), requires_grad=True) * 1).grad_fn._sequence_nr())  # type: ignore[union-attr]


def _captured(Y: Tensor, seen: _Seen, before: int) -> tuple[tuple[Tensor, ...], bool]:
    """The tensors that Y depends on, and whether the graph behind Y confirms that there are no others.

    The graph is walked down to whatever existed before the call (older nodes, leaves). Each such place must be a
    tensor that the mode saw, and no captured tensor may be computed from another one (both would count it).
    """
    if not Y.requires_grad:
        return (), True
    leaves: dict[int, Tensor] = {}
    places: dict[tuple[Any, int], Tensor] = {}
    for t, _ in seen.outside.values():
        if t.requires_grad and t.is_leaf:
            leaves[id(t)] = t
        elif t.requires_grad:
            places[(t.grad_fn, t.output_nr)] = t
    found: dict[int, Tensor] = {}
    stack, visited, complete = [(Y.grad_fn, Y.output_nr)], set(), True
    while stack:
        node, number = stack.pop()
        if node is None or (node, number) in visited:
            continue
        visited.add((node, number))
        variable = getattr(node, "variable", None)
        if variable is not None:
            inner = seen.inner_leaves.get(id(variable))
            if id(variable) in leaves:
                found[id(variable)] = variable
            elif inner is None or inner() is not variable:
                complete = False
        elif node._sequence_nr() <= before:
            t = places.get((node, number))
            if t is None:
                complete = False
            else:
                found[id(t)] = t
        else:
            stack.extend(node.next_functions)
    tensors = tuple(found.values())
    return tensors, complete and not _nested(tensors)


def _nested(tensors: tuple[Tensor, ...]) -> bool:
    """Whether one of the tensors is computed from another one."""
    if len(tensors) < 2 or all(t.is_leaf for t in tensors):
        return False
    nodes = {t.grad_fn for t in tensors if not t.is_leaf}
    leaves = {id(t) for t in tensors if t.is_leaf}
    visited: set[Any] = set()
    stack = [f for node in nodes for f, _ in node.next_functions]  # type: ignore[union-attr]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node in nodes or id(getattr(node, "variable", None)) in leaves:
            return True
        stack.extend(f for f, _ in node.next_functions)
    return False


def _depends(Y: Tensor, x: Tensor) -> bool:
    stack, visited = [Y.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if getattr(node, "variable", None) is x:
            return True
        stack.extend(f for f, _ in node.next_functions)
    return False


def _takes_blocks(fn: Product, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Probe two columns: a callable such as ``lambda x: d * x`` takes a block without a word and gets it wrong."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(columns, 2, generator=generator, dtype=dtype).to(device)
    with torch.no_grad():
        try:
            single = torch.stack([fn(X[:, 0]), fn(X[:, 1])], dim=1)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return True  # it wants blocks; if not even those, the call itself tells what is wrong
        try:
            block = fn(X)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
    if not isinstance(block, Tensor) or block.shape != single.shape:
        return False
    if not bool(torch.isfinite(single).all()):
        raise NonFiniteError("the product of the callable with finite numbers returned NaN or Inf; check its tensors")
    tolerance = torch.finfo(single.dtype).eps ** 0.5
    return bool((block - single).norm() <= tolerance * single.norm())
