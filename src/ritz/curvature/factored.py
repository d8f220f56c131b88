"""Rows Uᵀ J of a network's Jacobian in factored form: inputs and output gradients of its layers, kept for all products.

A layer y = W a contributes to the row of example n and output vector u the matrix Σ_r g_r a_rᵀ over its positions r,
with g the gradient of u's outputs. Kept are the inputs a (n, R, d_in) and the gradients g (n, q, R, d_out) of q output
vectors per example, or their products where these are smaller. A product with k vectors is then two matrix products a
layer, without passing through the network.

Exact where every selected parameter is a weight or a bias of layers with a rule, and examples do not see each other;
:func:`factor` finds out and returns None otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .capture import Capture
from .discover import Site, discover
from .layers import ConvRule, OneHot
from .network import Network

MOST_VECTORS = 256  # output vectors an example; beyond, a backward pass for each costs more than products save


@dataclass
class Use:
    """One product of a layer: which blocks of θ it belongs to, inputs, and the output gradients collected so far."""

    site: Site
    weight: int | None  # index among the selected parameters
    bias: int | None
    a: Tensor | OneHot
    first: int  # row of a packed weight where the used ones begin
    gradients: list[Tensor] = field(default_factory=list)

    def examples(self) -> int:
        """How many examples the inputs and the gradients have; −1 where they differ."""
        n = (self.a.index if isinstance(self.a, OneHot) else self.a).shape[0]
        return n if all(g.shape[0] == n for g in self.gradients) else -1


class Collected:
    """A sink that keeps what every use reports for every output vector."""

    def __init__(self, where: Callable[[Site], tuple[int | None, int | None]]) -> None:
        self._where = where
        self.uses: list[Use] = []
        self._next: dict[int, int] = {}

    def wanted(self, site: Site, entries: int | None) -> bool:
        return True

    def bytes(self) -> int:
        """Of the gradients of one vector."""
        return sum(u.gradients[0].numel() * u.gradients[0].element_size() for u in self.uses)

    def start(self) -> None:
        """A new output vector: uses report in the same order again."""
        self._next = {}

    def used(self, site: Site, x: Tensor, g: Tensor, y: Sequence[int], first_row: int, again: bool, batch: int) -> None:
        number = self._next.get(id(site), 0)
        self._next[id(site)] = number + 1
        same = [u for u in self.uses if u.site is site]
        if len(same) <= number:
            weight, bias = self._where(site)
            use = Use(site, weight, bias, site.rule.inputs(site.module, x, y), first_row)
            self.uses.append(use)
            same.append(use)
        same[number].gradients.append(site.rule.outputs(site.module, g, x))


class Block:
    """The contribution of one use, (n q, P_l) as a map, in whichever form is cheaper."""

    def __init__(self, use: Use, network: Network, q: int) -> None:
        self.weight, self.bias, self.first, self.site = use.weight, use.bias, use.first, use.site
        self.a = use.a
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
                self._G = self._G[:, :, :0]

    @property
    def bytes(self) -> int:
        """What is kept."""
        kept = [self._G, self._sum, self._rows, self.a if isinstance(self.a, Tensor) and self._rows is None else None]
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def _weight_matrix(self, part: Tensor) -> Tensor:
        """The used rows (k, d_out, d_in) of a weight's part (k, *shape)."""
        to_matrix = self.site.rule.to_matrix
        W = torch.stack([to_matrix(self.site.module, w) for w in part.unbind()])
        return W[:, self.first : self.first + self.d_out]

    def times(self, parts: Sequence[Tensor]) -> Tensor:
        """(n, q, k) from the parts (k, *shape) of k parameter vectors."""
        total: Tensor | None = None
        if self.weight is not None:
            W = self._weight_matrix(parts[self.weight])
            k = W.shape[0]
            if self._rows is not None:
                total = (self._rows @ W.reshape(k, -1).mT).reshape(self.n, self.q, k)
            else:
                if isinstance(self.a, OneHot):
                    T = W.permute(2, 1, 0)[self.a.index]  # (n, R, d_out, k)
                else:
                    T = self.a.reshape(self.n * self.R, -1) @ W.permute(2, 1, 0).reshape(W.shape[2], -1)
                total = torch.bmm(self._G, T.reshape(self.n, self.R * self.d_out, k))
        if self.bias is not None:
            b = parts[self.bias].reshape(parts[self.bias].shape[0], -1)[:, self.first : self.first + self.d_out]
            own = self._position_sum() @ b.mT
            total = own if total is None else total + own
        assert total is not None
        return total

    def _position_sum(self) -> Tensor:
        return self._G if self._sum is None else self._sum

    def add_transposed(self, S: Tensor, into: list[Tensor]) -> None:
        """Add the parts (k, *shape) of Jᵀ S for S (n, q, k)."""
        k = S.shape[2]
        if self.weight is not None:
            if self._rows is not None:
                grad = (S.reshape(-1, k).mT @ self._rows).reshape(k, self.d_out, -1)
            else:
                W = torch.bmm(self._G.mT, S).reshape(self.n * self.R, self.d_out * k)
                if isinstance(self.a, OneHot):
                    flat = W.new_zeros(self.a.size, self.d_out * k).index_add_(0, self.a.index.reshape(-1), W)
                else:
                    flat = self.a.reshape(self.n * self.R, -1).mT @ W
                grad = flat.reshape(-1, self.d_out, k).permute(2, 1, 0)
            self._add_weight(grad, into)
        if self.bias is not None:
            own = (S.reshape(-1, k).mT @ self._position_sum().reshape(self.n * self.q, self.d_out)).reshape(k, -1)
            into[self.bias].reshape(k, -1)[:, self.first : self.first + self.d_out] += own

    def _add_weight(self, grad: Tensor, into: list[Tensor]) -> None:
        assert self.weight is not None
        shape, rule = self.shapes[self.weight], self.site.rule
        rows = rule.to_matrix(self.site.module, into[self.weight][0]).shape[0]
        for i, g in enumerate(grad.unbind()):
            if rows != self.d_out:
                into[self.weight][i][self.first : self.first + self.d_out] += g
            else:
                into[self.weight][i] += rule.from_matrix(self.site.module, g, shape)


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

    def gram(self, V: Tensor) -> Tensor:
        """Jᵀ U Uᵀ J V, (k, P) -> (k, P)."""
        return self.adjoint(self.rows(V))


