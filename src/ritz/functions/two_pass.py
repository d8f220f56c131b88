"""f(A)v for a Hermitian A without a basis in memory: ``Lanczos(two_pass=True)``, its gradient by rule F likewise.

The pairing ⟨V X Wᴴ, dA⟩ needs the bases V and W only through V·left and W·right of the compressed X = left rightᴴ,
about 10 columns: each is gathered in a second pass of its own space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import OperandError
from ..krylov.two_pass import PassedState, pass_again, run_without_basis
from ..methods import Frechet, GradientRule, Lanczos
from ..operators.base import LinearOperator
from ..pairing import Cotangents, Pair, Run
from ..result import Info, OnFailure, report
from . import frechet
from .closures import refuse_closures
from .scalar import ScalarFunction
from .space import HermitianSpace, Space, as_hermitian, build, check_psd, info_of, smallest
from .table import real_parts, select


def two_pass_multiply(
    functions: Sequence[ScalarFunction],
    A: LinearOperator,
    V: Tensor,
    times: Tensor | None,
    method: Lanczos,
    gradient: GradientRule,
    on_failure: OnFailure,
) -> tuple[list[Tensor], Info]:
    """f_p(A) V; arguments as in :func:`ritz.functions.multiply.multiply`.

    Cost: 2k products; backward 2k' + k more of the widths of the cotangents and of V. Memory: about 4 vectors per
        column and one per function; backward about 20 per column.
    """
    assert isinstance(gradient, Frechet)  # check_rule has seen to it
    A = as_hermitian(A, method)
    refuse_closures(functions, A.device, method)
    with Run(A, V) as run:
        space, error, status = build(run.matmat, V.detach(), method, functions, run=run_without_basis, psd=A.psd)
        run.inputs = (V,) if times is None else (V, times)
        assert isinstance(space, HermitianSpace)
        space.check_domain(functions)
        values = _values(run.matmat, V.detach(), space, [space.small(f) for f in functions])
        info = info_of(method, space, error, status, run.num_matvecs)
        report(info, what="f(A)v", target=method.tolerance(V.dtype), on_failure=on_failure)
        check_psd(A, space, info, on_failure)
        if not run.wants_gradient():
            return values, info
        if not run.bound.deferrable:
            raise OperandError(
                f"{method!r} came with {A!r}, which closes over values computed from others and needs the basis in the "
                "forward pass; expected an operator of leaf tensors, or two_pass=False"
            )
        rule = _rule(run, V.detach(), space, functions, times, method, gradient, info, on_failure)
    # A block of no columns holds the place of the one that backward makes.
    return list(run.attach(values, rule, [V.new_empty(V.shape[0], 0)], name="f(A)v")), info


def _values(product: Callable[[Tensor], Tensor], V: Tensor, space: HermitianSpace, small: list[Tensor]) -> list[Tensor]:
    """Σ_j c_j q_j in the precision of the vectors for several c (m, k), one more pass for all of them: (n, m) each."""
    C = torch.stack(small, 2)
    complex_of_real = C.is_complex() and not V.is_complex()
    parts = torch.cat([C.real, C.imag], 2) if complex_of_real else C
    out = _gather(product, V, space, parts)
    if complex_of_real:
        out = torch.complex(*out.split(len(small), 1))
    return [y.mT for y in out.unbind(1)]


def _gather(product: Callable[[Tensor], Tensor], V: Tensor, space: Space, C: Tensor) -> Tensor:
    """Rows Σ_j C[:, j, i] q_j, (m, r, n)."""
    assert isinstance(space.state, PassedState)
    return pass_again(product, V, space.state, C.to(V.dtype))


def _rule(
    run: Run,
    V: Tensor,
    space: HermitianSpace,
    functions: Sequence[ScalarFunction],
    times: Tensor | None,
    method: Lanczos,
    gradient: Frechet,
    info: Info,
    on_failure: OnFailure,
) -> Callable[..., Cotangents]:
    backward = gradient.method or method
    m = V.shape[1]
    speeds = [] if times is None else [f.in_time() for f in functions]

    def rule(*cotangents: Tensor | None) -> Cotangents:
        before = run.num_matvecs
        parts = real_parts(functions, cotangents, V.is_complex())
        rest: tuple[Tensor | None, ...] = () if times is None else (None,)
        if times is not None and run.needs_input(1):
            rest = (_time_gradients(run, V, space, speeds, times, cotangents),)
        if not parts:
            return Cotangents([None], [None, *rest])
        G = torch.cat([g for _, g in parts], 1)
        adjoint = run.adjoint(G.shape[1])
        likely = space.basis.shape[1]
        left, error, status = build(adjoint, G, backward, [f for f, _ in parts], likely, run_without_basis, run.A.psd)
        index = torch.arange(m, device=V.device)
        wide = torch.complex128 if V.is_complex() else torch.float64
        lefts, rights, bars = [], [], []
        for i, (f, _) in enumerate(parts):
            some = select(left, slice(i * m, (i + 1) * m))
            bars.append(some.small(f).conj().unsqueeze(2).to(wide))
            if not run.needs_operator():
                continue
            low = frechet.compress(frechet.core(some, space, f, index), gradient.tolerance(V.dtype, smallest(error)))
            lefts.append(low.left.to(wide))
            rights.append(low.right.to(wide))
        pair = None
        if lefts:
            width = max(x.shape[2] for x in lefts)
            Z = torch.cat([torch.cat([bar, _padded(x, width)], 2) for bar, x in zip(bars, lefts, strict=True)])
            rows = _gather(adjoint, G, left, Z)  # (parts·m, 1 + width, n)
            W = _gather(run.matmat, V, space, torch.cat([_padded(x, width) for x in rights], 2))
            pair = Pair(torch.cat([x[:, 1:] for x in rows.split(m)], 1) if m else rows[:, 1:], None, W)
        else:
            rows = _gather(adjoint, G, left, torch.cat(bars))
        info.backward = info_of(backward, left, error, status, run.num_matvecs - before)
        report(info.backward, what="backward of f(A)v", target=backward.tolerance(V.dtype), on_failure=on_failure)
        V_bar = rows[:, 0].reshape(len(parts), m, V.shape[0]).sum(0).mT
        return Cotangents([pair], [V_bar, *rest])

    return rule


def _padded(X: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(X, (0, width - X.shape[2]))


def _time_gradients(
    run: Run,
    V: Tensor,
    space: HermitianSpace,
    speeds: Sequence[ScalarFunction],
    times: Tensor,
    cotangents: Sequence[Tensor | None],
) -> Tensor:
    """t̄_p = ⟨A e^{t_p A} V, g_p⟩, by one more pass."""
    given = {i: g for i, g in enumerate(cotangents) if g is not None}
    slopes = _values(run.matmat, V, space, [space.small(speeds[i]) for i in given]) if given else []
    total = torch.zeros(len(speeds), dtype=times.dtype, device=times.device)
    for (i, g), slope in zip(given.items(), slopes, strict=True):
        dot = (slope.conj() * g).sum()
        total[i] = dot if times.is_complex() else dot.real
    return total
