"""Which solver: a pure function of the operator's size, flags and structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..operators import Diagonal, Identity
from .cg import CG
from .direct import Direct
from .gmres import GMRES
from .minres import MINRES

if TYPE_CHECKING:
    from ..operators import LinearOperator

# Up to here a dense factorisation is chosen whatever the conditioning. Measured on one core in float64 with a dense
# positive definite matrix of condition 40 (45 steps of CG): Direct 19, 124, 517 ms and CG 22, 140, 224 ms at n = 1000,
# 2000, 3000. Sparse and well conditioned systems would gain from CG earlier; ill conditioned ones, later.
DIRECT_UP_TO = 2000


def choose(A: LinearOperator, *, preconditioned: bool = False) -> CG | MINRES | GMRES | Direct:
    """The solver that ``Auto()`` stands for.

    1. a diagonal operator: ``Direct()`` (a division);
    2. n ≤ 2000 and no preconditioner: ``Direct()``;
    3. known to be positive semidefinite: ``CG()``;
    4. known to be Hermitian: ``MINRES()``;
    5. otherwise ``Direct()``, if there is no preconditioner and matrix and factor fit into its ``max_bytes`` (8 GiB:
       n ≤ 23 170 in float64);
    6. otherwise ``GMRES()``.

    Nothing else counts: neither values, nor free memory, nor the right-hand sides.
    """
    if isinstance(A, (Diagonal, Identity)):
        return Direct()
    if A.shape[0] <= DIRECT_UP_TO and not preconditioned:
        return Direct()
    if A.psd:
        return CG()
    if A.hermitian:
        return MINRES()
    direct = Direct()
    return direct if direct.fits(A) and not preconditioned else GMRES()
