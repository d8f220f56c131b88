"""A market of small problems: matrices named by the property that makes them worth testing.

Each entry is a pure function of its parameters (sizes, condition, seed), so two calls give the same numbers and
nothing is shared. `problem(name)` builds one, `problems(...)` a selection for a test table.

Example:
    >>> p = problem("spd_ill", n=6, condition=1e8)
    >>> p.hermitian, p.psd, tuple(p.matrix.shape)
    (True, True, (6, 6))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ritz.testing import matrices

__all__ = ["Problem", "names", "problem", "problems"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A square matrix with what is known about it.

    Attributes:
        name: the key under which `problem` finds it.
        matrix: dense float64 or complex128 tensor, or sparse CSR/COO float64 tensor, (n, n).
        hermitian: whether A equals its conjugate transpose exactly, not only up to rounding.
        psd: whether A is Hermitian positive semi-definite. Eigenvalues that should be zero may be rounded to about
            −1e-15 ‖A‖.
        description: the property, in words.
    """

    name: str
    matrix: Tensor
    hermitian: bool
    psd: bool
    description: str

    @property
    def dense(self) -> Tensor:
        """The matrix as a dense tensor (n, n); a new one for sparse problems."""
        return self.matrix if self.matrix.layout == torch.strided else self.matrix.to_dense()

    @property
    def n(self) -> int:
        """The size."""
        return self.matrix.shape[0]

    def __repr__(self) -> str:
        kind = "dense" if self.matrix.layout == torch.strided else str(self.matrix.layout).removeprefix("torch.")
        return f"Problem({self.name!r}, n={self.n}, {kind}, hermitian={self.hermitian}, psd={self.psd})"


def names(*, large: bool = False) -> tuple[str, ...]:
    """Return the names of all problems; those with n > 1000 only if `large`."""
    return tuple(name for name, entry in _ENTRIES.items() if large or not entry.large)


def problem(name: str, **parameters) -> Problem:
    """Build the problem of this name.

    Args:
        name: one of `names(large=True)`.
        **parameters: passed to its builder, e.g. `n`, `condition`, `seed`. Every one has a default.

    Raises:
        ValueError: for an unknown name.
        TypeError: for a parameter that this problem does not have.
    """
    if name not in _ENTRIES:
        raise ValueError(f"no problem is called {name!r}; there are {', '.join(_ENTRIES)}")
    entry = _ENTRIES[name]
    return Problem(name, entry.build(**parameters), entry.hermitian, entry.psd, entry.description)


def problems(
    *,
    hermitian: bool | None = None,
    psd: bool | None = None,
    complex: bool | None = None,
    sparse: bool | None = None,
    large: bool = False,
) -> tuple[Problem, ...]:
    """Build all problems with the given properties, at their default sizes.

    Args:
        hermitian, psd, complex, sparse: keep only problems for which this is true (or false); None keeps both.
        large: include those with n > 1000 (citation graph and SuiteSparse).

    Returns:
        The problems in the order of `names()`.
    """
    chosen = []
    for name in names(large=large):
        entry = _ENTRIES[name]
        # The flags are known before building, which saves reading files for problems that are not wanted.
        if hermitian in (None, entry.hermitian) and psd in (None, entry.psd):
            candidate = problem(name)
            is_sparse = candidate.matrix.layout != torch.strided
            if complex in (None, candidate.matrix.is_complex()) and sparse in (None, is_sparse):
                chosen.append(candidate)
    return tuple(chosen)


# Builders. Dense ones take a seed; the same seed gives the same matrix on one machine (QR may differ in the last
# bits across machines).


