"""SINGD on a multilayer perceptron by a plain loop over dense matrices, from the formulas.

Nothing of ``ritz.optim`` and ``ritz.curvature`` is used, and of a structure only which matrices belong to it: Π is the
least-squares problem that defines it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ritz.operators.structured import Dense, Structure

Batch = tuple[Tensor, Tensor]  # X (n, R, d_in) and Y (n, R, d_out): n examples of R positions


@dataclass(frozen=True)
class Setting:
    """The settings of a run, under the letters of the formulas."""

    structures: tuple[Structure, Structure] = (Dense(), Dense())
    lr: float = 0.05  # β₂
    momentum: float = 0.9  # α₂
    damping: float = 0.01  # λ
    alpha: float = 0.5  # α₁
    lr_cov: Callable[[int], float] = field(default=lambda step: 0.05)  # β₁
    normalize: bool = False
    second_order: bool = False
    adaptive: bool = True
    due: Callable[[int], bool] = field(default=lambda step: True)
    decay: float = 0.0
    decoupled: bool = False
    reduce: bool = False  # weight sharing: expand or reduce
    mean: bool = True  # the loss is a mean over its terms, or a sum
    per_position: bool = False  # the terms are positions, or examples


def loss_terms(X: Tensor, setting: Setting) -> int:
    return X.shape[0] * X.shape[1] if setting.per_position else X.shape[0]


def loss_of(f: Tensor, Y: Tensor, setting: Setting) -> Tensor:
    """Half the squared error, summed over outputs and positions; over the number of terms where it is a mean."""
    total = 0.5 * (f - Y).square().sum()
    return total / loss_terms(Y, setting) if setting.mean else total


@dataclass
class Seen:
    """What a layer meets in one pass: inputs (n, R, d_in + 1), output gradients (n, R, d_out), the gradient of W."""

    a: Tensor
    g: Tensor
    G: Tensor


def passes(weights: list[Tensor], data: Batch, setting: Setting) -> list[Seen]:
    """One forward and backward pass; every W has its bias as the last column."""
    h, inputs, outputs = data[0], [], []
    for i, W in enumerate(weights):
        a = torch.cat([h, torch.ones_like(h[..., :1])], -1)
        z = a @ W.mT if i else (a @ W.mT).requires_grad_()
        inputs.append(a)
        outputs.append(z)
        h = torch.tanh(z)
    gradients = torch.autograd.grad(loss_of(outputs[-1], data[1], setting), outputs)
    return [Seen(a.detach(), g, torch.einsum("nro,nri->oi", g, a.detach())) for a, g in zip(inputs, gradients)]


def scaled_rows(seen: Seen, setting: Setting) -> tuple[Tensor, Tensor]:
    """Row matrices a and b with A = aᵀa and B = bᵀb."""
    n, R = seen.a.shape[:2]
    s = (loss_terms(seen.a, setting) if setting.mean else 1) ** 0.5
    if setting.reduce:
        return seen.a.mean(1) / n**0.5, seen.g.sum(1) * s
    return seen.a.flatten(0, 1) / (n * R) ** 0.5, seen.g.flatten(0, 1) * s


@functools.cache
def projector(structure: Structure, d: int) -> Callable[[Tensor], Tensor]:
    """Π(M) = Σ c_i E_i with Gram c = r, Gram_ij = ½⟨E_i + E_iᵀ, E_j + E_jᵀ⟩, r_i = ⟨M, E_i + E_iᵀ⟩; least norm."""
    E = torch.stack([structure.to_dense(e, d) for e in torch.eye(structure.numel(d), dtype=torch.float64)])
    S = E + E.mT
    solve = torch.linalg.pinv(0.5 * torch.einsum("iab,jab->ij", S, S), hermitian=True, rtol=1e-10)
    return lambda M: torch.einsum("i,iab->ab", solve @ torch.einsum("iab,ab->i", S, M), E)


@dataclass
class Run:
    """Parameters after each step, and the final factors of each layer."""

    trajectory: list[list[Tensor]]
    K: list[Tensor]
    C: list[Tensor]


def singd(weights: list[Tensor], batches: list[Batch], setting: Setting) -> Run:
    """The formulas, one layer after the other."""
    W = [w.clone() for w in weights]
    K = [torch.eye(w.shape[1], dtype=w.dtype) for w in W]
    C = [torch.eye(w.shape[0], dtype=w.dtype) for w in W]
    mK, mC = [torch.zeros_like(k) for k in K], [torch.zeros_like(c) for c in C]
    buffers = [torch.zeros_like(w) for w in W]
    trajectory = []
    for step, data in enumerate(batches):
        for i, seen in enumerate(passes(W, data, setting)):
            if setting.due(step):
                a, b = scaled_rows(seen, setting)
                update(K, C, mK, mC, i, a, b, setting, setting.lr_cov(step))
            N = C[i] @ C[i].mT @ seen.G @ K[i] @ K[i].mT
            if setting.decoupled:
                W[i] = (1 - setting.lr * setting.decay) * W[i]
            else:
                N = N + setting.decay * W[i]
            buffers[i] = setting.momentum * buffers[i] + N
            W[i] = W[i] - setting.lr * buffers[i]
        trajectory.append([w.clone() for w in W])
    return Run(trajectory, K, C)


Factors = list[Tensor]


def update(
    K: Factors, C: Factors, mK: Factors, mC: Factors, i: int, a: Tensor, b: Tensor, setting: Setting, rate: float
) -> None:
    """Both factors of layer i, from the old ones."""
    dK, dC, lam = K[i].shape[0], C[i].shape[0], setting.damping
    onto_K, onto_C = projector(setting.structures[0], dK), projector(setting.structures[1], dC)
    H_K, H_C = onto_K(K[i].mT @ a.mT @ a @ K[i]), onto_C(C[i].mT @ b.mT @ b @ C[i])
    tr = lambda M: torch.trace(M) / M.shape[0]
    gram_K, gram_C = K[i].mT @ K[i], C[i].mT @ C[i]
    curvature_K, curvature_C = (tr(H_C), tr(H_K)) if setting.adaptive else (1.0, 1.0)
    damping_K, damping_C = (lam * tr(gram_C), lam * tr(gram_K)) if setting.adaptive else (lam, lam)
    D_K = curvature_K * H_K + damping_K * onto_K(gram_K) - torch.eye(dK, dtype=a.dtype)
    D_C = curvature_C * H_C + damping_C * onto_C(gram_C) - torch.eye(dC, dtype=a.dtype)
    c = (1 - setting.alpha) / 2 if setting.normalize else 0.5
    for F, m, D in ((K, mK, D_K), (C, mC, D_C)):
        m[i] = setting.alpha * m[i] + c * D
        beta = rate / max(1.0, float(m[i].abs().max())) if setting.normalize else rate
        step = beta * m[i]
        F[i] = F[i] @ (torch.eye(len(step), dtype=a.dtype) - step + (step @ step / 2 if setting.second_order else 0.0))


def matrices(model: nn.Sequential) -> list[Tensor]:
    """The weights of a perceptron, each with its bias as the last column."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    return [torch.cat([m.weight.detach(), m.bias.detach().unsqueeze(1)], 1) for m in layers]
