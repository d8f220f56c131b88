"""Rows Uᵀ J of a network's Jacobian in factored form: inputs and output gradients of its layers, kept for all products.

A layer y = W a contributes to the row of example n and output vector u the matrix Σ_r g_r a_rᵀ over its positions r,
with g the gradient of u's outputs. Kept are the inputs a (n, R, d_in) and the gradients g (n, q, R, d_out) of q output
vectors per example, or their products where these are smaller. A product with k vectors is then two matrix products a
layer, without passing through the network.

Exact where every selected parameter is a weight or a bias of layers with a rule, and examples do not see each other;
:func:`factor` finds out and returns None otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import LayerRule, OneHot
from .network import Network
from .uses import Use, collect, escaped, watch


class Block:
    """The contribution of one use, (n q, P_l) as a map, in whichever form is cheaper."""

    def __init__(self, use: Use, network: Network, q: int) -> None:
        self.weight, self.bias, self.first, self.site = use.weight, use.bias, use.first, use.site
        self.a: Tensor | OneHot | None = use.a
        self._plain = type(use.site.rule).to_matrix is LayerRule.to_matrix  # the weight is the matrix
        G = torch.stack(use.gradients, 1)  # (n, q, R, d_out)
        self.n, self.q, self.R, self.d_out = G.shape
        self.shapes = network.shapes
        self._rows: Tensor | None = None
        self._G = G.reshape(self.n, q, -1)
        self._sum = G.sum(2) if use.bias is not None and self.R > 1 else None
        if self.weight is not None and isinstance(self.a, Tensor):
            d_in = self.a.shape[-1]
            if q * d_in <= self.R * (d_in + q):
                flat = torch.einsum("nqro,nrd->nqod", G, self.a).reshape(self.n * q, self.d_out * d_in)
                self._rows = flat
                self._sum = G.sum(2) if use.bias is not None else None
                # In place of what they are made of: a slice of it would keep all of its memory.
                self._G, self.a = G.new_zeros(self.n, q, 0), None

    @property
    def bytes(self) -> int:
        """What is kept."""
        kept = (self._G, self._sum, self._rows, self.a)
        return sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))

    def _weight_matrix(self, part: Tensor) -> Tensor:
        """The used rows (k, d_out, d_in) of a weight's part (k, *shape)."""
        if not self._plain:
            to_matrix = self.site.rule.to_matrix
            part = torch.stack([to_matrix(self.site.module, w) for w in part.unbind()])
        return part[:, self.first : self.first + self.d_out]

    def times(self, parts: Sequence[Tensor]) -> Tensor:
        """(n, q, k) from the parts (k, *shape) of k parameter vectors."""
        total: Tensor | None = None
        if self.weight is not None:
            W = self._weight_matrix(parts[self.weight])
            k = W.shape[0]
            if self._rows is not None:
                total = (self._rows @ W.reshape(k, -1).mT).reshape(self.n, self.q, k)
            else:
                total = torch.bmm(self._G, self._outputs(W))
        if self.bias is not None:
            b = parts[self.bias].reshape(parts[self.bias].shape[0], -1)[:, self.first : self.first + self.d_out]
            own = self._position_sum() @ b.mT
            total = own if total is None else total + own
        assert total is not None
        return total

    def _outputs(self, W: Tensor) -> Tensor:
        """W a for k weights (k, d_out, d_in), (n, R d_out, k), in the layout that needs the fewest copies."""
        k = W.shape[0]
        if isinstance(self.a, OneHot):
            return W.permute(2, 1, 0)[self.a.index].reshape(self.n, self.R * self.d_out, k)
        a = self.a.reshape(self.n * self.R, -1)
        if self.R == 1:
            return (a @ W.reshape(k * self.d_out, -1).mT).reshape(self.n, k, self.d_out).mT
        return (a @ W.permute(2, 1, 0).reshape(W.shape[2], -1)).reshape(self.n, self.R * self.d_out, k)

    def _position_sum(self) -> Tensor:
        return self._G if self._sum is None else self._sum

    def add_transposed(self, S: Tensor, into: list[Tensor]) -> None:
        """Add the parts (k, *shape) of Jᵀ S for S (n, q, k)."""
        k = S.shape[2]
        if self.weight is not None:
            if self._rows is not None:
                grad = (S.reshape(-1, k).mT @ self._rows).reshape(k, self.d_out, -1)
            else:
                grad = self._weight_gradients(S)
            self._add_weight(grad, into)
        if self.bias is not None:
            own = (S.reshape(-1, k).mT @ self._position_sum().reshape(self.n * self.q, self.d_out)).reshape(k, -1)
            into[self.bias].reshape(k, -1)[:, self.first : self.first + self.d_out] += own

    def _weight_gradients(self, S: Tensor) -> Tensor:
        """Σ over examples, vectors and positions of s g aᵀ, (k, d_out, d_in)."""
        k = S.shape[2]
        if self.R == 1 and isinstance(self.a, Tensor):
            W = torch.bmm(S.mT, self._G).reshape(self.n, k * self.d_out)
            return (W.mT @ self.a.reshape(self.n, -1)).reshape(k, self.d_out, -1)
        W = torch.bmm(self._G.mT, S).reshape(self.n * self.R, self.d_out * k)
        if isinstance(self.a, OneHot):
            flat = W.new_zeros(self.a.size, self.d_out * k).index_add_(0, self.a.index.reshape(-1), W)
        else:
            flat = self.a.reshape(self.n * self.R, -1).mT @ W
        return flat.reshape(-1, self.d_out, k).permute(2, 1, 0)

    def _add_weight(self, grad: Tensor, into: Sequence[Any]) -> None:
        """Add matrices (k, d_out, d_in) to the weight's part (k, *shape), a view of what is wanted."""
        assert self.weight is not None
        shape, rule = self.shapes[self.weight], self.site.rule
        if self._plain:
            into[self.weight][:, self.first : self.first + self.d_out] += grad
            return
        rows = rule.to_matrix(self.site.module, into[self.weight][0]).shape[0]
        for i, g in enumerate(grad.unbind()):
            if rows != self.d_out:
                into[self.weight][i][self.first : self.first + self.d_out] += g
            else:
                into[self.weight][i] += rule.from_matrix(self.site.module, g, shape)

    def add_rows(self, into: list[Tensor]) -> None:
        """Add the rows themselves, into parts (n, q, *shape)."""
        n, q, d = self.n, self.q, self.d_out
        if self.bias is not None:
            part = self._position_sum().reshape(n, q, d)
            into[self.bias].reshape(n, q, -1)[..., self.first : self.first + d] += part
        if self.weight is None:
            return
        if self._rows is not None:
            M = self._rows.reshape(n * q, d, -1)
        else:
            a = self.a
            if isinstance(a, OneHot):
                a = torch.nn.functional.one_hot(a.index, a.size).to(self._G.dtype)
            assert a is not None
            M = torch.bmm(self._G.reshape(n, q, self.R, d).permute(0, 1, 3, 2).reshape(n, q * d, self.R), a)
            M = M.reshape(n * q, d, -1)
        self._add_weight(M, [None if i != self.weight else t.flatten(0, 1) for i, t in enumerate(into)])


