"""A Krylov space of an operator with its small matrix decomposed: what f(A)v, forms and their gradients are read from.

All m starting vectors of a block are kept together: bases are (m, k, n), small matrices (m, k, k) in double precision
whatever the dtype of the vectors (they cost nothing, and float32 would lose the divided differences).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConvergenceError, ConvergenceWarning, DomainError, OperandError
from ..krylov.arnoldi import ArnoldiState, run_arnoldi
from ..krylov.lanczos import LanczosState, run_lanczos
from ..methods import Adjoint, Arnoldi, Auto, Frechet, KrylovMethod, Lanczos, Unrolled
from ..operators.base import LinearOperator
from ..result import Info, OnFailure, Status, caller_level
from .scalar import ScalarFunction

Product = Callable[[Tensor], Tensor]
PSD_ROUNDING = 1e3  # in units of eps·‖A‖: negative Ritz values that a positive semidefinite operator may show
FIRST = 4  # adaptive depth: steps before the first look at the error
ROOM = 2**26  # bytes of a basis that are set aside at once; larger ones grow by copies


@dataclass(frozen=True)
class HermitianSpace:
    """A Q = Q T + r e_kᵀ with T = U diag(w) Uᵀ."""

    state: LanczosState
    ritz: Tensor  # w (m, k)
    vectors: Tensor  # U (m, k, k)

    @property
    def basis(self) -> Tensor:
        return self.state.Q

    @property
    def first(self) -> Tensor:
        """Components of ‖v‖e₁ in the Ritz vectors, (m, k)."""
        return self.state.norm.to(self.vectors.dtype).unsqueeze(1) * self.vectors[:, 0, :]

    def without_rounding(self) -> HermitianSpace:
        """The space of a positive semidefinite operator: Ritz values that are negative by rounding become zero."""
        if not self.ritz.numel():
            return self
        error = PSD_ROUNDING * torch.finfo(self.basis.dtype).eps * self.ritz.abs().max()
        return replace(self, ritz=torch.where((self.ritz < 0) & (self.ritz >= -error), 0.0, self.ritz))

    def small(self, f: ScalarFunction) -> Tensor:
        """‖v‖ f(T) e₁, (m, k)."""
        return _apply(self.vectors, f(self.ritz) * self.first)

    def check_domain(self, functions: Sequence[ScalarFunction]) -> None:
        """Raise DomainError where a Ritz value lies outside of a function's domain."""
        ritz = self.ritz[self.state.depth > 0]
        for f in functions:
            f.check_domain(ritz)
            bad = ~torch.isfinite(f(ritz).abs())
            if bool(bad.any()):
                worst = ritz[bad].abs().argmax()
                value, at = f(ritz)[bad][worst].item(), float(ritz[bad][worst])
                raise DomainError(
                    f"f is {value} at the Ritz value {at:.6g} of the operator; expected a finite value: scale the "
                    "operator (or t) down, or shift it into the domain of f"
                )


@dataclass(frozen=True)
class GeneralSpace:
    """A Q = Q H + r e_kᵀ."""

    state: ArnoldiState
    H: Tensor  # (m, k, k), double precision

    @property
    def basis(self) -> Tensor:
        return self.state.Q

    def small(self, f: ScalarFunction) -> Tensor:
        """‖v‖ f(H) e₁, (m, k)."""
        return self.state.norm.to(self.H.dtype).unsqueeze(1) * f.matrix(self.H)[:, :, 0]

    def check_domain(self, functions: Sequence[ScalarFunction]) -> None:
        """Raise DomainError where f(H) overflows; the dense functions themselves look after their domains."""
        for f in functions:
            if not bool(torch.isfinite(self.small(f).abs()).all()):
                raise DomainError(
                    "f(H) of the small Krylov matrix is not finite: f overflows, or an eigenvalue lies outside of its "
                    "domain; scale the operator (or t) down, or shift it into the domain of f"
                )


Space = HermitianSpace | GeneralSpace


def _apply(U: Tensor, c: Tensor) -> Tensor:
    """U c for batches, real U and perhaps complex c."""
    if c.is_complex() and not U.is_complex():
        return torch.complex(_apply(U, c.real), _apply(U, c.imag))
    return torch.bmm(U, c.unsqueeze(2)).squeeze(2)


def combine(basis: Tensor, c: Tensor) -> Tensor:
    """Σ_j c_j q_j for every start: basis (m, k, n), c (m, k) -> (n, m); in the basis' precision, complex if c is."""
    if c.is_complex() and not basis.is_complex():
        return torch.complex(combine(basis, c.real), combine(basis, c.imag))
    return torch.bmm(c.to(basis.dtype).unsqueeze(1), basis).squeeze(1).mT


