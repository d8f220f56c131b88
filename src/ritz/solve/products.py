"""The products of a run as solvers take them."""

from __future__ import annotations

from torch import Tensor

from ..numerics import unwrap
from ..pairing import Run
from .system import Product


def plain(product: Product) -> Product:
    """A product without the wrappers of torch.func.grad, so that our vectors can be updated in place."""
    return lambda X: unwrap(product(X))


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
