"""Products with φ-functions as the steps need them: the tolerance relative to the increment, every product counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceError, ConvergenceWarning
from ..functions import expm_multiply
from ..methods import Arnoldi, Auto, Frechet, GradientRule, KrylovMethod, Lanczos, Unrolled
from ..operators import Dense, LinearOperator
from ..result import OnFailure
from .dense import SMALL, matrix_of, phi_dense
from .phi import Augmented, phi_multiply

KRYLOV = (Lanczos, Arnoldi, Auto)
LARGE, SHORT = 1000, 40  # as in expm_multiply: from this size on Auto() takes short Arnoldi spaces and substeps


class Missed(Exception):
    """A Krylov space of an adaptive step missed its tolerance; a smaller step will not."""


@dataclass(frozen=True)
class Settings:
    """How products with φ-functions are made; ``rtol`` is that of the Krylov spaces, None for their own default."""

    krylov: KrylovMethod
    gradient: GradientRule
    rtol: float | None
    on_failure: OnFailure


@dataclass
class Counts:
    """What has been spent."""

    evaluations: int = 0
    matvecs: int = 0
    missed: bool = False


class Products:
    """Sums of φ-functions of operators of one size, (n, n), in one dtype."""

    def __init__(self, y: Tensor, settings: Settings) -> None:
        self.n, self.dtype, self.device, self.settings = y.numel(), y.dtype, y.device, settings
        self.counts = Counts()
        self.small = self.n <= SMALL and isinstance(settings.krylov, Auto)  # whether matrices are formed
        self.lenient = False  # whether a missed Krylov tolerance raises Missed, for a smaller step to be tried

    def formed(self, J: LinearOperator) -> LinearOperator:
        """J, as a matrix where that is the cheaper form: differentiable, by one pairing for all that uses it."""
        if not self.small or isinstance(J, Dense):
            return J
        self.counts.matvecs += self.n
        unit = torch.eye(self.n, dtype=self.dtype, device=self.device)
        M = J @ unit if isinstance(self.settings.gradient, Unrolled) else matrix_of(J)
        return Dense(M, hermitian=False)  # the flag has no part in what follows; reading it would cost a comparison

    def phi(self, J: LinearOperator, h: float, vectors: Sequence[Tensor | None], rtol: float | None = None) -> Tensor:
        """Σ_{j≥1} φ_j(hJ) w_j for [w_1, …].

        The time is in the operator, not in the vectors: h^j b_j have the size of the increment, and the tolerance is
        relative to that.
        """
        if all(w is None for w in vectors):
            return torch.zeros(self.n, dtype=self.dtype, device=self.device)
        if self.small and isinstance(J, Dense):
            return phi_dense(J.matrix, h, [None, *vectors], torch.ones(1, dtype=torch.float64, device=self.device))[0]
        call = lambda **options: phi_multiply(h * J, [None, *vectors], **options)  # noqa: E731
        return self._run(call, self._method(J, rtol))

    def phi_grid(self, J: LinearOperator, h: float, vectors: Sequence[Tensor | None], thetas: Tensor) -> Tensor:
        """Σ_{j≥0} θ^j φ_j(θhJ) w_j for [w_0, w_1, …] at every θ of a grid, (len(θ), n), from one Krylov space."""
        if self.small and isinstance(J, Dense):
            return phi_dense(J.matrix, h, vectors, thetas)
        s = self.settings
        first, *rest = [torch.zeros(self.n, dtype=self.dtype, device=self.device) if w is None else w for w in vectors]
        if not rest:  # a linear system: the operator as it is, for methods that factor it
            method = s.krylov if s.rtol is None or not isinstance(s.krylov, KRYLOV) else self._method(J, None)
            return self._run(lambda **options: expm_multiply(J, first, h * thetas, **options), method)
        W = torch.stack(rest[::-1], 1)
        size = max(float(torch.linalg.vector_norm(W.detach(), dim=0).max()), torch.finfo(self.dtype).tiny)
        tail = torch.zeros(len(rest), dtype=self.dtype, device=self.device)
        tail[-1] = size
        start, B = torch.cat([first, tail]), Augmented(h * J, W / size)
        return self._run(lambda **options: expm_multiply(B, start, thetas, **options), self._method(B, None))[
            :, : self.n
        ]

    def _run(self, call: Callable[..., Any], method: KrylovMethod) -> Tensor:
        s = self.settings
        options = {"method": method, "gradient": s.gradient, "return_info": True, "on_failure": s.on_failure}
        if not self.lenient:
            value, info = call(**options)
        else:
            # The rule of this call warns in backward too, and is to do so there: only what it says now is held back.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                try:
                    value, info = call(**options)
                except ConvergenceError as error:
                    raise Missed from error
        self.counts.matvecs += info.num_matvecs
        if not info.status.success:
            if self.lenient:
                raise Missed
            self.counts.missed = True
        return value

    def _method(self, J: LinearOperator, rtol: float | None) -> KrylovMethod:
        s = self.settings
        method, rtol = s.krylov, s.rtol if rtol is None else rtol
        # Lanczos runs from all vectors at once under rule F; everything else goes by one augmented, unsymmetric matrix.
        short = isinstance(s.gradient, Frechet) and not isinstance(J, Augmented)
        if isinstance(method, Auto):
            if J.hermitian and short:
                return Lanczos(rtol=rtol)
            return Arnoldi(rtol=rtol, max_matvecs=SHORT) if self.n >= LARGE else Arnoldi(rtol=rtol)
        if isinstance(method, Lanczos) and not short:
            method = Arnoldi(method.num_matvecs, method.rtol, method.max_matvecs)
        if method.rtol is None and method.num_matvecs is None and rtol is not None:
            return replace(method, rtol=rtol)
        return method
