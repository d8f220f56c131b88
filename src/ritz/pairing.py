"""⟨Λ, dA Q⟩: the one gradient primitive.

Every method of ritz touches the tensors θ inside an operator A(θ) only through products A q_j, so the reverse-mode
derivative of whatever it computes has the form

    ⟨ȳ, dy⟩ = Σ_j Re λ_jᴴ (dA) q_j + Re⟨v̄, dv⟩                                                       (P)

with vectors λ_j that a *rule* computes numerically, without a graph. :class:`Run` makes products while noting what a
callable closes over; :meth:`Run.attach` hangs finished values onto the autograd graph; backward asks the rule for
the pairs and lets the operator contract them (``A.pair``). Nobody else writes an autograd rule for an operator.

First derivatives only, and honestly so: see :class:`_Refuse`. docs/derivations/pairing.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import OperandError, SecondDerivativeError, TransformError
from .numerics import full_precision
from .operators.base import Gradients, LinearOperator

VMAP_REFUSED = (
    "a ritz primitive was reached by torch.func.vmap (hessian, jacrev and jacfwd use it too), which it does not serve; "
    "give several vectors as the columns of a block (n, m), or loop"
)
FORWARD_REFUSED = (
    "{name} carries a forward-mode tangent, which this primitive does not serve; use reverse mode (backward, "
    "torch.autograd.grad, torch.func.grad), or gradient=ritz.Unrolled()"
)
PAIR_CHUNK = 32  # columns of one re-evaluation of a callable in backward: bounds the memory of its graph


class Pair(NamedTuple):
    """One term ⟨Λ, dA (Q C)⟩ of (P): ``Lam`` (n, r), ``coefficients`` C (k, r), or None for the identity."""

    Lam: Tensor
    coefficients: Tensor | None = None


class Cotangents(NamedTuple):
    """What a rule returns: one :class:`Pair` (or None) per block of the plan, one gradient (or None) per input."""

    pairs: Sequence[Pair | None]
    inputs: Sequence[Tensor | None]


Rule = Callable[..., Cotangents]


@dataclass
class _Plan:
    """Everything backward needs that is not a differentiable tensor."""

    operators: tuple[LinearOperator, ...]  # one per block of Q: the bound operator, or its adjoint
    blocks: tuple[Tensor, ...]  # Q, known in the forward pass
    values: tuple[Tensor, ...]
    rule: Rule
    name: str
    deferred: bool
    num_inputs: int
    slots: list[tuple[int, ...]] = field(default_factory=list)  # for each operator: positions of its tensors


class Run:
    """Products of one computation, and what they depend on.

    ``with Run(A, *inputs) as run`` enters ritz's numerics (no graph, full precision); ``run.matmat`` multiplies; the
    first product also finds the captured tensors of callables when gradients could be wanted. ``run.attach`` is
    called after the block.
    """

    def __init__(self, A: LinearOperator, *inputs: Tensor) -> None:
        self.A = A
        self.bound = A
        self.inputs = inputs
        self.num_matvecs = 0
        self._grad_mode = torch.is_grad_enabled()
        self._fresh = True
        self._stack: Any = None

    def __enter__(self) -> Run:
        for x in self.inputs:
            refuse_transforms(x, "an operand")
        self._stack = (full_precision(), torch.no_grad())
        for c in self._stack:
            c.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for c in reversed(self._stack):
            c.__exit__(*exc)

    def matmat(self, X: Tensor) -> Tensor:
        """A X for a block (n, m)."""
        self.num_matvecs += X.shape[1]
        if not self._fresh:
            return self.bound._matmat(X)
        self._fresh = False
        if self._grad_mode:
            Y, self.bound = self.A.capture(X)
        else:
            Y = self.A._matmat(X)
        refuse_transforms(Y, "the product")
        return Y

    def adjoint(self, width: int) -> Callable[[Tensor], Tensor]:
        """Aᴴ X for many blocks of one width, inside or outside of the block (backward)."""
        inner = self.bound.adjoint_product(width)

        def product(X: Tensor) -> Tensor:
            self.num_matvecs += X.shape[1]
            return inner(X)

        return product

    def wants_gradient(self) -> bool:
        """Whether any input or tensor requires grad: if not, nothing is kept and nothing extra is computed."""
        if not self._grad_mode:
            return False
        if self._fresh:  # no product was needed (a zero vector, depth 0): look without numerics
            _, self.bound = self.A.capture(_zero_column(self.A))
            self._fresh = False
        if not self.bound.deferrable:
            return True
        return any(t.requires_grad for t in (*self.inputs, *self.bound.tensors()))

    def attach(
        self,
        values: Sequence[Tensor],
        rule: Rule,
        blocks: Sequence[Tensor],
        *,
        adjoint: Sequence[bool] | None = None,
        name: str,
    ) -> tuple[Tensor, ...]:
        """Give finished ``values`` the derivative (P).

        Args:
            values: outputs, computed without a graph.
            rule: maps one cotangent per value (None where zero) to :class:`Cotangents`; runs in backward without a
                graph.
            blocks: the blocks Q (n, k) that the pairs refer to.
            adjoint: for each block, whether it goes through Aᴴ instead of A.
            name: what is differentiated, for error messages.
        """
        if not self.wants_gradient():
            return tuple(values)
        flags = tuple(adjoint) if adjoint is not None else (False,) * len(blocks)
        operators = tuple(self.bound.mH if flag else self.bound for flag in flags)
        plan = _Plan(operators, tuple(blocks), tuple(values), rule, name, self.bound.deferrable, len(self.inputs))
        if plan.deferred:
            tensors = self.bound.tensors()
        else:
            with torch.enable_grad(), full_precision():
                tensors = tuple(op._matmat(Q) for op, Q in zip(operators, blocks, strict=True))
        return _Attach.apply(plan, *self.inputs, *tensors)


class _Attach(torch.autograd.Function):
    """Identity on finished values; its backward is rule, then pairing."""

    @staticmethod
    def forward(plan: _Plan, *args: Tensor) -> tuple[Tensor, ...]:
        values, plan.values = plan.values, ()
        return tuple(_unwrap(v) for v in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan = inputs[0]
        # Also tensors without gradient: an in-place change of any of them before backward must raise.
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        args = ctx.saved_tensors  # raises if one of them was changed in place
        needs = ctx.needs_input_grad[1:]
        with torch.no_grad(), full_precision():
            for operator in plan.operators:
                operator.check_unchanged()
            result = plan.rule(*cotangents)
            grads: list[Tensor | None] = list(result.inputs)
            grads += _contract(plan, result.pairs, any(needs[plan.num_inputs :]))
            grads = [
                _unwrap(g.to(a.dtype).reshape(a.shape)) if (g is not None and need) else None
                for g, a, need in zip(grads, args, needs, strict=True)
            ]
        if torch.is_grad_enabled():
            grads = [None if g is None else _Refuse.apply(plan.name, g, *args, *cotangents) for g in grads]
        return (None, *grads)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise TransformError(VMAP_REFUSED)

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise TransformError(FORWARD_REFUSED.format(name="a ritz primitive's operand"))


def _contract(plan: _Plan, pairs: Sequence[Pair | None], needed: bool) -> list[Tensor | None]:
    """Gradients of the tensors (deferred), or cotangents of the recorded products."""
    if not plan.deferred:
        out: list[Tensor | None] = []
        for pair in pairs:
            if pair is None:
                out.append(None)
            else:
                out.append(pair.Lam if pair.coefficients is None else pair.Lam @ pair.coefficients.mH)
        return out
    total: list[Tensor | None] = [None] * len(plan.operators[0].tensors())
    if not needed:
        return total
    for operator, Q, pair in zip(plan.operators, plan.blocks, pairs, strict=True):
        if pair is None or pair.Lam.shape[1] == 0:
            continue
        block = Q if pair.coefficients is None else Q @ pair.coefficients
        for i, g in enumerate(operator.pair(pair.Lam, block)):
            if g is not None:
                total[i] = g if total[i] is None else total[i] + g  # type: ignore[operator]
    return total


class _Refuse(torch.autograd.Function):
    """Identity whose backward raises by name.

    to a requested input: most second derivatives would come out silently wrong. So each gradient passes through a
    node that has every input, tensor and cotangent as its inputs, and whichever is asked for leads here.
    """

    @staticmethod
    def forward(name: str, grad: Tensor, *others: Tensor | None) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise SecondDerivativeError(
            f"{ctx.name} was differentiated twice; its gradient rule gives first derivatives only: "
            "use gradient=ritz.Unrolled() where second derivatives are needed"
        )

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise TransformError(VMAP_REFUSED)


class _Product(torch.autograd.Function):
    """A X for an operator whose own pairing is better than autograd's record of its product (sparse, kernels)."""

    @staticmethod
    def forward(A: Any, X: Tensor, *tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return A._numeric(X)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.A = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        X, *tensors = ctx.saved_tensors
        A, needs = ctx.A, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # a second derivative is wanted: differentiate the recorded product instead
            wanted = [t for t, need in zip((X, *tensors), needs, strict=True) if need]
            found = iter(torch.autograd.grad(A._recorded(X), wanted, G, create_graph=True, allow_unused=True))
            return (None, *(next(found) if need else None for need in needs))
        with full_precision():
            grad_X = A._rmatmat(G) if needs[0] else None
            grads = A.pair(G, X) if any(needs[1:]) else (None,) * len(tensors)
        return (None, grad_X, *grads)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise TransformError(VMAP_REFUSED)


def product(A: Any, X: Tensor) -> Tensor:
    """A X, differentiable to any order in A's tensors and X, with A's own pairing for the first derivative.

    ``A`` has ``_numeric`` (the product without a graph) and ``_recorded`` (in plain differentiable operations).
    """
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (X, *A.tensors())):
        if _has_tangent(X) or any(_has_tangent(t) for t in A.tensors()) or in_transform():
            return A._recorded(X)
        return A._numeric(X)
    if in_transform() or any(_has_tangent(t) for t in (X, *A.tensors())):
        return A._recorded(X)
    return _Product.apply(A, X, *A.tensors())