def decompose(state: LanczosState) -> HermitianSpace:
    """Diagonalise T of a Lanczos run, in double precision."""
    alpha, beta = state.alpha.double(), state.beta[:, :-1].double()
    alpha = torch.where(state.depth.unsqueeze(1) > 0, alpha, torch.ones_like(alpha))  # zero vector: log 0 · 0
    T = torch.diag_embed(alpha)
    if beta.shape[1]:
        T = T + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    w, U = torch.linalg.eigh(T)
    # Ritz values without weight belong to the filler past breakdown: put a true one in their place, since f need not
    # be defined at the filler.
    first = U[:, 0].abs()
    w = torch.where(first == 0, w.gather(1, first.argmax(1, keepdim=True)), w)
    return HermitianSpace(state, w, U)


def choose(A: LinearOperator, method: KrylovMethod) -> Lanczos | Arnoldi:
    """Resolve Auto(), and refuse Lanczos for an operator known not to be Hermitian."""
    if A.shape[0] != A.shape[1]:
        raise OperandError(f"a function of an operator needs a square one; this one has shape {A.shape}")
    if isinstance(method, Auto):
        return Lanczos() if A.hermitian else Arnoldi()
    if isinstance(method, Lanczos) and A.hermitian is False:
        raise OperandError(
            "Lanczos came with an operator that is not Hermitian; use Arnoldi(), or Auto(), or "
            "A.declare(hermitian=True) if it is Hermitian up to rounding"
        )
    if not isinstance(method, (Lanczos, Arnoldi)):
        raise OperandError(f"method={method!r}; expected Lanczos(k), Arnoldi(k) or Auto()")
    return method


def check_rule(gradient: object, method: Lanczos | Arnoldi) -> None:
    """Raise unless ``gradient`` is a rule that fits the method of the forward pass."""
    if not isinstance(gradient, (Frechet, Adjoint, Unrolled)):
        raise OperandError(f"gradient={gradient!r}; expected Frechet(), Adjoint() or Unrolled()")
    if isinstance(gradient, Frechet) and gradient.method is not None and type(gradient.method) is not type(method):
        raise OperandError(
            f"gradient={gradient!r} came with a forward pass by {method!r}; both Krylov spaces are of one kind: give "
            f"Frechet(method={type(method).__name__}(...))"
        )


def as_hermitian(A: LinearOperator, method: Lanczos | Arnoldi) -> LinearOperator:
    """Choosing Lanczos declares an operator of unknown symmetry Hermitian (its adjoint product is its product)."""
    return A.declare(hermitian=True) if isinstance(method, Lanczos) and not A.hermitian else A


def build(
    matmat: Product,
    V: Tensor,
    method: Lanczos | Arnoldi,
    functions: Sequence[ScalarFunction],
) -> tuple[Space, Tensor, Status]:
    """Grow a Krylov space from every column of V, to a fixed depth or until every f(A)v has converged.

    Args:
        functions: those whose convergence an adaptive depth waits for.

    Returns:
        The space, the error estimate per column (largest over functions, relative to f(A)v), and the status.
    """
    run: Callable[..., LanczosState | ArnoldiState] = run_lanczos if isinstance(method, Lanczos) else run_arnoldi
    options = {"reorthogonalize": method.reorthogonalize}
    if method.num_matvecs is not None:
        space = _space(run(matmat, V, method.num_matvecs, **options))
        return space, error_estimate(space, functions), _status(space, Status.FIXED)
    rtol = method.tolerance(V.dtype)
    # n orthonormal vectors exhaust the space. The plain recurrence loses orthogonality, and may need more than n steps.
    limit = method.max_matvecs
    if method.reorthogonalize or isinstance(method, Arnoldi):
        limit = max(1, min(limit, V.shape[0]))
    k = min(FIRST, limit)
    room = limit if limit * V.numel() * V.element_size() <= ROOM else 0
    state = run(matmat, V, k, room=room, **options)
    before: tuple[int, float] | None = None
    while True:
        space = _space(state)
        error = error_estimate(space, functions)
        if isinstance(space, HermitianSpace) and bool((space.ritz < 0).any()):
            space.check_domain(functions)  # the smallest Ritz value only falls with depth: no hope to wait for
        if bool((error <= rtol).all()):
            return space, error, _status(space, Status.CONVERGED)
        if k >= limit:
            full = method.reorthogonalize and limit == V.shape[0]
            done = full or bool((space.state.depth < k).all())
            return space, error, Status.EXHAUSTED if done else Status.MAX_STEPS
        worst = float(error.max())
        k, before = min(limit, k + _more(k, worst, before, rtol)), (k, worst)
        state = run(matmat, V, k, state=state, room=room, **options)


