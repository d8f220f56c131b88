"""Textbook loops, one vector at a time and differentiable by autograd: the references of this folder.

Written from the textbooks and independently of ritz: lists of vectors, modified Gram–Schmidt where ritz uses block
classical Gram–Schmidt, no masks, no breakdown.
"""

from __future__ import annotations

import torch


def inner(x, y):
    return (x.conj() * y).sum()


def length(x):
    return inner(x, x).real.sqrt()


def lanczos(A, v, k, reorthogonalize):
    """Q (k, n), alpha (k,), beta (k-1,), residual (n,), norm ()."""
    norm = length(v)
    Q, alpha, beta = [v / norm], [], []
    for j in range(k):
        w = A @ Q[j]
        if reorthogonalize:
            a = inner(Q[j], w).real
            for _ in range(2):
                for q in Q:
                    w = w - inner(q, w) * q
        else:
            if j > 0:
                w = w - beta[-1] * Q[j - 1]
            a = inner(Q[j], w).real
            w = w - a * Q[j]
        alpha.append(a)
        if j + 1 < k:
            beta.append(length(w))
            Q.append(w / beta[-1])
    off = torch.stack(beta) if beta else norm.new_zeros(0)
    return torch.stack(Q), torch.stack(alpha), off, w, norm


def arnoldi(A, v, k, reorthogonalize):
    """Q (k, n), H (k, k), residual (n,), norm (). One pass means classical Gram–Schmidt, as in ritz."""
    norm = length(v)
    Q, columns = [v / norm], []
    for j in range(k):
        Aq = w = A @ Q[j]
        h = [inner(q, Aq) for q in Q]
        if reorthogonalize:
            for _ in range(2):
                for q in Q:
                    w = w - inner(q, w) * q
        else:
            for c, q in zip(h, Q, strict=True):
                w = w - c * q
        if j + 1 < k:
            b = length(w)
            Q.append(w / b)
            h.append(b.to(w.dtype))
        columns.append(torch.cat([torch.stack(h), w.new_zeros(k - len(h))]))
    return torch.stack(Q), torch.stack(columns, 1), w, norm


def golub_kahan(A, v, k):
    """U (k, rows), V (k, columns), alpha (k,), beta (k-1,), residual (columns,), norm ()."""
    norm = length(v)
    U, V, alpha, beta = [], [v / norm], [], []
    for j in range(k):
        w = A @ V[j]
        for _ in range(2):
            for u in U:
                w = w - inner(u, w) * u
        alpha.append(length(w))
        U.append(w / alpha[-1])
        r = A.mH @ U[j]
        for _ in range(2):
            for q in V:
                r = r - inner(q, r) * q
        if j + 1 < k:
            beta.append(length(r))
            V.append(r / beta[-1])
    off = torch.stack(beta) if beta else norm.new_zeros(0)
    return torch.stack(U), torch.stack(V), torch.stack(alpha), off, r, norm


def cotangents(outputs, generator):
    """Random numbers of the shapes and dtypes of the outputs."""
    return [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in outputs]


def gradients(loop, A, V, bars):
    """Gradients (A_bar, V_bar) of Σ_runs ⟨bars, loop(A, v)⟩; bars: one list of cotangents a column of V."""
    A = A.detach().clone().requires_grad_()
    V = V.detach().clone().requires_grad_()
    outputs = [x for i in range(V.shape[1]) for x in loop(A, V[:, i])]
    flat = [b for column in bars for b in column]
    used = [(x, b) for x, b in zip(outputs, flat, strict=True) if b is not None and x.requires_grad]
    loss = sum((b.conj() * x).real.sum() for x, b in used)
    return torch.autograd.grad(loss, (A, V), allow_unused=True, materialize_grads=True)


def stack(bars, index):
    """The cotangent of output ``index`` for all runs, or None."""
    column = [b[index] for b in bars]
    return None if column[0] is None else torch.stack(column)


def error(x, y):
    """Relative error in the Frobenius norm."""
    return float((x - y).norm() / y.norm())