def unit_vectors(f: Tensor) -> Iterator[Tensor]:
    """For each output of an example the unit vector, for all examples at once, of f's shape (n, …)."""
    flat = f.shape[1:].numel()
    for j in range(flat):
        unit = torch.zeros(f.shape[0], flat, dtype=f.dtype, device=f.device)
        unit[:, j] = 1.0
        yield unit.reshape(f.shape)


def factor(
    network: Network, x: Any, size: int, vectors: Callable[[Tensor], Sequence[Tensor]], limit: int
) -> Factored | None:
    """The rows of one batch, or None where they have no such form, or need more than ``limit`` bytes.

    Args:
        x, size: inputs and how many examples they are.
        vectors: from the outputs f to q tensors of f's shape.
    """
    sites = _sites(network)
    if sites is None:
        return None
    chosen, where = sites
    assert network.module is not None
    leaves = [nn.Parameter(p.detach()) for p in network.parameters]
    by_id = {id(p): leaf for p, leaf in zip(network.parameters, leaves)}
    own = [replace(s, weight=by_id.get(id(s.weight), s.weight)) for s in chosen]
    table = {id(s): at for s, at in zip(own, where)}
    sink = Collected(lambda site: table[id(site)])
    capture = Capture(own, sink, deferred=True)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            f = network(leaves, x)
        if not f.requires_grad or f.ndim == 0 or f.shape[0] != size:
            return None
        U = vectors(f.detach())
        if not 0 < len(U) <= MOST_VECTORS:
            return None

        def each() -> Iterator[Tensor]:
            for u in U:
                if sink.bytes() * len(U) > limit:  # known after the first vector
                    return
                sink.start()
                yield u

        capture.backward(f, each())
        fits = all(len(use.gradients) == len(U) and use.examples() == size for use in sink.uses)
        if not fits or not sink.uses:
            return None
        out = Factored(network, f.detach(), [Block(use, network, len(U)) for use in sink.uses], len(U))
        return out if out.bytes <= limit and _agrees(out, f, leaves, U) else None
    finally:
        capture.remove()


def _sites(network: Network) -> tuple[list[Site], list[tuple[int | None, int | None]]] | None:
    """Sites to watch, and for each the indices of its weight and bias among the selected parameters.

    None where a selected parameter is neither the weight nor the bias of layers with a rule.
    """
    if network.module is None:
        return None
    index = {id(p): i for i, p in enumerate(network.parameters)}
    sites: list[Site] = []
    where: list[tuple[int | None, int | None]] = []
    for weight, own in discover(network.module).items():
        at = index.get(id(weight)), index.get(id(own.bias)) if own.bias is not None else None
        if at == (None, None):
            continue
        if any(isinstance(s.rule, ConvRule) and getattr(s.module, "groups", 1) > 1 for s in own.sites):
            continue  # inputs are averaged over the groups: a Kronecker factor, not a row
        sites += own.sites
        where += [at] * len(own.sites)
    covered = {i for at in where for i in at if i is not None}
    return (sites, where) if covered == set(index.values()) else None


def _agrees(rows: Factored, f: Tensor, leaves: Sequence[Tensor], U: Sequence[Tensor]) -> bool:
    """Jᵀ U s by an ordinary backward pass: it differs where examples see each other, or a layer escapes its rule."""
    generator = torch.Generator().manual_seed(0)
    S = torch.randn(f.shape[0], len(U), 1, generator=generator, dtype=torch.float64).to(f)
    weights = [s.reshape((-1,) + (1,) * (f.ndim - 1)) for s in S.unbind(1)]
    cotangent = torch.stack([s * u for s, u in zip(weights, U)]).sum(0)
    found = torch.autograd.grad(f, leaves, cotangent, retain_graph=True, allow_unused=True)
    want, got = rows.network.join(found), rows.adjoint(S)[0]
    error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want).clamp(min=1e-30)
    return bool(error < torch.finfo(f.dtype).eps ** 0.6)
