"""A Krylov space of an operator with its small matrix decomposed: what f(A)v, forms and their gradients are read from.

All m starting vectors of a block are kept together: bases are (m, k, n), small matrices (m, k, k) in double precision
whatever the dtype of the vectors (they cost nothing, and float32 would lose the divided differences).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
EARLY = 0.7  # the same as a part of the depth that a similar space needed: the last substep's, the forward pass'
NOISE = 4e-15  # of the coefficients of f(T)e₁ in double precision, relative to their norm
TINY = torch.finfo(torch.float64).tiny
ROOM = 2**26  # bytes of a basis that are set aside at once; larger ones grow by copies


@dataclass(frozen=True)
class HermitianSpace:
    """A Q = Q T + r e_kᵀ with T = U diag(w) Uᵀ."""

    state: LanczosState
    ritz: Tensor  # w (m, k)
    vectors: Tensor  # U (m, k, k), real
    _known: dict[int, tuple[ScalarFunction, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def basis(self) -> Tensor:
        return self.state.Q

    @cached_property
    def first(self) -> Tensor:
        """Components of ‖v‖e₁ in the Ritz vectors, (m, k)."""
        return self.state.norm.to(self.vectors.dtype).unsqueeze(1) * self.vectors[:, 0, :]

    @cached_property
    def low(self) -> float:
        """The smallest Ritz value."""
        return float(self._live.min()) if self._live.numel() else 0.0

    @cached_property
    def high(self) -> float:
        """The largest Ritz value."""
        return float(self._live.max()) if self._live.numel() else 0.0

    @cached_property
    def _live(self) -> Tensor:
        """The Ritz values of the starts that are not zero."""
        live = self.state.depth > 0
        return self.ritz if bool(live.all()) else self.ritz[live]

    def without_rounding(self) -> HermitianSpace:
        """The space of a positive semidefinite operator: Ritz values that are negative by rounding become zero."""
        if not self.ritz.numel():
            return self
        error = PSD_ROUNDING * torch.finfo(self.basis.dtype).eps * self.ritz.abs().amax(1, keepdim=True)
        ritz = torch.where((self.ritz < 0) & (self.ritz >= -error), 0.0, self.ritz)
        return HermitianSpace(self.state, ritz, self.vectors)

    def small(self, f: ScalarFunction) -> Tensor:
        """‖v‖ f(T) e₁, (m, k); kept, since the error estimate, the value and the gradient ask for the same."""
        if id(f) not in self._known:  # with f, so that nobody else gets its number
            self._known[id(f)] = f, self.recorded(f)
        return self._known[id(f)][1]

    def recorded(self, f: ScalarFunction) -> Tensor:
        """The same, made anew: on the graph of what f closes over, where there is one."""
        return _apply(self.vectors, f(self.ritz) * self.first)

    def check_domain(self, functions: Sequence[ScalarFunction]) -> None:
        """Raise DomainError where a Ritz value lies outside of a function's domain."""
        ritz = self.ritz[self.state.depth > 0]
        for f in functions:
            f.check_domain(ritz)
            if id(f) in self._known and math.isfinite(float(self.small(f).abs().sum())):
                continue  # it was made of all values
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
    _known: dict[int, tuple[ScalarFunction, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def basis(self) -> Tensor:
        return self.state.Q

    def small(self, f: ScalarFunction) -> Tensor:
        """‖v‖ f(H) e₁, (m, k); kept, as by :class:`HermitianSpace`."""
        if id(f) not in self._known:
            self._known[id(f)] = f, self.recorded(f)
        return self._known[id(f)][1]

    def recorded(self, f: ScalarFunction) -> Tensor:
        """The same, made anew."""
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
    m, k = state.alpha.shape
    T = torch.zeros(m, k, k, dtype=torch.float64, device=state.alpha.device)
    T.diagonal(0, 1, 2).copy_(state.alpha)
    T.diagonal(-1, 1, 2).copy_(state.beta[:, :-1])  # eigh reads the lower triangle
    shortest = int(state.depth.min()) if m else k
    if shortest == 0:
        T[state.depth == 0] = torch.eye(k, dtype=T.dtype, device=T.device)  # zero vector: log 0 · 0
    w, U = torch.linalg.eigh(T)
    if shortest < k:
        # Ritz values without weight belong to the filler past breakdown: put a true one in their place, since f need
        # not be defined at the filler.
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
    two_pass = isinstance(method, Lanczos) and method.two_pass
    if two_pass and not isinstance(gradient, Frechet):
        raise OperandError(f"gradient={gradient!r} came with {method!r}; expected Frechet(): there is no basis")
    if isinstance(gradient, Frechet) and isinstance(gradient.method, Lanczos) and gradient.method.two_pass != two_pass:
        raise OperandError(f"gradient={gradient!r} came with {method!r}; expected two_pass in both or in none")
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
    likely: float = 0.0,
    run: Callable[..., LanczosState | ArnoldiState] | None = None,
    psd: bool | None = None,
) -> tuple[Space, Tensor, Status]:
    """Grow a Krylov space from every column of V, to a fixed depth or until every f(A)v has converged.

    Args:
        functions: those whose convergence an adaptive depth waits for.
        likely: the depth that a space much like this one needed: the first look at the error is a little before it.
        run: the loop, where it is not that of the method.
        psd: whether A is positive semidefinite, so that Ritz values that are negative by rounding are zero.

    Returns:
        The space, the error estimate per column (largest over functions, relative to f(A)v), and the status.
    """
    loop: Callable[..., LanczosState | ArnoldiState] = run_lanczos if isinstance(method, Lanczos) else run_arnoldi
    if run is not None:
        loop = run
    elif isinstance(method, Lanczos) and method.two_pass:
        raise OperandError(f"{method!r} keeps no basis, which is for f(A)v alone; drop two_pass=True")
    options = {"reorthogonalize": method.reorthogonalize}
    if method.num_matvecs is not None:
        space = _space(loop(matmat, V, method.num_matvecs, **options), psd)
        return space, error_estimate(space, functions), _status(space, Status.FIXED)
    rtol = method.tolerance(V.dtype)
    # n orthonormal vectors exhaust the space. The plain recurrence loses orthogonality, and may need more than n steps.
    limit = method.max_matvecs
    if method.reorthogonalize or isinstance(method, Arnoldi):
        limit = max(1, min(limit, V.shape[0]))
    k = min(max(FIRST, round(EARLY * likely)), limit)
    room = limit if limit * V.numel() * V.element_size() <= ROOM else 0
    state = loop(matmat, V, k, room=room, **options)
    before: tuple[int, float] | None = None
    while True:
        space = _space(state, psd)
        errors = _errors(space, functions)
        worst = max(errors, default=0.0)
        if isinstance(space, HermitianSpace) and space.low <= 0:
            space.check_domain(functions)  # the smallest Ritz value only falls with depth: no hope to wait for
        if worst <= rtol:
            return space, _tensor(errors, space), _status(space, Status.CONVERGED)
        if k >= limit:
            full = method.reorthogonalize and limit == V.shape[0]
            done = full or bool((space.state.depth < k).all())
            return space, _tensor(errors, space), Status.EXHAUSTED if done else Status.MAX_STEPS
        onset = max(f.onset(space.low, space.high) for f in functions) if isinstance(space, HermitianSpace) else 0.0
        k, before = min(limit, k + _more(k, worst, before, rtol, onset, round(likely))), (k, worst)
        state = loop(matmat, V, k, state=state, room=room, **options)


def _more(k: int, error: float, before: tuple[int, float] | None, rtol: float, onset: float, likely: int) -> int:
    """Steps until the next look: what the decay since the last one asks for, at least 2 and at most half of k.

    While nothing has converged, up to ``onset``: of an interval of Ritz values, which only grows. It knows nothing of
    the vector, and a smooth one needs less: so not past the depth that is ``likely``.
    """
    most = max(2, k // 2)
    if error > 0.3 and onset > k:
        target = math.ceil(min(1.25 * onset + 2, 4 * k))
        return (likely if k < likely < target else target) - k
    if before is None or not error < before[1] < math.inf or error > 0.3:
        return most
    rate = math.log(before[1] / error) / (k - before[0])
    return max(2, min(most, math.ceil(math.log(error / rtol) / rate)))


def _space(state: LanczosState | ArnoldiState, psd: bool | None) -> Space:
    if isinstance(state, LanczosState):
        space = decompose(state)
        return space.without_rounding() if psd and space.low < 0 else space
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
    return _tensor(_errors(space, functions), space)


def _tensor(errors: list[float], space: Space) -> Tensor:
    return torch.tensor(errors, dtype=torch.float64, device=space.basis.device)


def _errors(space: Space, functions: Sequence[ScalarFunction]) -> list[float]:
    k = space.basis.shape[1]
    state = space.state
    left = state.beta[:, -1] if isinstance(state, LanczosState) else state.residual.any(1)
    depths = state.depth.tolist()
    exhausted = [d < k or not r for d, r in zip(depths, left.tolist(), strict=True)]
    worst = [0.0] * len(depths)
    for f in functions:
        try:
            rows = space.small(f).abs().tolist()  # short lists: arithmetic in Python costs less than calls to torch
        except DomainError:  # may mend at a larger depth; the final space is checked by the caller
            worst = [math.inf] * len(depths)
            break
        worst = [max(w, _tail(c)) for w, c in zip(worst, rows, strict=True)]
    return [0.0 if done else w for done, w in zip(exhausted, worst, strict=True)]


def _tail(c: list[float]) -> float:
    """The size of what follows coefficients of these moduli, relative to all of them."""
    k = len(c)
    if not all(map(math.isfinite, c)):
        return math.inf
    largest = max(c)
    if largest == 0:
        return 0.0
    c = [x / largest for x in c]
    size = math.sqrt(sum(x * x for x in c))
    tail = math.hypot(*c[-2:]) / size
    if k >= 6 and tail > NOISE:  # a decay between roundings says nothing, and 1/(1 − ρ) would be a factor of 20
        middle = math.hypot(*c[k // 2 - 1 : k // 2 + 1]) / size
        rate = (tail / max(middle, TINY)) ** (1 / (k - k // 2))
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
