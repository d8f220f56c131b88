"""What a right-hand side closes over: found by watching an evaluation, for whoever will repeat it in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import version, without_cast_cache
from ..operators.capture import Seen, sequence_number

T = TypeVar("T")


@dataclass
class Found:
    """What evaluations were seen to depend on.

    Attributes:
        tensors: those that require grad, by identity: leaves and results that existed before.
        hidden: whether something that existed before, no leaf, could not be found as a tensor.
        versions: other tensors that were touched, with their counts of in-place changes.
    """

    tensors: dict[int, Tensor] = field(default_factory=dict)
    hidden: bool = False
    versions: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        """Join what another evaluation depends on."""
        self.tensors |= other.tensors
        self.hidden = self.hidden or other.hidden
        self.versions = other.versions | self.versions  # the earliest count stays

    def check_unchanged(self) -> None:
        """Raise where a tensor that was touched has been changed in place since."""
        for tensor, before in self.versions.values():
            if version(tensor) != before:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} that func or jacobian closes over was changed in place "
                    "between the forward pass and backward; the gradient of odeint would be wrong: change a copy, or "
                    "call backward first"
                )


def watch(call: Callable[[], T], outputs: Callable[[T], Sequence[Tensor]], *operands: Tensor) -> tuple[T, Found]:
    """Run ``call`` with gradients on, and find what its ``outputs`` depend on, apart from the ``operands``."""
    seen, before = Seen(torch.empty(0)), sequence_number()
    with torch.enable_grad(), without_cast_cache(), seen:
        value = call()
        results = outputs(value)
    found = _reached(results, seen, before)
    own = {id(x) for x in operands}
    found.tensors = {i: t for i, t in found.tensors.items() if i not in own}
    others = seen.versions([*found.tensors.values(), *operands])
    found.versions = {id(t): (t, v) for t, v in others}
    return value, found


def _reached(outputs: Sequence[Tensor], seen: Seen, before: int) -> Found:
    """Walk the graph behind the outputs down to whatever existed before: leaves, and results that the mode saw.

    As :func:`ritz.operators.capture.captured_tensors`, but tells tensors computed from each other (which the caller
    can treat) from hidden ones, and takes leaves that the mode did not see (behind a custom Function) from their nodes.
    """
    found = Found()
    places: dict[tuple[Any, int], Tensor] = {}
    for t, _ in seen.outside.values():
        if t.requires_grad and not t.is_leaf:
            places[(t.grad_fn, t.output_nr)] = t
    found.tensors = {id(t): t for t in outputs if t.requires_grad and t.is_leaf}
    stack: list[tuple[Any, int]] = [(t.grad_fn, t.output_nr) for t in outputs if t.grad_fn is not None]
    visited: set[tuple[Any, int]] = set()
    while stack:
        node, number = stack.pop()
        if node is None or (node, number) in visited:
            continue
        visited.add((node, number))
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.tensors[id(variable)] = variable
        elif node._sequence_nr() <= before:
            t = places.get((node, number))
            if t is None:
                found.hidden = True
            else:
                found.tensors[id(t)] = t
        else:
            stack.extend(node.next_functions)
    return found


def refuse_hidden(found: Found) -> None:
    """Raise where a tensor cannot be handed to a node of the graph that stands for all evaluations."""
    if found.hidden:
        raise OperandError(
            "checkpoints= came with a func, linear or jacobian that hides a tensor with gradient from PyTorch's "
            "function mode (computed outside, used inside of a custom autograd.Function); expected plain operations: "
            "leave checkpoints=None, which keeps the graph of every step"
        )