def pair_by_autograd(
    product: Callable[[Tensor], Tensor], tensors: Sequence[Tensor], Lam: Tensor, Q: Tensor, chunk: int = PAIR_CHUNK
) -> Gradients:
    """The pairing of a product known only as code: record it on column chunks of Q and pull Λ back through it.

    The tensors must not be nested in each other (one computed from another): see ``function.py`` for the check.
    Memory is that of one chunk's graph.
    """
    wanted = [t for t in tensors if t.requires_grad]
    if not wanted:
        return (None,) * len(tensors)
    total: list[Tensor | None] = [None] * len(wanted)
    for start in range(0, Q.shape[1], chunk):
        with torch.enable_grad():
            H = product(Q[:, start : start + chunk])
        if not H.requires_grad:
            continue
        parts = torch.autograd.grad(H, wanted, Lam[:, start : start + chunk], allow_unused=True)
        total = [b if a is None else (a if b is None else a + b) for a, b in zip(total, parts, strict=True)]
    found = iter(total)
    return tuple(next(found) if t.requires_grad else None for t in tensors)


def in_transform() -> bool:
    """Whether a torch.func transform is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms(x: Tensor, name: str) -> None:
    """Raise by name under vmap and forward mode, which the rules do not serve (they would be silently wrong)."""
    functorch = torch._C._functorch
    inner, levels = x, 0
    while functorch.is_gradtrackingtensor(inner) or functorch.is_batchedtensor(inner):
        if functorch.is_batchedtensor(inner):
            raise TransformError(
                f"{name} is batched by torch.func.vmap, which this primitive does not serve; give several vectors as "
                "the columns of a block (n, m) instead, or loop over operators"
            )
        if _has_tangent(inner):
            break
        inner, levels = functorch.get_unwrapped(inner), levels + 1
    if _has_tangent(x) or _has_tangent(inner):
        raise TransformError(FORWARD_REFUSED.format(name=name))


def _has_tangent(x: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def _unwrap(x: Tensor) -> Tensor:
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return x


def _zero_column(A: LinearOperator) -> Tensor:
    return torch.zeros(A.shape[1], 1, dtype=A.dtype, device=A.device)


def check_square(A: LinearOperator, what: str) -> None:
    """Raise unless A is square."""
    if A.shape[0] != A.shape[1]:
        raise OperandError(f"{what} needs a square operator; this one has shape {A.shape}")
