"""Influence functions: what a test loss does when the weight of a training example changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite
from ..operators import aslinearoperator
from ..solve import solve
from .eigenblocks import EigenBlocks


def influence(
    test_gradients: Tensor, train_gradients: Tensor, A: Any, *, damping: float = 0.0, method: Any = None
) -> Tensor:
    """−g_testᵀ (A + damping · I)⁻¹ g_train for every pair, (m, n).

    Entry (i, j) is the derivative of test loss i in the weight of training example j in the training objective, at its
    minimum: negative where the example helps.

    Args:
        test_gradients: of the test losses in the parameters, (m, P), or (P,) for one.
        train_gradients: of the single training losses, (n, P), or (P,).
        A: the curvature of the training objective (P, P): ``Hessian``, ``GGN``, or an approximation by blocks, scaled
            as the objective is (with a mean over N examples, so is the derivative).
        damping: added to A; a Gauss–Newton matrix is singular without it, or without weight decay.
        method: of :func:`ritz.solve`; None: CG where A is positive semidefinite, else MINRES. Approximations by blocks
            are inverted by their eigenvalues.

    Cost: min(m, n) solves as one block. Gradient: in A's tensors and both operands (by ``ritz.solve``).

    Raises:
        OperandError, NonFiniteError: gradients that do not fit A; NaN or Inf in them.

    Reference: Koh, Liang, "Understanding black-box predictions via influence functions" (2017).
    """
    test, train = (torch.atleast_2d(g) for g in (test_gradients, train_gradients))
    A = A if isinstance(A, EigenBlocks) else aslinearoperator(A)
    for name, g in (("test_gradients", test), ("train_gradients", train)):
        if g.ndim != 2 or g.shape[1] != A.shape[0]:
            raise OperandError(f"{name} has shape {tuple(g.shape)}; expected (number, P) with P = {A.shape[0]}")
        check_finite(g, name)
    if isinstance(A, EigenBlocks):
        values = A.eigenvalues + damping
        if not bool((values > 0).all()):
            raise OperandError(
                f"the damped curvature has eigenvalue {float(values.min()):.3g}; raise damping={damping:g}"
            )
        found = -(A.to_basis(test) / values) @ A.to_basis(train).mT
    else:
        damped = A.shift(damping) if damping else A
        options = {} if method is None else {"method": method}
        if test.shape[0] <= train.shape[0]:
            found = -solve(damped, test.mT.contiguous(), **options).mT @ train.mT
        else:
            found = -test @ solve(damped, train.mT.contiguous(), **options)
    shape = test_gradients.shape[:-1] + train_gradients.shape[:-1]
    return found.reshape(shape)
