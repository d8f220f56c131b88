"""The system y' = A y + f(t, y) as the steps see it: flat, checked, counted, linearised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..methods import Unrolled
from ..numerics import check_finite, in_transform, refuse_transforms
from ..operators import Dense, LinearOperator, aslinearoperator
from ..ravel import ravel
from .linearized import JacobianOperator, Linearization, TimeDerivative, attached
from .probe import check_dependence, check_jacobian, check_time
from .products import Products, Settings
from .watch import Found, watch


@dataclass
class Point:
    """The system at (t, y): y' there, and the pieces that the steps are made of."""

    t: Tensor
    y: Tensor
    J: LinearOperator  # A + ∂f/∂y, or A alone where the method keeps it
    rate: Tensor  # A y + f
    f: Tensor
    N: LinearOperator | None = None  # ∂f/∂y; None where f is not linearised, or zero
    slope: Tensor | None = None  # ∂f/∂t; None where it is zero
    at: Linearization | None = None

    def release(self) -> None:
        """Drop what served the products of this step."""
        if self.at is not None:
            self.at.release()


class System(Products):
    """y' = A y + f(t, y) on vectors (n,).

    Args:
        func: f, on tensors of y0's structure; None for zero.
        linear: A, or None for zero.
        jacobian: (t, y) -> operator ∂f/∂y, or None for what autograd gives.
        y0: where the solution starts; gives structure, dtype and device.
        span: from the first time to the last.
    """

    def __init__(
        self,
        func: Callable[[Tensor, Any], Any] | None,
        linear: LinearOperator | None,
        jacobian: Callable[[Tensor, Any], Any] | None,
        y0: Any,
        settings: Settings,
        span: float = 1.0,
    ) -> None:
        self.y0, self.unravel = ravel(y0)
        super().__init__(self.y0, settings)
        self.func, self.linear, self.jacobian = func, linear, jacobian
        self._tree = self.unravel(self.y0.detach())  # of the structure of y0, which its owner may change
        self._shapes = [tuple(x.shape) for x in _leaves(y0, y0)]
        self.real = self.dtype.to_real() if self.dtype.is_complex else self.dtype
        self.span, self._looked = span, False
        self._formed: LinearOperator | None = None
        self.watched: Found | None = None  # collects what evaluations depend on, where somebody wants to know

    # -- f --------------------------------------------------------------------------------------------------------

    def _call(self, t: Tensor, y: Tensor) -> Tensor:
        assert self.func is not None
        self.counts.evaluations += 1
        value = self.func(t.to(self.real), self.unravel(y))
        leaves = _leaves(value, self._tree)
        if [tuple(x.shape) for x in leaves] != self._shapes:
            got = [tuple(x.shape) for x in leaves]
            raise OperandError(f"func returned shapes {got}; expected those of y0, {self._shapes}")
        flat = torch.cat([x.reshape(-1) for x in leaves]) if len(leaves) > 1 else leaves[0].reshape(-1)
        if flat.dtype != self.dtype:
            if not torch.is_autocast_enabled(self.device.type):
                raise OperandError(f"func returned {flat.dtype}; y0 is {self.dtype}: convert one of them")
            flat = flat.to(self.dtype)
        return flat

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y) as a vector (n,), finite or refused."""
        if self.func is None:
            return torch.zeros_like(y)
        if self.watched is None:
            value = self._call(t, y)
        else:
            t, y = t.detach(), y.detach()
            value, found = watch(lambda: self._call(t, y), lambda out: [out], t, y)
            self.watched.add(found)
            value = value.detach()
        return self._finite(value, t)

    def _finite(self, value: Tensor, t: Tensor) -> Tensor:
        name = f"func(t, y) at t = {float(t.detach()):.6g}"
        refuse_transforms(value, name)
        check_finite(value, name)
        return value

    def rate(self, t: Tensor, y: Tensor) -> Tensor:
        """y' = A y + f(t, y)."""
        A = self.stiff()
        if A is None:
            return self.f(t, y)
        self.counts.matvecs += 1
        return A @ y + self.f(t, y)

    def semilinear(self, t: Tensor, y: Tensor) -> Point:
        """The point as seen by a method that keeps A and does not linearise f."""
        A = self.stiff()
        assert A is not None
        self.counts.matvecs += 1
        f = self.f(t, y)
        return Point(t, y, A, A @ y + f, f)

    def stiff(self) -> LinearOperator | None:
        """A, as a matrix where that is formed: once for all steps that run under one graph."""
        if self._formed is None and self.linear is not None:
            self._formed = self.formed(self.linear)
        return self._formed

    def begin(self) -> None:
        """Forget what belongs to an earlier graph."""
        self._formed = None

    # -- linearisation --------------------------------------------------------------------------------------------

    def linearize(self, t: Tensor, y: Tensor) -> Point:
        """The point with f linearised in y and t."""
        if self.func is None:
            return self.semilinear(t, y)
        at = Linearization(self._call, t, y)
        if torch.is_grad_enabled() or in_transform():
            f = self.f(t, y)  # on the graph of y: the record, made later, has a leaf in its place
        else:
            f = self._finite(at.record().value.detach(), t)
            if self.watched is not None and at.found is not None:
                self.watched.add(at.found)
        N: LinearOperator | None
        if self.jacobian is None:
            N = JacobianOperator(at)
            N = None if N.zero else N
        else:
            N = self._given(t, y)
        N = None if N is None else self.formed(N)
        A = self.stiff()
        J = self._sum(A, N)
        rate = f if A is None else A @ y + f
        self.counts.matvecs += A is not None
        T = TimeDerivative(at)
        slope = None if T.zero else self.product(T, torch.ones(1, dtype=self.dtype, device=self.device))
        point = Point(t, y, J, rate, f, N, slope, at)
        if not self._looked and not in_transform():
            self._looked = True
            self._look(point)
        return point

    def _look(self, at: Point) -> None:
        """At the first step: whether what is taken for the derivatives of f belongs to its values."""
        if at.slope is None:
            check_time(self.f, at.t, at.y, at.f, self.span)
        if self.jacobian is not None:
            assert at.N is not None
            check_jacobian(self.f, at.t, at.y, at.f, at.N)
        elif at.N is None:
            check_dependence(self.f, at.t, at.y, at.f)

    def _given(self, t: Tensor, y: Tensor) -> LinearOperator:
        def call() -> LinearOperator:
            assert self.jacobian is not None
            return as_square(self.jacobian(t.to(self.real), self.unravel(y)), self.y0, "jacobian(t, y)")

        if self.watched is None:
            return call()
        t, y = t.detach(), y.detach()
        N, found = watch(call, lambda N: [x for x in N.tensors() if x.requires_grad], t, y)
        self.watched.add(found)
        return N

    def _sum(self, A: LinearOperator | None, N: LinearOperator | None) -> LinearOperator:
        if A is None or N is None:
            return N or A or self.formed(_Zero((self.n, self.n), self.dtype, self.device))
        if self.small and isinstance(A, Dense) and isinstance(N, Dense):
            return Dense(A.matrix + N.matrix, hermitian=False)
        return A + N

    def product(self, J: LinearOperator, x: Tensor) -> Tensor:
        """J x, differentiable."""
        self.counts.matvecs += 1
        plain = isinstance(J, Dense) or isinstance(self.settings.gradient, Unrolled)
        return J @ x if plain else attached(J, x, "odeint")