class Factored:
    """The rows Uᵀ J (n q, P) of one batch, from :func:`factor`."""

    def __init__(self, network: Network, f: Tensor, blocks: list[Block], q: int) -> None:
        self.network, self.f, self.blocks, self.q = network, f, blocks, q
        self.bytes = sum(b.bytes for b in blocks)

    def rows(self, V: Tensor) -> Tensor:
        """Uᵀ J V, (k, P) -> (n, q, k)."""
        parts = self.network.split(V)
        total = self.blocks[0].times(parts)
        for block in self.blocks[1:]:
            total = total + block.times(parts)
        return total

    def adjoint(self, S: Tensor) -> Tensor:
        """Jᵀ U S, (n, q, k) -> (k, P)."""
        out = torch.zeros(S.shape[2], self.network.numel, dtype=S.dtype, device=S.device)
        parts = [p for p in self.network.split(out)]  # views of `out`
        for block in self.blocks:
            block.add_transposed(S, parts)
        return out

    def dense(self) -> Tensor:
        """The rows themselves, (n, q, P)."""
        out = torch.zeros(self.f.shape[0], self.q, self.network.numel, dtype=self.f.dtype, device=self.f.device)
        parts = self.network.split(out)  # views of `out`
        for block in self.blocks:
            block.add_rows(parts)
        return out

    def gram(self, V: Tensor) -> Tensor:
        """Jᵀ U Uᵀ J V, (k, P) -> (k, P)."""
        return self.adjoint(self.rows(V))


def factor(
    network: Network, x: Any, size: int, vectors: Callable[[Tensor], Sequence[Tensor]], limit: int
) -> Factored | None:
    """The rows of one batch, or None where they have no such form, or need more than ``limit`` bytes.

    Args:
        x, size: inputs and how many examples they are.
        vectors: from the outputs f to q tensors of f's shape.
    """
    watched = watch(network, groups=False)
    if watched.rest:
        return None
    got = collect(network, watched, x, lambda f: vectors(f) if f.shape[:1] == (size,) else (), limit)
    if got is None or any(use.examples() != size for use in got.uses):
        return None
    if escaped(network, watched, got, by_example=True):
        return None
    q = len(got.vectors)
    out = Factored(network, got.f.detach(), [Block(use, network, q) for use in got.uses], q)
    return out if out.bytes <= limit else None
