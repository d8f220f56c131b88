"""Exact gradients of vᵀ f(A) v, computed once per problem without ritz, torch's autograd through Lanczos, or matfree.

laplacian  analytic eigenpairs (sines), G = Σ f[λ_p, λ_q] (s_pᵀv)(s_qᵀv) s_p s_qᵀ by fast tensor-product transforms
kernel     dense eigendecomposition, the same formula
bloweybq   Krylov-Fréchet approximation at depth 200, fully reorthogonalised; its distance to depth 100 is reported
network    the same at depth 240 against 160, products recomputed with autograd for the pairing
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _common import Problem, stencil_1d
from scipy.special import exprel


def divided_log(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(log a − log b)/(a − b) without cancellation, 1/a on ties."""
    low, gap = np.minimum(a, b), np.abs(a - b)
    t = gap / low
    return np.where(t > 0, np.log1p(t) / np.where(t > 0, t, 1.0), 1.0) / low


def divided_gauss(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(e^{−a²} − e^{−b²})/(a − b) = −(a + b) e^{−b²} (e^x − 1)/x with x = b² − a² ≤ 0."""
    swap = np.abs(a) < np.abs(b)
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    return -(a + b) * np.exp(-b * b) * exprel(-(a - b) * (a + b))


FUNCTIONS = {"log": (np.log, divided_log), "gauss": (lambda x: np.exp(-x * x), divided_gauss)}


def spectral(lam: np.ndarray, weights: np.ndarray, name: str) -> tuple[float, np.ndarray]:
    """Value and the matrix M with G = S M Sᵀ."""
    f, divided = FUNCTIONS[name]
    M = divided(lam[:, None], lam[None, :])
    M *= weights[:, None]
    M *= weights[None, :]
    return float(weights**2 @ f(lam)), M


def laplacian_reference(problem: Problem) -> tuple[float, np.ndarray, str]:
    m, n = problem.settings["m"], problem.n
    j = np.arange(1, m + 1)
    S = np.sqrt(2.0 / (m + 1)) * np.sin(np.pi * np.outer(j, j) / (m + 1))  # orthogonal, symmetric
    one = 4.0 * np.sin(0.5 * np.pi * j / (m + 1)) ** 2
    assert np.allclose(S @ np.diag(one) @ S, stencil_1d(m))
    lam = (one[:, None, None] + one[None, :, None] + one[None, None, :]).ravel()

    def transform(X: np.ndarray) -> np.ndarray:  # (m³, c): S⊗S⊗S applied to the columns
        X = X.reshape(m, m, m, -1)
        for axis in range(3):
            X = np.moveaxis(np.tensordot(S, X, axes=(1, axis)), 0, axis)
        return np.ascontiguousarray(X).reshape(n, -1)

    f, divided = FUNCTIONS[problem.function]
    weights = transform(problem.v[:, None])[:, 0]
    half = np.empty((n, n))  # rows p: the transform of row p of M
    chunk = 512
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        block = divided(lam[part, None], lam[None, :]) * weights[part, None] * weights[None, :]
        half[part] = transform(block.T).T
    grad = np.empty(len(problem.values))
    by_column = np.argsort(problem.cols, kind="stable")
    starts = np.searchsorted(problem.cols[by_column], np.arange(0, n + chunk, chunk))
    for index, start in enumerate(range(0, n, chunk)):
        block = transform(half[:, start : start + chunk])
        entries = by_column[starts[index] : starts[index + 1]]
        grad[entries] = block[problem.rows[entries], problem.cols[entries] - start]
    return float(weights**2 @ f(lam)), grad, "analytic eigenpairs (sine transforms)"


def dense_reference(problem: Problem) -> tuple[float, np.ndarray, str]:
    lam, U = np.linalg.eigh(problem.dense)
    value, M = spectral(lam, U.T @ problem.v, problem.function)
    return value, (U @ M @ U.T).ravel(), "dense eigendecomposition"


def krylov_pair(matvec: Callable, v: np.ndarray, k: int, name: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Value, basis Q (k, n) and Λ (k, n) with gradient ⟨dA, Σ_j λ_j q_jᵀ⟩: the derivative of the Krylov limit."""
    n = len(v)
    Q, alpha, beta = np.zeros((k, n)), np.zeros(k), np.zeros(k)
    norm = np.linalg.norm(v)
    q = v / norm
    for j in range(k):
        Q[j] = q
        w = matvec(q)
        alpha[j] = q @ w
        for _ in range(3):
            w = w - Q[: j + 1].T @ (Q[: j + 1] @ w)
        beta[j] = np.linalg.norm(w)
        q = w / beta[j]
    T = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
    lam, U = np.linalg.eigh(T)
    value, M = spectral(lam, norm * U[0], name)
    return value, Q, (U @ M @ U.T) @ Q


def deep_reference(
    problem: Problem, contract: Callable, matvec: Callable, deep: int, less: int
) -> tuple[float, np.ndarray, str]:
    value, Q, L = krylov_pair(matvec, problem.v, deep, problem.function)
    grad = contract(L, Q)
    _, Q, L = krylov_pair(matvec, problem.v, less, problem.function)
    distance = np.linalg.norm(contract(L, Q) - grad) / np.linalg.norm(grad)
    how = f"Krylov-Fréchet at depth {deep}, reorthogonalised three times; distance to depth {less}: {distance:.1e}"
    return value, grad, how


def sparse_reference(problem: Problem) -> tuple[float, np.ndarray, str]:
    import scipy.sparse as sp

    A = sp.csr_array((problem.values, problem.cols, problem.indptr), shape=(problem.n, problem.n))

    def contract(L: np.ndarray, Q: np.ndarray) -> np.ndarray:
        L, Q = np.ascontiguousarray(L.T), np.ascontiguousarray(Q.T)
        return np.einsum("ek,ek->e", L[problem.rows], Q[problem.cols])

    return deep_reference(problem, contract, lambda x: A @ x, 200, 100)


def network_reference(problem: Problem) -> tuple[float, np.ndarray, str]:
    import torch
    from _network import build_network

    params, product, _ = build_network(problem.settings)

    def matvec(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return product(torch.from_numpy(x)).numpy()

    def contract(L: np.ndarray, Q: np.ndarray) -> np.ndarray:
        total = np.zeros(sum(p.numel() for p in params))
        for start in range(0, len(Q), 8):
            part = slice(start, start + 8)
            H = product(torch.from_numpy(Q[part].T.copy()))
            grads = torch.autograd.grad(H, params, torch.from_numpy(L[part].T.copy()))
            total += torch.cat([g.reshape(-1) for g in grads]).numpy()
        return total

    deep = min(240, problem.n - 10)
    return deep_reference(problem, contract, matvec, deep, 2 * deep // 3)


def reference(problem: Problem, cache: Path) -> tuple[Path, str]:
    """The file with `value` and flat `grad`, and how they were found; computed on the first call for these settings."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(problem.settings).encode())
    for array in (problem.v, problem.rows, problem.cols, problem.values, problem.dense):
        digest.update(b"" if array is None else array.tobytes())
    if problem.name == "network":
        digest.update(Path(__file__).with_name("_network.py").read_bytes())
    path = cache / f"reference-{problem.name}-{digest.hexdigest()[:16]}.npz"
    if not path.is_file():
        solve = {
            "laplacian": laplacian_reference,
            "kernel": dense_reference,
            "bloweybq": sparse_reference,
            "network": network_reference,
        }[problem.name]
        value, grad, how = solve(problem)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, value=value, grad=grad, how=how)
    with np.load(path) as content:
        return path, str(content["how"])