def _more(k: int, error: float, before: tuple[int, float] | None, rtol: float) -> int:
    """Steps until the next look: what the decay since the last one asks for, at least 2 and at most half of k."""
    most = max(2, k // 2)
    if before is None or not error < before[1] < math.inf or error > 0.3:
        return most
    rate = math.log(before[1] / error) / (k - before[0])
    return max(2, min(most, math.ceil(math.log(error / rtol) / rate)))


def _space(state: LanczosState | ArnoldiState) -> Space:
    if isinstance(state, LanczosState):
        return decompose(state)
    H = state.H.to(torch.complex128 if state.H.is_complex() else torch.float64)
    dead = (state.depth == 0)[:, None, None]
    return GeneralSpace(state, torch.where(dead, torch.eye(H.shape[-1], dtype=H.dtype, device=H.device), H))


def _status(space: Space, otherwise: Status) -> Status:
    exhausted = bool((space.state.depth < space.basis.shape[1]).all())
    return Status.EXHAUSTED if exhausted else otherwise


def error_estimate(space: Space, functions: Sequence[ScalarFunction]) -> Tensor:
    """Estimated relative error of f(A)v per column, the largest over functions.

    The coefficients of f(A)v in the basis, c = ‖v‖ f(T) e₁, decay like the error. Their decay between the middle and
    the end gives a rate ρ, the last two their size: the missing tail is about |c_k|/(1 − ρ). (Two, because every other
    coefficient vanishes for even or odd functions of a symmetric spectrum.) A quadratic form's gradient converges with
    this estimate, its value with the square.
    """
    k = space.basis.shape[1]
    depths, length = space.state.depth.tolist(), torch.linalg.vector_norm(space.state.residual, dim=1).tolist()
    exhausted = [d < k or r == 0 for d, r in zip(depths, length, strict=True)]
    worst = [0.0] * len(depths)
    for f in functions:
        try:
            rows = space.small(f).abs().tolist()  # short lists: arithmetic in Python costs less than calls to torch
        except DomainError:  # may mend at a larger depth; the final space is checked by the caller
            worst = [math.inf] * len(depths)
            break
        worst = [max(w, _tail(c)) for w, c in zip(worst, rows, strict=True)]
    error = [0.0 if done else w for done, w in zip(exhausted, worst, strict=True)]
    return torch.tensor(error, dtype=torch.float64, device=space.basis.device)


def _tail(c: list[float]) -> float:
    """The size of what follows coefficients of these moduli, relative to all of them."""
    k, tiny = len(c), torch.finfo(torch.float64).tiny
    if not all(map(math.isfinite, c)):
        return math.inf
    largest = max(c)
    if largest == 0:
        return 0.0
    c = [x / largest for x in c]
    size = math.sqrt(sum(x * x for x in c))
    tail = math.hypot(*c[-2:]) / size
    if k >= 6:
        middle = math.hypot(*c[k // 2 - 1 : k // 2 + 1]) / size
        rate = (tail / max(middle, tiny)) ** (1 / (k - k // 2))
        tail = tail / (1 - min(rate, 0.95))
    return tail


def check_psd(A: LinearOperator, space: Space, info: Info, on_failure: OnFailure) -> None:
    """Report an operator that was declared positive semidefinite and shows a clearly negative Ritz value."""
    if not A.psd or not isinstance(space, HermitianSpace):
        return
    ritz = space.ritz[space.state.depth > 0]
    if not ritz.numel():
        return
    smallest, largest = float(ritz.min()), float(ritz.abs().max())
    if smallest >= -PSD_ROUNDING * torch.finfo(space.basis.dtype).eps * largest:
        return
    info.status = Status.NOT_POSITIVE
    text = (
        f"the operator was declared positive semidefinite and has a Ritz value of {smallest:.6g} (largest magnitude "
        f"{largest:.3g}); the declaration is wrong, or rounding is that large: drop psd=True, or add a shift"
    )
    if on_failure == "raise":
        raise ConvergenceError(text)
    if on_failure == "warn":
        warnings.warn(text, ConvergenceWarning, stacklevel=caller_level())


def smallest(error: Tensor) -> float:
    """The smallest error over columns; zero where there are no columns."""
    return float(error.min()) if error.numel() else 0.0


def info_of(method: object, space: Space, error: Tensor, status: Status, num_matvecs: int) -> Info:
    """The report of one Krylov computation."""
    depth = int(space.state.depth.max()) if space.state.depth.numel() else 0
    return Info(method=method, num_matvecs=num_matvecs, depth=depth, residual=error, status=status)
