"""What the layers of a network see: the inputs of every use, and its output gradients for several output vectors."""

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


@dataclass
class Watched:
    """Sites, the indices of their weight and bias among the selected parameters, and the parameters without a site."""

    sites: list[Site]
    where: list[tuple[int | None, int | None]]
    rest: list[int]


@dataclass
class Passes:
    """A forward pass with its graph, the vectors that were sent back through it, and what the layers saw."""

    f: Tensor
    leaves: list[nn.Parameter]
    vectors: Sequence[Tensor]
    uses: list[Use]


def watch(network: Network, *, groups: bool) -> Watched:
    """Which layers to watch. Convolutions in groups only with ``groups``: their inputs are averaged over them, which is
    a Kronecker factor and not a row."""
    index = {id(p): i for i, p in enumerate(network.parameters)}
    found = Watched([], [], [])
    for weight, own in discover(network.module).items() if network.module is not None else ():
        at = index.get(id(weight)), index.get(id(own.bias)) if own.bias is not None else None
        split = any(isinstance(s.rule, ConvRule) and getattr(s.module, "groups", 1) > 1 for s in own.sites)
        if at == (None, None) or (split and not groups):
            continue
        found.sites += own.sites
        found.where += [at] * len(own.sites)
    covered = {i for at in found.where for i in at if i is not None}
    found.rest = [i for i in index.values() if i not in covered]
    return found


def collect(
    network: Network, watched: Watched, x: Any, vectors: Callable[[Tensor], Sequence[Tensor]], limit: int
) -> Passes | None:
    """One forward pass, and one backward pass for each vector (of the outputs' shape).

    None where there is no vector, where the gradients would need more than ``limit`` bytes, or where a use was not
    reached by all of them.
    """
    leaves = [nn.Parameter(p.detach()) for p in network.parameters]
    by_id = {id(p): leaf for p, leaf in zip(network.parameters, leaves)}
    own = [replace(s, weight=by_id.get(id(s.weight), s.weight)) for s in watched.sites]
    table = {id(s): at for s, at in zip(own, watched.where)}
    sink = Collected(lambda site: table[id(site)])
    capture = Capture(own, sink, deferred=True)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            f = network(leaves, x)
        U = vectors(f.detach()) if f.requires_grad and f.ndim else ()

        def each() -> Iterator[Tensor]:
            for u in U:
                if sink.bytes() * len(U) > limit:  # known after the first vector
                    return
                sink.start()
                yield u

        capture.backward(f, each())
    finally:
        capture.remove()
    whole = bool(sink.uses) and all(len(use.gradients) == len(U) for use in sink.uses)
    return Passes(f, leaves, U, sink.uses) if whole else None


def escaped(network: Network, watched: Watched, got: Passes, *, by_example: bool) -> set[int]:
    """Indices of weights and biases whose gradient is not Σ g aᵀ over what their layers saw.

    Of random multiples of the vectors, the same for all examples, or (``by_example``) one for each: then layers whose
    examples see each other are found too.
    """
    f, U = got.f, got.vectors
    generator = torch.Generator().manual_seed(0)
    n = f.shape[0] if by_example else 1
    S = torch.randn(len(U), n, generator=generator, dtype=torch.float64).to(f)
    cotangent = torch.stack([s.reshape((-1,) + (1,) * (f.ndim - 1)) * u for s, u in zip(S, U)]).sum(0)
    wanted = torch.autograd.grad(f, got.leaves, cotangent, retain_graph=True, allow_unused=True)
    have = {i: torch.zeros_like(network.parameters[i]) for at in watched.where for i in at if i is not None}
    loose: set[int] = set()
    for use in got.uses:
        if isinstance(use.site.rule, ConvRule) and getattr(use.site.module, "groups", 1) > 1:
            loose |= {
                i for i in (use.weight, use.bias) if i is not None
            }  # averaged inputs: no gradient to compare with
            continue
        if by_example and use.examples() != n:
            return set(have)
        rows = torch.stack([s.reshape(-1, 1, 1) * g for s, g in zip(S, use.gradients)]).sum(0)  # (n, R, d)
        d = rows.shape[-1]
        if use.bias is not None:
            have[use.bias].reshape(-1)[use.first : use.first + d] += rows.sum((0, 1))
        if use.weight is None:
            continue
        flat = rows.flatten(0, 1)
        if isinstance(use.a, OneHot):
            M = rows.new_zeros(use.a.size, d).index_add_(0, use.a.index.reshape(-1), flat).mT
        else:
            M = flat.mT @ use.a.flatten(0, 1)
        target, rule = have[use.weight], use.site.rule
        if rule.to_matrix(use.site.module, target).shape[0] != d:
            target[use.first : use.first + d] += M
        else:
            target += rule.from_matrix(use.site.module, M, target.shape)
    wrong = set()
    for i, mine in have.items():
        true = torch.zeros_like(mine) if wanted[i] is None else wanted[i]
        error = torch.linalg.vector_norm(mine - true) / torch.linalg.vector_norm(true).clamp(min=1e-30)
        if i not in loose and not bool(error < torch.finfo(f.dtype).eps ** 0.6):
            wrong.add(i)
    return wrong
