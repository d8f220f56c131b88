"""Block-diagonal matrices over a network's parameters whose blocks are known by their eigenvectors.

Kronecker factors, corrected ones, exact blocks and diagonals are all of this kind, so that products, inverses, roots,
determinants, traces and samples are one file: f of the matrix is f of the eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions.scalar import as_function
from ..operators import LinearOperator
from .discover import Site
from .network import Network
from .preflight import largest_side, last_parameters, refuse


@dataclass(frozen=True)
class EigenBlock:
    """Parameters ``indices`` as one block Q diag(λ) Qᵀ, with coordinates (d_out, d_in) or (p,).

    A weight (with its bias as last column) has Q = Q_out ⊗ Q_in, λ (d_out, d_in); a factor that is diagonal already has
    no Q. Without a ``site`` the block is a single parameter, flat, and has Q_in alone, λ (p,).
    """

    name: str
    indices: tuple[int, ...]
    eigenvalues: Tensor
    Q_in: Tensor | None = None
    Q_out: Tensor | None = None
    site: Site | None = None

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The block's matrix (k, d_out, d_in), or (k, p), of the parts (k, *shape) of k vectors."""
        own = parts[self.indices[0]]
        k = own.shape[0]
        if self.site is None:
            return own.reshape(k, -1)
        M = torch.stack([self.site.rule.to_matrix(self.site.module, w) for w in own.unbind()])
        if len(self.indices) == 1:
            return M
        return torch.cat([M, parts[self.indices[1]].reshape(k, -1, 1)], 2)

    def scatter(self, M: Tensor, shapes: Sequence[torch.Size], out: list[Tensor | None]) -> None:
        """The inverse of :meth:`gather`."""
        k, first = M.shape[0], self.indices[0]
        if self.site is None:
            out[first] = M.reshape((k,) + tuple(shapes[first]))
            return
        if len(self.indices) > 1:
            out[self.indices[1]] = M[..., -1].reshape((k,) + tuple(shapes[self.indices[1]]))
            M = M[..., :-1]
        rule, module = self.site.rule, self.site.module
        out[first] = torch.stack([rule.from_matrix(module, m, shapes[first]) for m in M.unbind()])

    def to_basis(self, M: Tensor) -> Tensor:
        """Qᵀ M."""
        M = M if self.Q_in is None else M @ self.Q_in
        return M if self.Q_out is None else self.Q_out.mT @ M

    def from_basis(self, M: Tensor) -> Tensor:
        """Q M."""
        M = M if self.Q_in is None else M @ self.Q_in.mT
        return M if self.Q_out is None else self.Q_out @ M

    def diagonal(self) -> Tensor:
        """The block's diagonal in its own coordinates."""
        d = self.eigenvalues
        d = d if self.Q_in is None else d @ self.Q_in.square().mT
        return d if self.Q_out is None else self.Q_out.square() @ d


class EigenBlocks(LinearOperator):
    """Q diag(λ) Qᵀ over the selected parameters of a network, block by block; symmetric (P, P).

    ``function(f)`` is the same with eigenvalues f(λ): ``A.function(ritz.functions.sqrt)`` is the root, and
    ``A.function(lambda x: 1 / (x + damping))`` the damped inverse.
    """

    def __init__(self, network: Network, blocks: Sequence[EigenBlock]) -> None:
        P = network.numel
        psd = all(bool((b.eigenvalues >= 0).all()) for b in blocks)
        super().__init__((P, P), network.dtype, network.device, hermitian=True, psd=psd or None)
        self.network, self.blocks = network, tuple(blocks)
        covered = sorted(i for b in blocks for i in b.indices)
        if covered != list(range(len(network.names))):
            raise OperandError("the blocks do not cover every selected parameter exactly once")

    @property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues (P,), in the order of :meth:`to_basis`."""
        return torch.cat([b.eigenvalues.reshape(-1) for b in self.blocks])

    def per_coordinate(self, of_parameter: Callable[[str], Any]) -> Tensor:
        """A number for every coordinate of :meth:`to_basis`, from one for each block's first parameter name."""
        values = [torch.as_tensor(of_parameter(self.network.names[b.indices[0]])) for b in self.blocks]
        return torch.cat([v.reshape(1).expand(b.eigenvalues.numel()) for v, b in zip(values, self.blocks)])

    def to_basis(self, V: Tensor) -> Tensor:
        """Coordinates in the eigenvectors, (k, P) -> (k, P)."""
        parts = self.network.split(V)
        return torch.cat([b.to_basis(b.gather(parts)).reshape(V.shape[0], -1) for b in self.blocks], 1)

    def from_basis(self, C: Tensor) -> Tensor:
        """Vectors from coordinates, (k, P) -> (k, P)."""
        out: list[Tensor | None] = [None] * len(self.network.names)
        sizes = [b.eigenvalues.numel() for b in self.blocks]
        for b, part in zip(self.blocks, C.split(sizes, 1)):
            b.scatter(b.from_basis(part.reshape(C.shape[0], *b.eigenvalues.shape)), self.network.shapes, out)
        return self.network.join(out, (C.shape[0],))

    def to_dense(self) -> Tensor:
        names, sizes = self.network.names, self.network.sizes
        instead = f"{last_parameters(names, sizes, largest_side(self.dtype))}; products and inverses need no matrix"
        refuse(self.shape, self.dtype, f"{type(self).__name__}.to_dense()", instead)
        return super().to_dense()

    def _matmat(self, X: Tensor) -> Tensor:
        return self.from_basis(self.eigenvalues * self.to_basis(X.mT)).mT

    def function(self, f: Any) -> EigenBlocks:
        """f of the matrix, f from ``ritz.functions`` or a callable on eigenvalues."""
        apply = as_function(f)
        return EigenBlocks(self.network, [replace(b, eigenvalues=apply(b.eigenvalues)) for b in self.blocks])

    def inverse(self, damping: float = 0.0) -> EigenBlocks:
        """(A + damping · I)⁻¹."""
        smallest = float(self.eigenvalues.min()) + damping
        if not smallest > 0:
            raise OperandError(
                f"the smallest eigenvalue is {smallest:.3g} with damping={damping:g}; expected a positive one: raise it"
            )
        return self.function(lambda x: 1.0 / (x + damping))

    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""
        return self.eigenvalues.sum()

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log det(A + damping · I), a scalar; ``damping`` may be one number a coordinate."""
        return torch.log(self.eigenvalues + damping).sum()

    def diagonal(self) -> Tensor:
        out: list[Tensor | None] = [None] * len(self.network.names)
        for b in self.blocks:
            b.scatter(b.diagonal().unsqueeze(0), self.network.shapes, out)
        return self.network.join(out, (1,))[0]