def _normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _from_spectrum(eigenvalues: Tensor, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Q diag(eigenvalues) Qᴴ with a random unitary Q, made exactly Hermitian."""
    n = len(eigenvalues)
    Q = torch.linalg.qr(_normal((n, n), seed, dtype)).Q
    A = (Q * eigenvalues.to(dtype)) @ Q.mH
    return (A + A.mH) / 2


def _linspace(a: float, b: float, n: int) -> Tensor:
    return torch.linspace(a, b, n, dtype=torch.float64)


def _geometric(condition: float, n: int) -> Tensor:
    return torch.tensor(condition, dtype=torch.float64) ** -_linspace(0.0, 1.0, n)


def _signed(n: int) -> Tensor:
    """n values of both signs in [−1.6, 2], all at least 0.2 away from zero and distinct in magnitude."""
    return _linspace(0.2, 2.0, n) * torch.where(torch.arange(n) % 2 == 0, -1.0, 1.0).to(torch.float64)


def _rank_deficient(n: int = 16, rank: int = 6, seed: int = 0) -> Tensor:
    G = _normal((n, rank), seed)
    A = G @ G.T / n
    return (A + A.T) / 2


def _repeated(n: int = 15, multiplicity: int = 3, seed: int = 0) -> Tensor:
    return _from_spectrum(1.0 + torch.arange(n, dtype=torch.float64) // multiplicity, seed)


def _clustered(n: int = 15, width: float = 1e-6, seed: int = 0) -> Tensor:
    return _from_spectrum(1.0 + torch.arange(n) % 3 + width * _linspace(0.0, 1.0, n), seed)


def _normal_nonsymmetric(n: int = 16, seed: int = 0) -> Tensor:
    """Blocks [[a, −b], [b, a]] in a random orthogonal basis: eigenvalues a ± ib with a in [1, 2], b in [0.5, 1]."""
    a, b = _linspace(1.0, 2.0, n // 2), _linspace(0.5, 1.0, n // 2)
    blocks = [torch.tensor([[x, -y], [y, x]], dtype=torch.float64) for x, y in zip(a.tolist(), b.tolist())]
    D = torch.block_diag(*blocks, *[torch.ones(1, 1, dtype=torch.float64)] * (n % 2))
    Q = torch.linalg.qr(_normal((n, n), seed)).Q
    return Q @ D @ Q.T


def _nonnormal(n: int = 16, strength: float = 1.0, seed: int = 0) -> Tensor:
    """Q (D + strength · U) Qᵀ with D = diag(1 … 2) and U strictly upper triangular: real positive spectrum, far from
    normal."""
    Q = torch.linalg.qr(_normal((n, n), seed)).Q
    return Q @ (torch.diag(_linspace(1.0, 2.0, n)) + strength * torch.triu(_normal((n, n), seed + 1), 1)) @ Q.T


def _disc(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Entries such that the eigenvalues lie about uniformly in the unit disc around 2: log and sqrt are defined."""
    return 2.0 * torch.eye(n, dtype=dtype) + _normal((n, n), seed, dtype) / n**0.5


def _jordan(n: int = 6, eigenvalue: float = 1.0) -> Tensor:
    return eigenvalue * torch.eye(n, dtype=torch.float64) + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)


def _defective(n: int = 8) -> Tensor:
    """S J S⁻¹ with Jordan blocks of size 3 (eigenvalue 1) and 2 (eigenvalue 2), then 3, 4, …

    S = I + (ones below the diagonal) has an inverse of ±1, so every entry is an integer and A is defective exactly,
    where rounding in a general similarity would split the eigenvalues by eps^(1/3).
    """
    if n < 5:
        raise ValueError(f"the defective problem needs n >= 5 for its two Jordan blocks, got {n}")
    simple = torch.arange(3.0, 3.0 + n - 5, dtype=torch.float64)
    J = torch.block_diag(_jordan(3, 1.0), _jordan(2, 2.0), torch.diag(simple))
    i = torch.arange(n)
    S = torch.eye(n, dtype=torch.float64) + torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    inverse = torch.tril(torch.where((i[:, None] - i[None, :]) % 2 == 0, 1.0, -1.0)).to(torch.float64)
    return S @ J @ inverse


def _complex_symmetric(n: int = 14, seed: int = 0) -> Tensor:
    B = _normal((n, n), seed, torch.complex128) / n**0.5
    return 2.0 * torch.eye(n, dtype=torch.complex128) + (B + B.mT) / 2


def _skew(n: int = 14, seed: int = 0) -> Tensor:
    B = _normal((n, n), seed) / n**0.5
    return B - B.T


def _cora(normalised: bool) -> Tensor:
    graph = matrices.cora_graph()
    return matrices.graph_laplacian(graph.edges, len(graph.labels), normalised=normalised)


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., Tensor]
    hermitian: bool
    psd: bool
    description: str
    large: bool = False


_R, _C = torch.float64, torch.complex128

