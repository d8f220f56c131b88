"""The Gauss–Newton matrix by blocks: Kronecker factors, corrected ones, exact blocks, the diagonal."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OperandError
from .batches import Batch, to_device
from .data_operator import KEEP_BYTES, Problem
from .discover import Site
from .dual import DualGGN
from .eigenblocks import EigenBlock, EigenBlocks
from .ggn import GGN, ExactFisher, Fisher
from .layers import OneHot
from .losses import CustomLoss
from .network import Network, Selection
from .output_vectors import by_term, label_gradients, root_vectors
from .preflight import largest_side, refuse
from .statistics import EmpiricalFisher, GaussNewton, MonteCarloFisher
from .uses import Passes, Use, Watched, collect, escaped, watch

LARGEST_BLOCK = 4096  # parameters of a block that is formed and decomposed exactly
CHUNK_BYTES = 64 << 20
Kind = GaussNewton | MonteCarloFisher | EmpiricalFisher


class BlockApproximation(EigenBlocks):
    """What the approximations share. Arguments as in :class:`~ritz.curvature.GGN`, and

    Args:
        kind: whose second moment the blocks approximate: ``GaussNewton()``, exact, with one backward pass for each
            output, ``MonteCarloFisher(samples)`` with one a sample, or ``EmpiricalFisher()`` with one.

    Parameters that are no weight or bias of a layer with a rule get an exact block of their own.

    Raises:
        OperandError: such a parameter with more than 4096 entries (any size for the diagonal); what ``GGN`` raises.
    """

    def __init__(
        self,
        model_or_fn: Any,
        loss: Any,
        params: Selection = None,
        data: Any = None,
        *,
        kind: Kind = GaussNewton(),
        **settings: Any,
    ) -> None:
        self.problem = Problem(model_or_fn, loss, params, data, **settings)
        self.kind = kind
        # Of the exact blocks, whose data is cut already.
        self._settings = {**settings, "reduction": self.problem.reduction, "micro_batch": None}
        self.network = self.problem.network
        if self.network.module is None:
            raise OperandError("block approximations watch the layers of a module; got a function: use GGN")
        watched = watch(self.network, groups=self._groups)
        with torch.no_grad():
            self._check(watched)
            self._preflight(watched)
            blocks = self._layer_blocks(watched)
            blocks += [_zero_block(self.network, *found) for found in _unreached(watched, blocks)]
            blocks += [self._exact_block(i) for i in watched.rest]
        super().__init__(self.network, blocks)

    def _preflight(self, watched: Watched) -> None:
        """Raise where what is kept of a layer does not fit."""

    _squares = False  # whether rows are squared, example by example
    _groups = True  # whether convolutions in groups, whose inputs are averaged, have a block of the kind

    @abstractmethod
    def _layer_blocks(self, watched: Watched) -> list[EigenBlock]:
        """Blocks of the weights and biases of layers."""

    def _exact_block(self, i: int) -> EigenBlock:
        """The eigendecomposition of a parameter's own block of the Gauss–Newton matrix."""
        name, size = self.network.names[i], self.network.sizes[i]
        if size > LARGEST_BLOCK:
            raise OperandError(
                f"{name} has no layer rule and {size} entries, more than {LARGEST_BLOCK} for an exact block; leave it "
                "out of params="
            )
        data = [(batch.x, batch.y) for batch in self.problem.batches]
        model, loss = self.network.module, self.problem.loss
        kind = ExactFisher() if isinstance(self.kind, GaussNewton) else self.kind
        A = Fisher(model, loss, [name], data, kind=kind, **self._settings)
        eigenvalues, Q = _eigh(A.to_dense())
        return EigenBlock(name, (i,), eigenvalues.clamp(min=0.0), Q)

    def _check(self, watched: Watched) -> None:
        """Leave to exact blocks what escapes the layers' rules: a weight that is also used outside of its module, and,
        where rows are squared, layers whose examples see each other."""
        for _, got in self._passes(watched, rows=self._squares):
            wrong = escaped(self.network, watched, got, by_example=self._squares)
            keep = [j for j, at in enumerate(watched.where) if not wrong & set(_present(at))]
            watched.rest += sorted({i for at in watched.where for i in _present(at) if wrong & set(_present(at))})
            watched.sites = [watched.sites[j] for j in keep]
            watched.where = [watched.where[j] for j in keep]
            return  # the first batch tells

    # -- passes -------------------------------------------------------------------------------------------------------

    def _passes(self, watched: Watched, *, rows: bool) -> Iterator[tuple[Batch, Passes]]:
        """What the layers saw of every batch; with ``rows`` no vector has entries of two loss terms."""
        if not watched.sites:
            return
        for number, item in enumerate(self.problem.batches):
            batch = to_device(item, self.network.device)
            vectors = functools.partial(self._vectors, number, batch, rows=rows)
            got = collect(self.network, watched, batch.x, vectors, KEEP_BYTES)
            if got is None:
                raise OperandError(
                    f"the layers' output gradients of a batch of {batch.size} do not fit (or a layer was not reached); "
                    f"give micro_batch={max(1, batch.size // 4)} or less, or kind=MonteCarloFisher(1)"
                )
            yield batch, got

    def _vectors(self, number: int, batch: Batch, f: Tensor, *, rows: bool) -> Sequence[Tensor]:
        loss = self.problem.loss
        if not isinstance(self.kind, GaussNewton):
            found = label_gradients(self.kind, loss, f, batch, number)
            return by_term(loss, f, found) if rows else found
        if isinstance(loss, CustomLoss):
            raise OperandError("a loss of your own has no root of its Hessian; give kind=EmpiricalFisher()")
        if rows or f.ndim == 1:
            return root_vectors(loss, f, batch)
        # One vector a class for all positions together.
        axis, hessian = loss._axis(f), loss.hessian(f, batch.y)
        shape = [1] * f.ndim
        shape[axis] = f.shape[axis]
        units = torch.eye(f.shape[axis], dtype=f.dtype, device=f.device)
        return [hessian.root(unit.reshape(shape).expand(f.shape)) for unit in units]


