"""Conformance checks: does an operator keep its promises, and does a gradient agree with finite differences?

Both raise :class:`CheckError` with one sentence on the first violation. They are what ritz's own tests run, and they
are public so that you can run them on your own operators and functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdjointUnavailableError, OperandError, SecondDerivativeError
from ..operators import Dense, LinearOperator
from ..operators.capture import nested
from ..pairing import Cotangents, Pair, Run

__all__ = ["CheckError", "check_gradient", "check_operator"]


class CheckError(AssertionError):
    """A promise was broken; the message says which one, and by how much."""


def check_operator(
    A: LinearOperator,
    *,
    generator: torch.Generator | None = None,
    seed: int = 0,
    rtol: float | None = None,
    gradients: bool = True,
) -> None:
    """Check that an operator keeps the contract that everything in ritz relies on.

    The truth is the matrix whose columns are the products with unit vectors, one at a time. Against it stand: block
    products of several widths (a width equal to the size included), ``to_dense``, ``columns``, ``diagonal``, the
    adjoint and the transpose, the flags, the algebra; then the pairing against autograd.

    Args:
        A: a small operator (n, m); the dense matrix is formed, and its eigenvalues where it is flagged Hermitian.
        generator, seed: of the random vectors; the generator overrides the seed.
        rtol: relative tolerance in norm; default 4·eps^(2/3) (1.5e-10 in float64, 1e-4 in float32).
        gradients: also check ``tensors`` and ``pair``, and that ``A @ X`` is differentiable.

    Raises:
        CheckError: with one sentence on the first broken promise.

    Cost: about 2 (n + m) products and a few dense n×m matrices.
    """
    draw = _Draw(A, generator if generator is not None else torch.Generator().manual_seed(seed))
    rtol = 4 * torch.finfo(A.dtype).eps ** (2 / 3) if rtol is None else rtol
    before = [t.detach().clone() for t in A.tensors()]
    M = _check_products(A, draw, rtol)
    _check_flags(A, M, rtol)
    adjoint = _check_adjoint(A, M, draw, rtol)
    _check_entries(A, M, draw, rtol)
    _check_algebra(A, M, draw, rtol, adjoint)
    _check_refusals(A, draw)
    if gradients:
        _check_pairing(A, draw, rtol, adjoint)
    for i, (t, old) in enumerate(zip(A.tensors(), before)):
        if not torch.equal(t.detach(), old):
            raise CheckError(f"{A!r}: tensors()[{i}] was changed by products or gradients")


class _Draw:
    """Random blocks that fit an operator."""

    def __init__(self, A: LinearOperator, generator: torch.Generator) -> None:
        self.dtype, self.device, self.generator = A.dtype, A.device, generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype).to(self.device)


def _agree(got: Any, want: Tensor, rtol: float, what: str, scale: float = 0.0) -> None:
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        found = f"{tuple(got.shape)} {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
        raise CheckError(f"{what} returned {found}; expected {tuple(want.shape)} {want.dtype}")
    got, want = got.detach(), want.detach()
    if not bool(torch.isfinite(got).all()):
        raise CheckError(f"{what} has NaN or Inf")
    error, size = float((got - want).norm()), max(float(got.norm()), float(want.norm()), scale)
    if error > rtol * size:
        raise CheckError(f"{what} is off by {error / size:.2e} relative to what it should be (tolerance {rtol:.1e})")


@torch.no_grad()
def _check_products(A: LinearOperator, draw: _Draw, rtol: float) -> Tensor:
    n, m = A.shape
    if bool(((A @ torch.zeros(m, dtype=A.dtype, device=A.device)) != 0).any()):
        raise CheckError(f"{A!r} @ 0 is not 0: the product is not linear")
    unit = torch.eye(m, dtype=A.dtype, device=A.device)
    columns = [A @ e for e in unit.unbind(1)]
    for y in columns:
        if not isinstance(y, Tensor) or y.shape != (n,) or y.dtype != A.dtype or y.device != A.device:
            raise CheckError(f"{A!r}: a product with a vector must return ({n},) in {A.dtype} on {A.device}")
    M = torch.stack(columns, 1)
    size = float(M.norm())
    for width in dict.fromkeys((1, 2, 3, n, m)):
        X = draw(m, width)
        kept, counted = X.clone(), X._version
        Y = A @ X
        _agree(Y, M @ X, rtol, f"{A!r} @ X with {width} columns", size * float(X.norm()) / max(m, 1) ** 0.5)
        if X._version != counted or not torch.equal(X, kept):
            raise CheckError(f"{A!r} @ X changed X in place")
        if Y.untyped_storage().data_ptr() == X.untyped_storage().data_ptr():
            raise CheckError(f"{A!r} @ X returned memory of X; writing into the product would change the operand")
    x, y = draw(m), draw(m)
    a, b = (complex(0.7, -1.3), complex(-2.1, 0.4)) if A.dtype.is_complex else (0.7, -2.1)
    _agree(A @ (a * x + b * y), a * (A @ x) + b * (A @ y), rtol, f"{A!r} @ (a x + b y), by linearity,")
    return M


@torch.no_grad()
def _check_adjoint(A: LinearOperator, M: Tensor, draw: _Draw, rtol: float) -> bool:
    """Whether there is an adjoint product; if so, it was right."""
    n, m = A.shape
    x, y = draw(m), draw(n)
    if A.mH.shape != (m, n) or A.mT.shape != (m, n):
        raise CheckError(f"{A!r}: mH has shape {A.mH.shape} and mT {A.mT.shape}; expected ({m}, {n})")
    try:
        z = A.mH @ y
    except AdjointUnavailableError:
        return False  # said by name, which is allowed
    left, right = torch.vdot(y, A @ x), torch.vdot(z, x)
    if float((left - right).abs()) > rtol * float(y.norm() * M.norm() * x.norm()):
        raise CheckError(f"{A!r}: <y, A x> = {left.item():.6g} but <A^H y, x> = {right.item():.6g}")
    for width in (1, 3):
        replay = A.adjoint_product(width)
        for _ in range(2):
            Y = draw(n, width)
            _agree(replay(Y), M.mH @ Y, rtol, f"{A!r}: adjoint_product({width})")
            _agree(A.mH @ Y, M.mH @ Y, rtol, f"{A!r}: mH @ Y with {width} columns")
            _agree(A.mT @ Y, M.mT @ Y, rtol, f"{A!r}: mT @ Y with {width} columns")
            _agree(A.mH.mH @ draw(m, 1).fill_(1), M.sum(1, keepdim=True), rtol, f"{A!r}: mH.mH", float(M.norm()))
    return True


@torch.no_grad()
def _check_entries(A: LinearOperator, M: Tensor, draw: _Draw, rtol: float) -> None:
    _agree(A.to_dense(), M, rtol, f"{A!r}: to_dense()")
    _agree(A.diagonal(), M.diagonal(), rtol, f"{A!r}: diagonal()", float(M.norm()) / max(M.shape[0], 1) ** 0.5)
    index = torch.randint(0, M.shape[1], (4,), generator=draw.generator)
    _agree(A.columns(index), M[:, index.to(M.device)], rtol, f"{A!r}: columns({index.tolist()})", float(M.norm()))
    _agree(A.columns([0]), M[:, :1], rtol, f"{A!r}: columns([0])", float(M.norm()))
    if "shape" not in repr(A):
        raise CheckError(f"{type(A).__name__}: its repr does not show the shape")


def _check_flags(A: LinearOperator, M: Tensor, rtol: float) -> None:
    for name in ("hermitian", "psd"):
        if getattr(A, name) not in (True, False, None):
            raise CheckError(f"{type(A).__name__}.{name} is {getattr(A, name)!r}; expected True, False or None")
    if M.shape[0] != M.shape[1]:
        if A.hermitian or A.psd:
            raise CheckError(f"{A!r} is rectangular and flagged Hermitian")
        return
    gap, size = float((M - M.mH).norm()), float(M.norm())
    if A.hermitian and gap > rtol * size:
        raise CheckError(f"{A!r} is flagged Hermitian, but |A - A^H| is {gap / size:.2e} of |A|")
    if A.hermitian is False and gap == 0:
        raise CheckError(f"{A!r} is flagged not Hermitian, but equals its adjoint exactly")
    if A.psd is None or gap > rtol * size:
        if A.psd:
            raise CheckError(f"{A!r} is flagged psd and is not Hermitian")
        return
    smallest = float(torch.linalg.eigvalsh((M + M.mH) / 2).min())
    if A.psd and smallest < -rtol * size:
        raise CheckError(f"{A!r} is flagged psd, but has the eigenvalue {smallest:.3e}")
    if not A.psd and smallest > rtol * size:
        raise CheckError(f"{A!r} is flagged not psd, but its smallest eigenvalue is {smallest:.3e}")


@torch.no_grad()
def _check_algebra(A: LinearOperator, M: Tensor, draw: _Draw, rtol: float, adjoint: bool) -> None:
    n, m = A.shape
    B, C, X = draw(n, m), draw(m, 3), draw(m, 2)
    scale = torch.tensor(1.5, dtype=A.dtype, device=A.device)
    table: dict[str, tuple[LinearOperator, Tensor]] = {
        "A + B": (A + Dense(B), M + B),
        "B + A": (B + A, M + B),
        "A - B": (A - Dense(B), M - B),
        "A + A": (A + A, 2 * M),
        "-2.5 A": (-2.5 * A, -2.5 * M),
        "A * tensor": (A * scale, 1.5 * M),
        "A / 4": (A / 4, M / 4),
        "A.declare()": (A.declare(), M),
    }
    if n == m:
        table["A + 0.5 I"] = (A.shift(0.5), M + 0.5 * torch.eye(n, dtype=A.dtype, device=A.device))
    if adjoint:
        table["(A + B)^H"] = ((A + Dense(B)).mH, (M + B).mH)
        table["A^H A"] = (A.mH @ A, M.mH @ M)
        table["A A^H"] = (A @ A.mH, M @ M.mH)
    for name, (operator, dense) in table.items():
        Z = X if operator.shape[1] == m else draw(operator.shape[1], 2)
        _agree(operator @ Z, dense @ Z, rtol, f"{A!r}: the product of {name}", float(dense.norm() * Z.norm()))
        _check_flags(operator, dense, rtol)
    Z = draw(3, 2)
    _agree((A @ Dense(C)) @ Z, M @ (C @ Z), rtol, f"{A!r}: the product of A C", float(M.norm()))


def _check_refusals(A: LinearOperator, draw: _Draw) -> None:
    m = A.shape[1]
    other = torch.float32 if A.dtype != torch.float32 else torch.float64
    wrong = {"one row too many": draw(m + 1), "a row too many": draw(m + 1, 2), "three axes": draw(m, 1, 1)}
    wrong["another dtype"] = torch.ones(m, dtype=other, device=A.device)
    for what, x in wrong.items():
        try:
            A @ x
        except OperandError:
            continue
        except Exception as error:
            raise CheckError(f"{A!r} @ x with {what} raised {type(error).__name__}; expected OperandError") from error
        raise CheckError(f"{A!r} @ x with {what}, {tuple(x.shape)} {x.dtype}, was accepted; expected OperandError")


def _check_pairing(A: LinearOperator, draw: _Draw, rtol: float, adjoint: bool) -> None:
    n, m = A.shape
    tensors = A.tensors()
    wanted = list({id(t): t for t in tensors if t.requires_grad}.values())
    Lam, Q = draw(n, 3), draw(m, 3)
    Y = A @ Q
    if not wanted:
        if Y.requires_grad:
            raise CheckError(f"{A!r}: A @ X depends on a tensor that requires grad and that tensors() does not name")
        return
    if not Y.requires_grad:
        raise CheckError(f"{A!r}: tensors() names {len(wanted)} that require grad, but A @ X has no graph")
    # The graph is retained throughout: part of it may be the caller's.
    truth = torch.autograd.grad(_inner(Lam, A.to_dense() @ Q), wanted, allow_unused=True, retain_graph=True)
    with Run(A, Q) as run:
        value = _inner(Lam, run.matmat(Q))
    (attached,) = run.attach([value], lambda g: Cotangents([Pair(g * Lam)], [None]), [Q], name="a check")
    found = torch.autograd.grad(attached, wanted, allow_unused=True, retain_graph=True)
    _agree_all(found, wanted, truth, rtol, f"{A!r}: the gradient through Run.attach")
    if run.bound.deferrable and not nested(tuple(wanted)):  # pair() gives partial derivatives
        with torch.no_grad():
            paired = A.pair(Lam, Q)
        if len(paired) != len(tensors):
            raise CheckError(f"{A!r}: pair() returned {len(paired)} gradients for {len(tensors)} tensors")
        _agree_all(paired, tensors, truth, rtol, f"{A!r}: pair()")
    X = Q.clone().requires_grad_(True)
    Y = A @ X
    found = torch.autograd.grad(_inner(Lam, Y), [X, *wanted], allow_unused=True, retain_graph=True)
    _agree_all(found[1:], wanted, truth, rtol, f"{A!r}: the gradient of A @ X")
    if adjoint:
        _agree(found[0], A.mH @ Lam, rtol, f"{A!r}: the gradient of A @ X with respect to X")
    weights = [draw(*t.shape).to(t.dtype) if t.dtype == draw.dtype else torch.ones_like(t) for t in wanted]
    twice = [_second(P, Lam, X, wanted, weights) for P in (A @ X, A.to_dense() @ X)]
    if twice[0] is not None and twice[1] is not None:
        _agree_all(twice[0], [X, *wanted], twice[1], 10 * rtol, f"{A!r}: the second derivative of A @ X")


def _second(Y: Tensor, Lam: Tensor, X: Tensor, wanted: list[Tensor], weights: list[Tensor]) -> Any:
    """Gradients of Σ⟨w, ∂⟨Λ, Y⟩/∂t⟩ in X and the tensors, None where that is refused by name."""
    first = torch.autograd.grad(_inner(Lam, Y), wanted, create_graph=True, allow_unused=True)
    terms = [_inner(w, g) for w, g in zip(weights, first) if g is not None and g.requires_grad]
    if not terms:
        return None
    try:
        return torch.autograd.grad(torch.stack(terms).sum(), [X, *wanted], allow_unused=True, retain_graph=True)
    except SecondDerivativeError:
        return None


def _summed(tensors: Sequence[Tensor], grads: Iterable[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
    """One gradient per distinct tensor: a composition may name one several times."""
    total: dict[int, tuple[Tensor, Tensor | None]] = {}
    for t, g in zip(tensors, grads):
        old = total.get(id(t), (t, None))[1]
        total[id(t)] = (t, g if old is None else (old if g is None else old + g))
    return list(total.values())


def _agree_all(
    grads: Sequence[Tensor | None], tensors: Sequence[Tensor], truth: Sequence[Tensor | None], rtol: float, what: str
) -> None:
    """Compare gradients with the true ones, which are given once for every tensor that requires grad."""
    found = [(t, g) for t, g in _summed(tensors, grads) if t.requires_grad]
    for i, ((t, g), want) in enumerate(zip(found, truth, strict=True)):
        want = torch.zeros_like(t) if want is None else want
        g = torch.zeros_like(t) if g is None else g
        _agree(g.to_dense(), want.to_dense(), rtol, f"{what} for tensor {i} of shape {tuple(t.shape)}")


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Re⟨a, b⟩."""
    product = (a.conj() * b).sum()
    return product.real if product.is_complex() else product


