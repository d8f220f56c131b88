"""A network at one batch as a linear map: J V and Jᵀ U from one recorded pass, and the Hessian of a scalar likewise.

Both come from graphs that are recorded once: the pass itself gives Jᵀ u by one backward pass, and since Jᵀ u is linear
in u, a backward pass through *that* graph gives J v. Nothing is evaluated anew between products, and each costs about
what one backward pass does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from .convolutions import LinearConvolutions
from .network import Network

BLOCK_BYTES = 64 << 20  # activations of all columns that go through together


class Saved:
    """Counts the bytes that autograd keeps for backward, each storage once."""

    def __init__(self, apart: Sequence[Tensor]) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in apart}
        self.bytes = 0

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return t.detach()  # t itself, where it is an operation's output, would keep its own graph alive

    def counting(self) -> Any:
        """Context in which saved tensors are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    @classmethod
    def of(cls, record: Callable[[], None], apart: Sequence[Tensor]) -> int:
        """Bytes that ``record`` keeps; a network that uses torch.func.grad inside refuses to be counted."""
        saved = cls(apart)
        try:
            with saved.counting():
                record()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            record()
            return BLOCK_BYTES  # as if one column were all that fits
        return saved.bytes


def leaves_of(network: Network, recorded: Sequence[Tensor]) -> list[Tensor]:
    """What to differentiate in: the parameters among ``recorded`` as they are, fresh leaves for the others."""
    own = {id(t) for t in recorded}
    return [p if id(p) in own else p.detach().requires_grad_() for p in network.parameters]


class Linearization:
    """J of the outputs at one batch, in the selected parameters.

    With ``recorded`` tensors the products are differentiable in them (to any order), and nothing may be kept.
    Vectors are the rows of their blocks: V (k, P), U (k, *shape of f).
    """

    def __init__(self, network: Network, x: Any, recorded: Sequence[Tensor] = ()) -> None:
        self.network, self._record = network, bool(recorded)
        self._leaves = leaves_of(network, recorded)

        def record() -> None:
            with contextlib.nullcontext() if recorded else LinearConvolutions():
                self._f = network(self._leaves, x)
            if not self._f.requires_grad:
                raise OperandError(
                    "the outputs do not depend on the selected parameters; check params=, and that the forward "
                    "pass does not detach or run under no_grad"
                )
            self._u = torch.zeros_like(self._f, requires_grad=True)
            self._g = torch.autograd.grad(self._f, self._leaves, self._u, create_graph=True, allow_unused=True)

        with torch.enable_grad():
            self.bytes = Saved.of(record, self._leaves)
        self.f = self._f if recorded else self._f.detach()

    def jvp(self, V: Tensor) -> Tensor:
        """J V, (k, P) -> (k, *shape of f)."""
        used = [i for i, g in enumerate(self._g) if g is not None and g.requires_grad]
        parts = self.network.split(V)
        if not used:
            return V.new_zeros((V.shape[0],) + self._f.shape)

        def one(vectors: Sequence[Tensor], batched: bool) -> tuple[Tensor]:
            found = _grad([self._g[i] for i in used], [self._u], vectors, batched, self._record)[0]
            return (found if found is not None else self._zero(vectors, batched),)

        return _columns(one, [parts[i] for i in used], self.bytes)[0]

    def vjp(self, U: Tensor) -> Tensor:
        """Jᵀ U, (k, *shape of f) -> (k, P)."""

        def one(vectors: Sequence[Tensor], batched: bool) -> tuple[Tensor]:
            found = _grad([self._f], self._leaves, vectors, batched, self._record)
            return (self.network.join(found, (vectors[0].shape[0],) if batched else ()),)

        return _columns(one, [U], self.bytes)[0]

    def _zero(self, vectors: Sequence[Tensor], batched: bool) -> Tensor:
        return self._f.new_zeros(((vectors[0].shape[0],) if batched else ()) + self._f.shape)


class SecondDerivative:
    """The Hessian of a scalar in the selected parameters at one batch."""

    def __init__(
        self, network: Network, of: Callable[[Sequence[Tensor]], Tensor], recorded: Sequence[Tensor] = ()
    ) -> None:
        self.network, self._record = network, bool(recorded)
        self._leaves = leaves_of(network, recorded)

        def record() -> None:
            value = of(self._leaves)
            if not value.requires_grad:
                raise OperandError("the loss does not depend on the selected parameters; check params=")
            self._g = torch.autograd.grad(value, self._leaves, create_graph=True, allow_unused=True)

        with torch.enable_grad():
            self.bytes = Saved.of(record, self._leaves)

    def product(self, V: Tensor) -> Tensor:
        """H V, (k, P) -> (k, P)."""
        used = [i for i, g in enumerate(self._g) if g is not None and g.requires_grad]
        parts = self.network.split(V)
        if not used:
            return torch.zeros_like(V)

        def one(vectors: Sequence[Tensor], batched: bool) -> tuple[Tensor]:
            found = _grad([self._g[i] for i in used], self._leaves, vectors, batched, self._record)
            return (self.network.join(found, (vectors[0].shape[0],) if batched else ()),)

        return _columns(one, [parts[i] for i in used], self.bytes)[0]


def _grad(
    outputs: Sequence[Any], inputs: Sequence[Tensor], vectors: Sequence[Tensor], batched: bool, record: bool
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        outputs, inputs, vectors, retain_graph=True, create_graph=record, allow_unused=True, is_grads_batched=batched
    )


def _columns(
    one: Callable[[Sequence[Tensor], bool], tuple[Tensor, ...]], blocks: Sequence[Tensor], each: int
) -> tuple[Tensor, ...]:
    """Apply to k vectors (leading axis), as many at a time as their activations fit into ``BLOCK_BYTES``."""
    k, width = blocks[0].shape[0], max(1, BLOCK_BYTES // max(each, 1))
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, k, width):
        part = [b[start : start + width] for b in blocks]
        if part[0].shape[0] > 1:
            try:
                found.append(one(part, True))
                continue
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation whose derivative cannot be batched; if not, it fails below as well
                pass
        found += [tuple(t.unsqueeze(0) for t in one([b[i] for b in part], False)) for i in range(part[0].shape[0])]
    return tuple(torch.cat(parts) for parts in zip(*found))
