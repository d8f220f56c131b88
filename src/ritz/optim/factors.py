"""The factors of several layers at once, and K Kᵀ applied: by one product where there is a form of it, else by two."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..operators.structured import Structure
from .layer import MatrixLayer

FactorOf = Callable[[MatrixLayer, int], Tensor]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor as it is, several with a batch axis in front."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


def unstack(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """The inverse of :func:`stack`."""
    return [tensor] if count == 1 else tensor.unbind()


@functools.cache
def has_square(structure: Structure) -> bool:
    """Whether the structure has a form of K Kᵀ, so that one product replaces two."""
    return structure.square(structure.identity(1, dtype=torch.float32), 1) is not None


def apply_square(
    layers: list[MatrixLayer], side: int, X: Tensor, factor_of: FactorOf, overwrite: bool = False
) -> Tensor:
    """K Kᵀ X for X (d, m), or (L, d, m) for several layers, in X's dtype."""
    structure, d = layers[0].structures[side], layers[0].sizes[side]
    if has_square(structure):
        P = stack([_square(layer, side, structure, d, factor_of) for layer in layers])
        return structure.apply_square(P, X.to(P.dtype), overwrite).to(X.dtype)
    K = stack([factor_of(layer, side) for layer in layers])
    return structure.matmul(K, structure.rmatmul(K, X.to(K.dtype))).to(X.dtype)


def _square(layer: MatrixLayer, side: int, structure: Structure, d: int, factor_of: FactorOf) -> Tensor:
    """K Kᵀ, kept with the layer until its factors change."""
    name = ("P_K", "P_C")[side]
    if name not in layer.cache:
        K = factor_of(layer, side)
        squared = structure.square(K.to(torch.promote_types(K.dtype, torch.float32)), d)
        assert squared is not None
        layer.cache[name] = squared.to(K.dtype)
    return layer.cache[name]