class KFAC(BlockApproximation):
    """Kronecker-factored approximation: A ⊗ B for each layer, in its eigenvectors.

    A is the mean of a aᵀ over examples and positions (bias inputs 1 included), B the sum of g gᵀ. Exact for one
    linear layer where a and g are independent; in convolutions every position counts as an example.

    Reference: Martens, Grosse (2015); Botev, Ritter, Barber (2017) for Gauss–Newton; Grosse, Martens (2016).
    """

    def _layer_blocks(self, watched: Watched) -> list[EigenBlock]:
        return [_kronecker_block(self.network, *found) for found in self._factors(watched)]

    def _preflight(self, watched: Watched) -> None:
        most, names = largest_side(self.network.dtype), self.network.names
        for site, at in zip(watched.sites, watched.where):
            if at[0] is None:
                continue
            rows, columns = site.rule.to_matrix(site.module, self.network.parameters[at[0]].detach()).shape
            side = max(rows, 0 if isinstance(site.module, nn.Embedding) else columns + (at[1] is not None))
            refuse((side, side), self.network.dtype, f"a Kronecker factor of {names[at[0]]}",
                   f"factors have at most {most} rows: leave this layer out by params=, or take DiagonalGGN "
                   "(structure='diag' of Laplace)")  # fmt: skip

    def _factors(self, watched: Watched) -> list[tuple[tuple[int | None, int | None], Site, Tensor, Tensor]]:
        """For each layer where it is, a site, and the factors A and B."""
        sums: dict[tuple[int | None, int | None], list[Any]] = {}
        for _, got in self._passes(watched, rows=False):
            for use in got.uses:
                own = sums.setdefault((use.weight, use.bias), [use.site, 0.0, 0, 0.0])
                A, count = _input_moment(use)
                own[1], own[2] = own[1] + A, own[2] + count
                own[3] = own[3] + _output_moment(use, self._rows_of(use))
        scale = self.problem.scale
        return [(at, site, A / count, scale * B) for at, (site, A, count, B) in sums.items()]

    def _rows_of(self, use: Use) -> int:
        """Rows of a weight; a packed one is used in parts."""
        assert use.weight is not None or use.bias is not None
        i = use.weight if use.weight is not None else use.bias
        p = self.network.parameters[i]  # type: ignore[index]
        matrix = use.site.rule.to_matrix(use.site.module, p.detach()) if use.weight is not None else p
        return matrix.shape[0]


