"""A matrix that exists only as a product: its log-determinant, and the gradient with respect to everything inside.

The matrix is A = s·I + Fᵀ D F with F the differences along a chain of n points and D = diag(stiffnesses): the precision
matrix of a chain of springs. s and D are given by their logarithms. The product is a plain Python function that closes
over these parameters; nothing is declared. Everything is compared with dense linear algebra.

    python examples/00_first_steps.py [--out out]        RITZ_SMALL=1: a smaller chain
"""

# %% Setting
import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import ritz

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
out, small = parser.parse_args().out, os.environ.get("RITZ_SMALL") == "1"
n = 150 if small else 600
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(0)

log_noise = torch.zeros((), requires_grad=True)
log_stiffness = (0.5 * torch.randn(n - 1, generator=generator)).requires_grad_()


# %% A product is all there is
def product(x):
    """A x for a vector (n,) or a block (n, m)."""
    stretch = log_stiffness.exp() * (x[1:] - x[:-1]).mT
    force = torch.nn.functional.pad(stretch, (1, 0)) - torch.nn.functional.pad(stretch, (0, 1))
    return log_noise.exp() * x + force.mT


A = ritz.aslinearoperator(product, shape=n, psd=True)

# %% An exact quantity first: a quadratic form vᵀ log(A) v, which takes one Krylov run
v = torch.randn(n, generator=generator)
form, info = ritz.quadratic_form(torch.log, A, v, return_info=True)
gradient = torch.autograd.grad(form, [log_noise, log_stiffness])

dense = A.to_dense()
w, Z = torch.linalg.eigh(dense)
form_dense = v @ (Z @ (w.log() * (Z.T @ v)))
gradient_dense = torch.autograd.grad(form_dense, [log_noise, log_stiffness])
form_error = ((form - form_dense) / form_dense).abs().item()
gradient_error = max(((g - h).norm() / h.norm()).item() for g, h in zip(gradient, gradient_dense))
print(f"form: error {form_error:.1e}, {info.num_matvecs} products; gradient {gradient_error:.1e}, no further product")

# %% The log-determinant: an average over random probes, so it comes with a standard error
truth = torch.logdet(A.to_dense())
truth_gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(truth, [log_noise, log_stiffness])])
rows = []
for probes in (5, 20, 80):
    value, info = ritz.logdet(A, estimator=ritz.Hutchinson(probes), return_info=True)
    g = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, [log_noise, log_stiffness])])
    rows.append((probes, value.item(), info.standard_error.item(), g))
    error = ((g - truth_gradient).norm() / truth_gradient.norm()).item()
    print(f"logdet, {probes:2d} probes: {value.item():.2f} ± {info.standard_error:.2f}, gradient off by {error:.1%}")
print(f"logdet, dense:     {truth.item():.2f}")

# %% Figure
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
figure, (a, b) = plt.subplots(1, 2, figsize=(7.5, 3.0), constrained_layout=True)
m, values, deviations, gradients = zip(*rows)
a.errorbar(m, values, yerr=deviations, fmt="o", ms=4, capsize=3)
a.axhline(truth.item(), color="k", ls=":")
a.set(xscale="log", xlabel="probes", ylabel="log det A", title="value ± standard error", xticks=m, xticklabels=m)
a.minorticks_off()
b.plot([0, 0.8], [0, 0.8], "k:", lw=0.8)
b.scatter(truth_gradient[1:], gradients[-1][1:], s=6, alpha=0.5, lw=0)
b.set(xlabel="exact", ylabel="80 probes", title="gradient, one point per stiffness")
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "first_steps.png", dpi=200)

# %% The claim
assert form_error < 1e-10 and gradient_error < 1e-7
assert all(abs(value - truth.item()) < 4 * deviation for _, value, deviation, _ in rows)
