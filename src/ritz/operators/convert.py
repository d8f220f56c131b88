"""``aslinearoperator``: whatever a user has, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AdjointUnavailableError, OperandError
from ..numerics import check_finite
from .base import LinearOperator
from .basic import Dense
from .function import FunctionOperator
from .sparse import Sparse


def aslinearoperator(
    x: Any,
    *,
    shape: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    hermitian: bool | None = None,
    psd: bool | None = None,
    adjoint: Callable[[Tensor], Tensor] | None = None,
    block: bool | None = None,
) -> LinearOperator:
    """View a tensor, a sparse matrix, a callable or a SciPy operator as a linear operator.

    Args:
        x: dense tensor (n, m); sparse COO or CSR tensor (a trainable one is given by its values, as in
            ``torch.sparse_coo_tensor(indices, values, size)``: gradients stay on the stored pattern); callable taking
            a vector (m,) or a block (m, k); SciPy sparse matrix; SciPy LinearOperator (products only); operator.
        shape: of a callable's matrix, (n, m) or n for a square one. Required there, refused elsewhere.
        dtype, device: of a callable's vectors; default ``torch.get_default_dtype()`` on the CPU.
        hermitian, psd: what is known of the matrix. Dense and sparse matrices are compared with their adjoint (exact
            equality) when ``hermitian`` is None; nothing is checked about a callable.
        adjoint: adjoint product of a callable; autograd's where not given.
        block: whether a callable takes blocks; None probes it once.

    Returns:
        A :class:`LinearOperator`. Gradients flow to the tensor, to the stored values, or to every tensor that the
        callable closes over.

    Raises:
        OperandError: for anything else, or a callable without a shape.
        NonFiniteError: for a dense or sparse matrix with NaN or Inf.
    """
    if not callable(x) or isinstance(x, LinearOperator) or hasattr(x, "matvec"):
        _refuse_options(x, shape=shape, adjoint=adjoint, block=block, dtype=dtype)
    if isinstance(x, LinearOperator):
        return x if hermitian is None and psd is None else x.declare(hermitian=hermitian, psd=psd)
    if isinstance(x, Tensor):
        if not (x.is_floating_point() or x.is_complex()):
            raise OperandError(f"the matrix is {x.dtype}; expected a floating-point or complex dtype: use x.double()")
        if x.layout == torch.strided:
            check_finite(x.detach(), "the matrix")
            return Dense(x, hermitian=hermitian, psd=psd)
        operator = Sparse.from_tensor(x, hermitian=hermitian, psd=psd)
        check_finite(operator.values.detach(), "the sparse matrix")
        return operator
    if isinstance(x, np.ndarray):
        return aslinearoperator(torch.from_numpy(x), hermitian=hermitian, psd=psd)
    if hasattr(x, "tocsr"):
        return _from_scipy_sparse(x, device, hermitian, psd)
    if hasattr(x, "matvec") and hasattr(x, "shape") and hasattr(x, "dtype"):
        return _from_scipy_operator(x, hermitian, psd)
    if callable(x):
        if shape is None:
            raise OperandError("a callable came without a shape; pass shape=(n, m), or shape=n for a square matrix")
        size = (shape, shape) if isinstance(shape, int) else tuple(shape)
        return FunctionOperator(
            x,
            size,
            dtype or torch.get_default_dtype(),
            device or "cpu",
            hermitian=hermitian,
            psd=psd,
            adjoint=adjoint,
            block=block,
        )
    raise OperandError(
        f"cannot view a {type(x).__name__} as an operator; give a tensor, a sparse tensor, a SciPy sparse matrix or "
        "LinearOperator, or a callable with shape="
    )


def _refuse_options(x: Any, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            advice = "convert it with .to(...)" if name == "dtype" else "leave it out"
            raise OperandError(f"{name}= is for callables; a {type(x).__name__} brings its own: {advice}")


def _from_scipy_sparse(x: Any, device: Any, hermitian: bool | None, psd: bool | None) -> LinearOperator:
    csr = x.tocsr()
    csr.sum_duplicates()
    csr.sort_indices()
    if not np.issubdtype(csr.dtype, np.inexact):
        csr = csr.astype(np.float64)
    crow, col, values = (
        torch.as_tensor(a, device=device) for a in (csr.indptr.astype(np.int64), csr.indices.astype(np.int64), csr.data)
    )
    check_finite(values, "the sparse matrix")
    return Sparse(crow, col, values, csr.shape, hermitian=hermitian, psd=psd)


def _from_scipy_operator(x: Any, hermitian: bool | None, psd: bool | None) -> LinearOperator:
    """A SciPy LinearOperator: products only (its parameters are invisible to autograd)."""
    dtype = torch.from_numpy(np.zeros(0, dtype=x.dtype)).dtype

    def product(X: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(x.matmat(X.detach().numpy())))

    def adjoint(X: Tensor) -> Tensor:
        try:
            return torch.from_numpy(np.asarray(x.rmatmat(X.detach().numpy())))
        except (TypeError, NotImplementedError, AttributeError) as error:
            raise AdjointUnavailableError(
                f"the SciPy operator has no adjoint product ({error}); give it rmatvec=, or declare hermitian=True"
            ) from error

    return FunctionOperator(product, x.shape, dtype, "cpu", hermitian=hermitian, psd=psd, adjoint=adjoint, block=True)
