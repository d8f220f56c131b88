"""What a callable closes over: a mode that notes what it touches, and a walk over the graph that confirms it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..numerics import version


class Seen(TorchFunctionMode):
    """Notes the tensors that a callable touches but did not make."""

    def __init__(self, operand: Tensor) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[Tensor]] = {id(operand): weakref.ref(operand)}
        self.outside: dict[int, tuple[Tensor, int]] = {}
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
                self.outside[id(t)] = (t, version(t))
        out = func(*args, **kwargs)
        for t in _tensors_in(out):
            if id(t) not in self.outside:
                self._made[id(t)] = weakref.ref(t)
            if t.requires_grad and t.is_leaf and id(t) not in required:
                self.inner_leaves[id(t)] = weakref.ref(t)
        return out

    def versions(self, captured: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Outside tensors that are not captured, and their versions, except those that the callable changes itself."""
        others = {id(t) for t in captured}
        return [(t, v) for t, v in self.outside.values() if id(t) not in others and version(t) == v]


def _tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        # A callable may use torch.func inside (a Gauss-Newton product): look under its wrappers.
        while torch._C._functorch.is_functorch_wrapped_tensor(tree):
            tree = torch._C._functorch.get_unwrapped(tree)
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [t for item in tree for t in _tensors_in(item)]
    if isinstance(tree, dict):
        return [t for item in tree.values() for t in _tensors_in(item)]
    return []


def sequence_number() -> int:
    """Autograd's running number: nodes made from now on have larger ones."""
    with torch.enable_grad():
        return int((torch.zeros((), requires_grad=True) * 1).grad_fn._sequence_nr())  # type: ignore[union-attr]


def captured_tensors(Y: Tensor, seen: Seen, before: int) -> tuple[tuple[Tensor, ...], bool]:
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
    return tensors, complete and not nested(tensors)


def nested(tensors: tuple[Tensor, ...]) -> bool:
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


def depends(Y: Tensor, x: Tensor) -> bool:
    """Whether the graph behind Y reaches the leaf x."""
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