_ENTRIES: dict[str, _Entry] = {
    "one_by_one": _Entry(lambda: torch.full((1, 1), 2.0, dtype=_R), True, True, "a single positive number"),
    "spd_well": _Entry(
        lambda n=16, condition=10.0, seed=0: _from_spectrum(_geometric(condition, n), seed),
        True,
        True,
        "positive definite, well conditioned",
    ),
    "spd_ill": _Entry(
        lambda n=16, condition=1e10, seed=0: _from_spectrum(_geometric(condition, n), seed),
        True,
        True,
        "positive definite, condition 1e10",
    ),
    "indefinite": _Entry(
        lambda n=16, seed=0: _from_spectrum(_signed(n), seed), True, False, "symmetric, eigenvalues of both signs"
    ),
    "repeated": _Entry(_repeated, True, True, "positive definite, every eigenvalue three times"),
    "clustered": _Entry(_clustered, True, True, "positive definite, three clusters of width 1e-6"),
    "identity_multiple": _Entry(lambda n=12: 2.5 * torch.eye(n, dtype=_R), True, True, "2.5 times the identity"),
    "rank_deficient": _Entry(_rank_deficient, True, True, "positive semi-definite of rank 6"),
    "zero": _Entry(lambda n=10: torch.zeros(n, n, dtype=_R), True, True, "all zeros"),
    "hilbert": _Entry(lambda n=8: matrices.hilbert(n), True, True, "Hilbert matrix"),
    "complex_positive": _Entry(
        lambda n=14, condition=20.0, seed=0: _from_spectrum(_geometric(condition, n), seed, _C),
        True,
        True,
        "complex Hermitian positive definite",
    ),
    "complex_indefinite": _Entry(
        lambda n=14, seed=0: _from_spectrum(_signed(n), seed, _C), True, False, "complex Hermitian, both signs"
    ),
    "nonsymmetric": _Entry(
        lambda n=16, seed=0: _disc(n, seed, _R), False, False, "random, eigenvalues in a disc around 2"
    ),
    "nonsymmetric_normal": _Entry(
        _normal_nonsymmetric, False, False, "commutes with its transpose, complex eigenvalues"
    ),
    "nonsymmetric_nonnormal": _Entry(_nonnormal, False, False, "real positive spectrum, far from normal"),
    "skew": _Entry(_skew, False, False, "skew-symmetric, purely imaginary spectrum"),
    "jordan": _Entry(_jordan, False, False, "one Jordan block"),
    "defective": _Entry(_defective, False, False, "integer matrix with Jordan blocks of size 3 and 2"),
    "complex_general": _Entry(
        lambda n=14, seed=0: _disc(n, seed, _C), False, False, "complex random, eigenvalues in a disc around 2"
    ),
    "complex_symmetric": _Entry(_complex_symmetric, False, False, "complex, equal to its transpose but not Hermitian"),
    "laplacian_1d": _Entry(lambda n=32: matrices.laplacian_1d(n), True, True, "second differences, Dirichlet, CSR"),
    "laplacian_2d": _Entry(lambda n=6: matrices.laplacian_2d(n), True, True, "five-point Laplacian, Dirichlet, CSR"),
    "laplacian_3d": _Entry(lambda n=4: matrices.laplacian_3d(n), True, True, "seven-point Laplacian, Dirichlet, CSR"),
    "laplacian_coo": _Entry(
        lambda n=6: matrices.laplacian_2d(n).to_sparse_coo().coalesce(), True, True, "five-point Laplacian, COO"
    ),
    "advection_diffusion": _Entry(
        lambda n=20: matrices.advection_diffusion_1d(n), False, False, "upwind transport and diffusion, CSR"
    ),
    "cora_combinatorial": _Entry(
        lambda: _cora(False), True, True, "Laplacian D − W of the Cora graph, CSR", large=True
    ),
    "cora_normalised": _Entry(
        lambda: _cora(True), True, True, "normalised Laplacian of the Cora graph, CSR", large=True
    ),
    "1138_bus": _Entry(
        lambda: matrices.suitesparse("1138_bus"), True, True, "power network, condition about 1e7, CSR", large=True
    ),
    "bloweybq": _Entry(
        lambda: matrices.suitesparse("bloweybq"),
        True,
        True,
        "materials problem, definite by less than rounding, CSR",
        large=True,
    ),
}
