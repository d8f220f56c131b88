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

from .errors import SecondDerivativeError, TransformError
from .numerics import (
    FORWARD_REFUSED,
    VMAP_REFUSED,
    full_precision,
    refuse_transforms,
    refuse_vmap,
    unwrap,
    version,
)
from .operators.base import Gradients, LinearOperator

# Whether the running backward pass leaves its graph for another one; True outside of any
_graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

PAIR_CHUNK = 32  # columns of one re-evaluation of a callable in backward: bounds the memory of its graph


class Pair(NamedTuple):
    """One term ⟨Λ, dA (Q C)⟩ of (P), Q a block of the plan and C ``coefficients`` (None for the identity).

    Either plain blocks, Λ (n, r) with Q (n, k) and C (k, r), or batches of Krylov bases stored by rows, Λ (m, r, n)
    with Q (m, k, n) and C (m, k, r), meaning the sum over the batch. ``block`` stands for the plan's Q where the rule
    made it anew, to save its memory between the passes (for deferred operators only).
    """

    Lam: Tensor
    coefficients: Tensor | None = None
    block: Tensor | None = None


class Cotangents(NamedTuple):
    """What a rule returns: one :class:`Pair` (or None) per block of the plan, one gradient (or None) per input."""

    pairs: Sequence[Pair | None]
    inputs: Sequence[Tensor | None]


Rule = Callable[..., Cotangents]


