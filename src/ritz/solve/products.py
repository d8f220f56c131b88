"""The products of a run as solvers take them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import unwrap
from ..pairing import Run
from .system import Product


def plain(product: Product) -> Product:
    """A product without the wrappers of torch.func.grad, so that our vectors can be updated in place."""
    return lambda X: unwrap(product(X))


def adjoint_preconditioner(precondition: Product, like: Tensor) -> Product | None:
    """P⁻ᴴ X of a linear map X -> P⁻¹ X, by its VJP; None where autograd does not see through it."""

    def product(X: Tensor) -> Tensor:
        with torch.enable_grad():
            Z = torch.zeros_like(X, requires_grad=True)
            return torch.autograd.grad(precondition(Z), Z, X)[0]

    try:
        product(torch.zeros_like(like[:, :1]))
    except RuntimeError:
        return None
    return product


def adjoint_of(run: Run) -> Product:
    """Aᴴ X for blocks whose width may shrink on the way; one recording per width."""
    products: dict[int, Product] = {}

    def product(X: Tensor) -> Tensor:
        width = X.shape[1]
        if width not in products:
            products.clear()
            products[width] = run.adjoint(width)
        return products[width](X)

    return product