class EKFAC(KFAC):
    """KFAC's eigenvectors with the eigenvalues that the Gauss–Newton matrix has along them, λ_ij = E (Q_Bᵀ G Q_A)²_ij.

    The best matrix in Frobenius norm with these eigenvectors. A second pass over the data.

    Reference: George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis" (2018).
    """

    _groups, _squares = False, True

    def _layer_blocks(self, watched: Watched) -> list[EigenBlock]:
        blocks = {b.indices: b for b in super()._layer_blocks(watched)}
        sums = _row_squares(self, watched, {b.indices: (b.Q_in, b.Q_out) for b in blocks.values()})
        scale = self.problem.scale
        return [EigenBlock(b.name, b.indices, scale * sums[at], b.Q_in, b.Q_out, b.site) for at, b in blocks.items()]


class DiagonalGGN(BlockApproximation):
    """The exact diagonal of the Gauss–Newton matrix (with ``GaussNewton()``), from rows Σ_r g_r a_rᵀ."""

    _groups, _squares = False, True

    def _layer_blocks(self, watched: Watched) -> list[EigenBlock]:
        sums = _row_squares(self, watched, {})
        sites = {_present(at): s if at[0] is not None else None for s, at in zip(watched.sites, watched.where)}
        names, scale = self.network.names, self.problem.scale
        return [EigenBlock(names[at[0]], at, scale * s, site=sites[at]) for at, s in sums.items()]

    def _exact_block(self, i: int) -> EigenBlock:
        """From the rows of a root by backward passes, whatever the size; from the exact block for other kinds."""
        if not isinstance(self.kind, GaussNewton) or isinstance(self.problem.loss, CustomLoss):
            block = super()._exact_block(i)
            return EigenBlock(block.name, block.indices, block.diagonal())
        name, data = self.network.names[i], [(batch.x, batch.y) for batch in self.problem.batches]
        G = GGN(self.network.module, self.problem.loss, [name], data, **self._settings)
        total = torch.zeros(G.shape[0], dtype=G.dtype, device=G.device)
        for rows in DualGGN(G).root_pieces():
            total += rows.square().sum(0)
        return EigenBlock(name, (i,), total)


class BlockDiagonalGGN(BlockApproximation):
    """Exact diagonal blocks, one for each parameter, formed and decomposed; at most 4096 entries each."""

    def _layer_blocks(self, watched: Watched) -> list[EigenBlock]:
        watched.rest = list(range(len(self.network.names)))
        return []


def _eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a symmetric matrix, in float32 or better, in the dtype of M."""
    wide = torch.promote_types(M.dtype, torch.float32)
    found = torch.linalg.eigh(0.5 * (M + M.mT).to(wide))
    return found.eigenvalues.to(M.dtype), found.eigenvectors.to(M.dtype)


def _unreached(watched: Watched, blocks: Sequence[EigenBlock]) -> list[tuple[tuple[int, ...], Site]]:
    """Layers that no backward pass reached."""
    known = {i for b in blocks for i in b.indices} | set(watched.rest)
    left = {_present(at): site for at, site in zip(watched.where, watched.sites) if not known & set(_present(at))}
    return list(left.items())


def _zero_block(network: Network, at: tuple[int, ...], site: Site) -> EigenBlock:
    """The curvature of parameters that the outputs do not depend on."""
    p = network.parameters[at[0]].detach()
    layer = p.ndim > 1
    matrix = site.rule.to_matrix(site.module, p) if layer else p
    shape = (matrix.shape[0], matrix.shape[1] + len(at) - 1) if layer else (p.numel(),)
    return EigenBlock(network.names[at[0]], at, p.new_zeros(shape), site=site if layer else None)


def _present(at: tuple[int | None, int | None]) -> tuple[int, ...]:
    return tuple(i for i in at if i is not None)


def _kronecker_block(
    network: Network, at: tuple[int | None, int | None], site: Site, A: Tensor, B: Tensor
) -> EigenBlock:
    weight, bias = at
    l_out, Q_out = _eigh(B)
    l_out = l_out.clamp(min=0.0)
    if weight is None:  # a bias alone: its input is 1
        assert bias is not None
        return EigenBlock(network.names[bias], (bias,), l_out, Q_out)
    l_in, Q_in = A, None
    if A.ndim == 2:
        l_in, Q_in = _eigh(A)
    indices = (weight,) if bias is None else (weight, bias)
    eigenvalues = l_out.unsqueeze(1) * l_in.clamp(min=0.0)
    return EigenBlock(network.names[weight], indices, eigenvalues, Q_in, Q_out, site)


def _input_moment(use: Use) -> tuple[Tensor, int]:
    """Σ a aᵀ over examples and positions, with the bias's input, and their number; (d,) for one-hot inputs."""
    if isinstance(use.a, OneHot):
        index = use.a.index.reshape(-1)
        return torch.bincount(index, minlength=use.a.size).to(use.gradients[0].dtype), index.numel()
    a = use.a.flatten(0, 1)
    if use.weight is not None and use.bias is not None:
        a = F.pad(a, (0, 1), value=1.0)
    return a.mT @ a, a.shape[0]