def check_gradient(
    fn: Callable[..., Any],
    *tensors: Any,
    directions: int = 3,
    rtol: float = 1e-6,
    step: float = 1e-3,
    seed: int = 0,
) -> float:
    """Compare reverse-mode gradients of ``fn`` with central finite differences in random directions.

    Outputs of any shape are contracted with fixed random weights. Differences with steps h, h/2 and h/4 are
    extrapolated (error h⁶), so that 1e-6 is reached well before rounding.

    Args:
        fn: function of the tensors, returning a tensor or a sequence of tensors. It must be deterministic.
        tensors: arguments; each float64 or complex128 tensor is differentiated, anything else is passed on.
        directions: random directions per tensor.
        rtol: largest relative error allowed.
        step: h relative to each tensor's norm; smaller where ``fn`` is defined only close by.
        seed: of directions and weights.

    Returns:
        The largest relative error.

    Raises:
        CheckError: disagreement, a gradient that is None though the value depends on the tensor, NaN or Inf, or
            differences that do not settle (not smooth, not deterministic, or the step is too large).
        OperandError: no float64 or complex128 tensor among the arguments.

    Cost: 6 evaluations per direction and tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    double = (torch.float64, torch.complex128)
    places = [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.dtype in double]
    if not places:
        raise OperandError("no argument is a float64 or complex128 tensor; finite differences need double precision")
    arguments = [t.detach().clone() if isinstance(t, Tensor) else t for t in tensors]
    weights: list[Tensor] = []

    def value(point: Sequence[Any]) -> tuple[Tensor, float]:
        result = fn(*point)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not weights:
            weights.extend(torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device) for y in outputs)
        total = torch.stack([_inner(w, y) for w, y in zip(weights, outputs)]).sum()
        if not bool(torch.isfinite(total)):
            raise CheckError(f"the value is {total.item()}")
        return total, sum(float((w * y.detach()).abs().sum()) for w, y in zip(weights, outputs))

    leaves = [t.clone().requires_grad_(True) if i in places else t for i, t in enumerate(arguments)]
    total, magnitude = value(leaves)
    wanted = [leaves[i] for i in places]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if total.requires_grad:
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
    noise = 100 * torch.finfo(torch.float64).eps * magnitude / (step / 4)
    repeated = value([t.detach().clone() if isinstance(t, Tensor) else t for t in leaves])[0]
    if float((repeated - total).detach().abs()) > noise * step:
        raise CheckError("two evaluations at one point differ; fix the generator or the seed inside of the function")
    worst = 0.0
    for i, g in zip(places, grads):
        x = arguments[i]
        if g is not None and not bool(torch.isfinite(g.to_dense()).all()):
            raise CheckError(f"the gradient of argument {i} has NaN or Inf")
        for _ in range(directions):
            E = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            E = E * ((float(x.norm()) or 1.0) / float(E.norm()))

            def at(h: float, i: int = i, E: Tensor = E) -> Tensor:
                moved = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
                moved[i] = moved[i] + h * E
                return value(moved)[0].detach()

            D = [float(at(h) - at(-h)) / (2 * h) for h in (step, step / 2, step / 4)]
            once = [(4 * b - a) / 3 for a, b in zip(D, D[1:])]
            measured = (16 * once[1] - once[0]) / 15
            claimed = 0.0 if g is None else float(_inner(g.to_dense(), E))
            size = max(abs(measured), abs(claimed))
            if g is not None:  # a direction may be nearly orthogonal to the gradient by chance
                size = max(size, float(g.to_dense().norm()) * float(E.norm()) / math.sqrt(x.numel()))
            if g is None and abs(measured) > noise:
                raise CheckError(f"the gradient of argument {i} is None, but the value changes at rate {measured:.3e}")
            if abs(measured - once[1]) > max(rtol, 1e-4) * size + noise:
                raise CheckError(
                    f"finite differences in argument {i} do not settle ({once[1]:.6e}, then {measured:.6e}); "
                    f"the function is not smooth there, or step={step:.0e} is too large"
                )
            error = max(abs(measured - claimed) - noise, 0.0) / size if size else 0.0
            if error > rtol:
                raise CheckError(
                    f"the gradient of argument {i} says {claimed:.9e} in a direction where finite differences give "
                    f"{measured:.9e}: relative error {error:.2e} (tolerance {rtol:.1e})"
                )
            worst = max(worst, error)
    return worst