def as_square(x: Any, y: Tensor, name: str) -> LinearOperator:
    """``x`` as an operator on the flattened state y."""
    n = y.numel()
    plain = callable(x) and not isinstance(x, (Tensor, LinearOperator))
    A = aslinearoperator(x, shape=n, dtype=y.dtype, device=y.device) if plain else aslinearoperator(x)
    if A.shape != (n, n) or A.dtype != y.dtype or A.device != y.device:
        raise OperandError(
            f"{name} is an operator of shape {A.shape} in {A.dtype} on {A.device}; expected ({n}, {n}) in {y.dtype} on "
            f"{y.device}: it acts on the flattened y0"
        )
    return A


class _Zero(LinearOperator):
    """The zero matrix, where f does not depend on y and there is no A."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device, hermitian=True, psd=True)

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.zeros_like(X)


def _leaves(tree: Any, like: Any) -> list[Tensor]:
    """Tensors of ``tree`` in the order that they have in ``like``: those of a dictionary belong together by key."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict) and isinstance(like, dict):
        if tree.keys() != like.keys():
            raise OperandError(f"func returned a dictionary with keys {list(tree)}; expected those of y0, {list(like)}")
        return [x for key, item in like.items() for x in _leaves(tree[key], item)]
    if isinstance(tree, (list, tuple)) and isinstance(like, (list, tuple)) and len(tree) == len(like):
        return [x for pair in zip(tree, like) for x in _leaves(*pair)]
    got, expected = (
        f"{type(x).__name__} of {len(x)}" if isinstance(x, (dict, list, tuple)) else type(x).__name__
        for x in (tree, like)
    )
    raise OperandError(f"func returned a {got} where y0 has a {expected}; expected tensors of y0's structure")