@dataclass
class _Plan:
    """Everything backward needs that is not a differentiable tensor."""

    operators: tuple[LinearOperator, ...]  # one per block of Q: the bound operator, or its adjoint
    blocks: tuple[Tensor, ...]  # Q, known in the forward pass: (n, k), or (m, k, n) for a batch of bases
    values: tuple[Tensor, ...]
    rule: Rule
    name: str
    deferred: bool
    num_inputs: int
    needs: list[bool]  # filled in backward, shared with the Run
    versions: list[tuple[Tensor, int]] = field(default_factory=list)  # what must not change in place before backward


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
        self._needs: list[bool] = []
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

    @property
    def records(self) -> bool:
        """Whether gradients could be wanted: grad mode was on when the run was made."""
        return self._grad_mode

    @property
    def matmat(self) -> Products:
        """X ↦ A X for blocks (n, m)."""
        return Products(self, self._first_or_next, "the product")

    def _first_or_next(self, X: Tensor) -> Tensor:
        if not self._fresh:
            return self.bound._matmat(X)
        self._fresh = False
        if self._grad_mode:
            Y, self.bound = self.A.capture(X)
            return Y
        return self.A._matmat(X)

    def adjoint(self, width: int) -> Products:
        """X ↦ Aᴴ X for many blocks of one width, inside or outside of the block (backward)."""
        return Products(self, self.bound.adjoint_product(width), "the adjoint product")

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

    def needs_input(self, i: int) -> bool:
        """Within a rule: whether the gradient of the i-th input is asked for.

        Only autograd knows: inside of nested transforms a tensor's own flag speaks of one level alone.
        """
        return self._needs[i]

    def needs_operator(self) -> bool:
        """Within a rule: whether the gradient of any tensor of the operator is asked for."""
        return any(self._needs[len(self.inputs) :])

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
            blocks: the blocks Q that the pairs refer to, (n, k), or (m, k, n) for batches of bases.
            adjoint: for each block, whether it goes through Aᴴ instead of A.
            name: what is differentiated, for error messages.
        """
        if not self.wants_gradient():
            return tuple(values)
        flags = tuple(adjoint) if adjoint is not None else (False,) * len(blocks)
        operators = tuple(self.bound.mH if flag else self.bound for flag in flags)
        deferred, number = self.bound.deferrable, len(self.inputs)
        plan = _Plan(operators, tuple(blocks), tuple(values), rule, name, deferred, number, self._needs)
        if plan.deferred:
            tensors = self.bound.tensors()
        else:
            with torch.enable_grad(), full_precision():
                tensors = tuple(op._matmat(_as_columns(Q)) for op, Q in zip(operators, blocks, strict=True))
        plan.versions = [(t, version(t)) for t in (*self.inputs, *tensors, *blocks)]
        return _Attach.apply(plan, *self.inputs, *tensors)


class Products:
    """The products of a run with its operator, or with the adjoint: counted, and looked at while they are the first."""

    def __init__(self, run: Run, inner: Callable[[Tensor], Tensor], name: str) -> None:
        self._run, self._inner, self._name = run, inner, name

    def __call__(self, X: Tensor) -> Tensor:
        run, first = self._run, self._run._fresh
        run.num_matvecs += X.shape[1]
        Y = self._inner(X)
        if first:
            refuse_transforms(Y, self._name)
        return Y.clone() if Y is X else Y  # the identity must not hand out its operand: callers write into Y

    def lanczos_loop(self) -> Callable[..., Any] | None:
        """Compiled Lanczos steps of a Hermitian operator that has them, counted; None for all others."""
        run = self._run
        loop = run.bound.lanczos_loop() if run.bound.hermitian else None
        if loop is None:
            return None
        run._fresh = False  # a leaf closes over nothing that a first product would have to find

        def counted(*arguments: Any) -> Any:
            steps = loop(*arguments)
            run.num_matvecs += len(steps.alpha)
            return steps

        return counted


class _Attach(torch.autograd.Function):
    """Identity on finished values; its backward is rule, then pairing."""

    @staticmethod
    def forward(plan: _Plan, *args: Tensor) -> tuple[Tensor, ...]:
        values, plan.values = plan.values, ()
        # The caller may change its values in place and a rule may read them again. Values that are blocks as well
        # (a basis, a solution) are not copied but watched; a new tensor in any case, since a block that is also an
        # output would hold its own graph alive.
        held = {b.untyped_storage().data_ptr() for b in map(unwrap, plan.blocks)}
        plain = (unwrap(v) for v in values)
        return tuple(v.detach() if v.untyped_storage().data_ptr() in held else v.clone() for v in plain)

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
        for c in cotangents:
            if c is not None:
                refuse_vmap(c, f"the cotangent of {plan.name}")
        for t, before in plan.versions:
            if version(t) != before:
                raise RuntimeError(
                    f"{plan.name}: a tensor of shape {tuple(t.shape)} that its gradient needs was changed in place "
                    "between the forward pass and backward: change a copy, or call backward first"
                )
        with torch.no_grad(), full_precision():
            for operator in plan.operators:
                operator.check_unchanged()
            plan.needs[:] = needs
            result = plan.rule(*cotangents)
            grads: list[Tensor | None] = list(result.inputs)
            grads += _contract(plan, result.pairs, len(args) - plan.num_inputs, any(needs[plan.num_inputs :]))
            grads = [
                unwrap(g.to(a.dtype).reshape(a.shape)) if (g is not None and need) else None
                for g, a, need in zip(grads, args, needs, strict=True)
            ]
        if torch.is_grad_enabled():
            grads = [None if g is None else _Refuse.apply(plan.name, g, *args, *cotangents) for g in grads]
        if not _graph_is_kept():  # as autograd does with saved tensors: a loss that is still held must not hold A
            ctx.plan = None
        return (None, *grads)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise TransformError(VMAP_REFUSED.format(name="an operand"))

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise TransformError(FORWARD_REFUSED.format(name="an operand"))


def _contract(plan: _Plan, pairs: Sequence[Pair | None], number: int, needed: bool) -> list[Tensor | None]:
    """Gradients of the tensors (deferred), or cotangents of the recorded products."""
    if not plan.deferred:
        return [None if pair is None else _as_columns(_spread(pair)) for pair in pairs]
    total: list[Tensor | None] = [None] * number
    if not needed:
        return total
    for operator, Q, pair in zip(plan.operators, plan.blocks, pairs, strict=True):
        if pair is None or not pair.Lam.numel():
            continue
        own = Q if pair.block is None else pair.block
        for i, g in enumerate(operator.pair(_as_columns(pair.Lam), _as_columns(_effective(own, pair.coefficients)))):
            if g is not None:
                total[i] = g if total[i] is None else total[i] + g  # type: ignore[operator]
    return total


def _as_columns(Q: Tensor) -> Tensor:
    """A block (n, k) from a block or from a batch of bases (m, k, n)."""
    return Q if Q.ndim == 2 else Q.flatten(0, 1).mT


def _effective(Q: Tensor, C: Tensor | None) -> Tensor:
    """Q C, in the layout of Q."""
    if C is None:
        return Q
    return Q @ C if Q.ndim == 2 else C.to(Q.dtype).mT @ Q


def _spread(pair: Pair) -> Tensor:
    """Λ Cᴴ, the cotangent of the products with all of Q."""
    Lam, C, _ = pair
    if C is None:
        return Lam
    return Lam @ C.mH if Lam.ndim == 2 else C.to(Lam.dtype).conj() @ Lam


class _Refuse(torch.autograd.Function):
    """Identity whose backward raises by name.

    ``once_differentiable`` guards only where the cotangent requires grad, and the engine skips nodes that do not lead
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
            "where second derivatives are needed give gradient=ritz.Unrolled() to functions that take it"
        )

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise TransformError(VMAP_REFUSED.format(name="an operand"))


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
        # The graph is retained because a callable may keep part of it (a factor that it computed once and caches).
        parts = torch.autograd.grad(H, wanted, Lam[:, start : start + chunk], allow_unused=True, retain_graph=True)
        total = [b if a is None else (a if b is None else a + b) for a, b in zip(total, parts, strict=True)]
    found = iter(total)
    return tuple(next(found) if t.requires_grad else None for t in tensors)


def _zero_column(A: LinearOperator) -> Tensor:
    return torch.zeros(A.shape[1], 1, dtype=A.dtype, device=A.device)