def _output_moment(use: Use, rows: int) -> Tensor:
    """Σ g gᵀ over vectors, examples and positions, in the rows of the whole weight."""
    d = use.gradients[0].shape[-1]
    total = sum(g.flatten(0, 1).mT @ g.flatten(0, 1) for g in use.gradients)
    out = use.gradients[0].new_zeros(rows, rows)
    out[use.first : use.first + d, use.first : use.first + d] = total
    return out


def _row_squares(
    owner: BlockApproximation, watched: Watched, bases: dict[tuple[int, ...], tuple[Tensor | None, Tensor | None]]
) -> dict[tuple[int, ...], Tensor]:
    """Σ (Q_outᵀ (Σ_r g_r a_rᵀ) Q_in)² over examples and vectors, for every layer; rows of one weight are summed over
    its uses before they are squared."""
    sums: dict[tuple[int, ...], Tensor] = {}
    network = owner.network
    for _, got in owner._passes(watched, rows=True):
        by_layer: dict[tuple[int, ...], list[Use]] = {}
        for use in got.uses:
            by_layer.setdefault(_present((use.weight, use.bias)), []).append(use)
        for at, uses in by_layer.items():
            found = _layer_row_squares(uses, network, at, *bases.get(at, (None, None)))
            sums[at] = sums[at] + found if at in sums else found
    return sums


def _layer_row_squares(
    uses: list[Use], network: Network, at: tuple[int, ...], Q_in: Tensor | None, Q_out: Tensor | None
) -> Tensor:
    use = uses[0]
    n, q = use.gradients[0].shape[0], len(use.gradients)
    p = network.parameters[at[0]]
    rows = (use.site.rule.to_matrix(use.site.module, p.detach()) if use.weight is not None else p).shape[0]
    total: Tensor | None = None
    width = 1 if use.weight is None else _width(use)
    step = max(1, CHUNK_BYTES // max(1, q * rows * width * p.element_size()))
    for start in range(0, n, step):
        part = slice(start, start + step)
        M: Tensor | None = None
        for u in uses:
            G = torch.stack([g[part] for g in u.gradients], 1)  # (n, q, R, d)
            G = F.pad(G, (u.first, rows - u.first - G.shape[-1])) if G.shape[-1] < rows else G
            G = G if Q_out is None else G @ Q_out
            if u.weight is None:
                own = G.sum(2).unsqueeze(-1)
            else:
                a = F.one_hot(u.a.index[part], u.a.size).to(G.dtype) if isinstance(u.a, OneHot) else u.a[part]
                a = F.pad(a, (0, 1), value=1.0) if u.bias is not None else a
                a = a if Q_in is None else a @ Q_in
                own = torch.einsum("nqro,nrd->nqod", G, a)
            M = own if M is None else M + own
        assert M is not None
        found = M.square().sum((0, 1))
        total = found if total is None else total + found
    assert total is not None
    return total.squeeze(-1) if use.weight is None else total


def _width(use: Use) -> int:
    a = use.a.size if isinstance(use.a, OneHot) else use.a.shape[-1]
    return a + (use.bias is not None)
