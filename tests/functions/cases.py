"""Operators of every kind with their dense counterparts, and a dense differentiable f(A): the references here.

A kind is a function of (dtype, generator) that returns the tensors to differentiate in, the operator and the dense
matrix as functions of them. The dense f(A) goes through torch.linalg.eigh or eig and autograd: spectra here are simple
and well conditioned. Degenerate ones are compared with ``ritz.testing.oracles`` in test_degenerate.py.
"""

from __future__ import annotations

import torch

import ritz
from ritz import functions as F
from ritz.operators import FunctionOperator, Kronecker

N = 12
DTYPES = (torch.float64, torch.float32, torch.complex128)
TOLERANCE = {torch.float64: 2e-8, torch.complex128: 2e-8, torch.float32: 3e-4}

FUNCTIONS = {
    "exp": (F.exp, torch.exp),
    "log": (F.log, torch.log),
    "sqrt": (F.sqrt, torch.sqrt),
    "rsqrt": (F.rsqrt, lambda x: 1 / torch.sqrt(x)),
    "inverse": (F.inverse, lambda x: 1 / x),
    "power3": (F.power(3), lambda x: x * x * x),
    "power-2": (F.power(-2), lambda x: 1 / (x * x)),
    "power2.5": (F.power(2.5), lambda x: x * x * torch.sqrt(x)),
    "power-0.3": (F.power(-0.3), lambda x: torch.exp(-0.3 * torch.log(x))),
    "phi1": (F.phi(1), lambda x: (torch.exp(x) - 1) / x),
    "phi2": (F.phi(2), lambda x: (torch.exp(x) - 1 - x) / (x * x)),
    "gauss": (lambda x: torch.exp(-x * x), lambda x: torch.exp(-x * x)),
    "torch.log": (torch.log, torch.log),
    "torch.sin": (torch.sin, torch.sin),
}


def randn(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=generator)


def dense_hermitian(dtype, g):
    M = randn(g, N, N, dtype=dtype) / N**0.5
    matrix = lambda M: 3 * torch.eye(N, dtype=M.dtype) + (M + M.mH) / 2
    return [M], lambda M: ritz.aslinearoperator(matrix(M), hermitian=True), matrix


def sparse_hermitian(dtype, g):
    diagonal = 3 + torch.rand(N, generator=g, dtype=torch.float64).to(dtype)
    off = randn(g, N - 1, dtype=dtype) / 2
    i = torch.arange(N - 1)
    indices = torch.stack([torch.cat([torch.arange(N), i, i + 1]), torch.cat([torch.arange(N), i + 1, i])])

    def values(diagonal, off):
        real = diagonal.real.to(diagonal.dtype) if diagonal.is_complex() else diagonal
        return torch.cat([real, off, off.conj()])

    def operator(diagonal, off):
        return ritz.aslinearoperator(
            torch.sparse_coo_tensor(indices, values(diagonal, off), (N, N), check_invariants=True), hermitian=True
        )

    def matrix(diagonal, off):
        return torch.zeros(N, N, dtype=diagonal.dtype).index_put(tuple(indices), values(diagonal, off))

    return [diagonal, off], operator, matrix


def callable_hermitian(dtype, g):
    d = 2 + torch.rand(N, generator=g, dtype=torch.float64).to(dtype.to_real())
    B = randn(g, N, 3, dtype=dtype) / N**0.5

    def operator(d, B):  # takes vectors only: a block comes out wrong and is found out
        return ritz.aslinearoperator(lambda x: d * x + B @ (B.mH @ x), shape=N, dtype=dtype, hermitian=True)

    return [d, B], operator, lambda d, B: torch.diag(d).to(B.dtype) + B @ B.mH


def kronecker_shifted(dtype, g):
    sizes = (3, 4)
    factors = [randn(g, s, s, dtype=dtype) / s for s in sizes]
    sigma = torch.tensor(0.5, dtype=dtype.to_real())
    definite = lambda M: torch.eye(M.shape[0], dtype=M.dtype) + M @ M.mH

    def operator(M1, M2, sigma):
        parts = [ritz.aslinearoperator(definite(M), hermitian=True) for M in (M1, M2)]
        return Kronecker(*parts).shift(sigma)

    def matrix(M1, M2, sigma):
        return torch.kron(definite(M1), definite(M2)) + sigma * torch.eye(N, dtype=M1.dtype)

    return [*factors, sigma], operator, matrix


def dense_general(dtype, g):
    M = 3 * torch.eye(N, dtype=dtype) + 0.8 * randn(g, N, N, dtype=dtype) / N**0.5
    return [M], ritz.aslinearoperator, lambda M: M.clone()


def callable_general(dtype, g):
    d = 3 + torch.rand(N, generator=g, dtype=torch.float64).to(dtype)
    M = 0.6 * randn(g, N, N, dtype=dtype) / N**0.5
    operator = lambda d, M: FunctionOperator(lambda x: d * x + M @ x, (N, N), dtype, "cpu")
    return [d, M], operator, lambda d, M: torch.diag(d) + M


HERMITIAN = (dense_hermitian, sparse_hermitian, callable_hermitian, kronecker_shifted)
GENERAL = (dense_general, callable_general)
KINDS = {kind.__name__: kind for kind in HERMITIAN + GENERAL}


def is_general(kind):
    return kind in GENERAL


def method_for(kind, k=N):
    return ritz.Arnoldi(k) if is_general(kind) else ritz.Lanczos(k)


def leaves(tensors, dtype=None):
    """Fresh leaves that require grad, in double precision where asked."""
    out = []
    for t in tensors:
        t = t.detach()
        if dtype is not None:
            t = t.to(torch.complex128 if t.is_complex() else torch.float64)
        out.append(t.clone().requires_grad_())
    return out


def dense_funm(f, A, hermitian):
    """f(A), differentiable by autograd."""
    if hermitian:
        w, Q = torch.linalg.eigh((A + A.mH) / 2)
        fw = f(w)
        return (Q.to(fw.dtype) * fw) @ Q.mH.to(fw.dtype) if fw.is_complex() else (Q * fw) @ Q.mH
    w, V = torch.linalg.eig(A)
    out = V @ (f(w).unsqueeze(1) * torch.linalg.inv(V))
    return out if A.is_complex() or f(torch.ones(1, dtype=torch.float64)).is_complex() else out.real


def real_inner(G, Y):
    return (G.conj() * Y).sum().real if G.is_complex() or Y.is_complex() else (G * Y).sum()


def relative(x, y):
    """Relative error in the Frobenius norm, in double precision."""
    y = torch.as_tensor(y)
    wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
    x, y = x.detach().to(wide), y.detach().to(wide)
    scale = float(y.norm())
    return float((x - y).norm()) / (scale if scale > 0 else 1.0)


def assert_close(found, expected, tol, what=""):
    """Values and gradients one by one; NaN fails."""
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x is not None, f"{what}: gradient {i} is missing"
        error = relative(x, y)
        assert error <= tol, f"{what}: part {i} has error {error:.2e} > {tol:.0e}"
