"""How fast does heat flow along every edge of a graph?  Learn 5 069 conductances from noisy snapshots of heat.

Heat u spreads over the citation graph Cora by du/dt = A(w) u, where A(w) = W − D is the graph Laplacian (negative
semidefinite) with one positive weight per edge. Some experiments are watched: a few papers are heated, and all
temperatures are read off at three times, with noise. The unknown weights are fitted through u(t) = e^{tA(w)} u(0):
``ritz.expm_multiply`` gives all times from one Krylov run, and its gradient stays on the stored entries of A.

    python examples/01_fit_a_graph_diffusion.py [--out out]        RITZ_SMALL=1: a subgraph, seconds
"""

# %% Setting
import argparse
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import ritz
from ritz.testing import cora_graph

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
out, small = parser.parse_args().out, os.environ.get("RITZ_SMALL") == "1"
nodes, experiments, rounds = (400, 12, 6) if small else (3000, 16, 10)
torch.set_default_dtype(torch.float64)
noise, times = 0.005, torch.tensor([0.5, 1.0, 2.0])
method = ritz.Lanczos(rtol=1e-6)  # far below the noise
generator = torch.Generator().manual_seed(0)


# %% The graph: a ball around its best-connected paper (all of the largest component, if the ball is large enough)
def distances(edges, start, n):
    """Number of edges on the shortest path from ``start`` to every node; n where there is none."""
    d = torch.full((n,), n).index_fill(0, start, 0)
    while not torch.equal(d, new := d.scatter_reduce(0, edges.flip(1).flatten(), d[edges].flatten() + 1, "amin")):
        d = new
    return d


def ball(edges, size, n):
    """The ``size`` nodes nearest to the best-connected one, and the edges among them in new numbers."""
    d = distances(edges, torch.bincount(edges.flatten(), minlength=n).argmax(), n)
    near = d.argsort(stable=True)[: min(size, int((d < n).sum()))]
    edges = torch.full((n,), -1).index_copy(0, near, torch.arange(len(near)))[edges]
    return near, edges[(edges >= 0).all(1)]


graph = cora_graph()
near, edges = ball(graph.edges, nodes, len(graph.labels))
n, m = len(near), len(edges)


# %% The operator: the pattern is sorted once, a step only computes the stored values from the weights
def laplacian_of(edges, n):
    """The map from edge weights (m,) to the operator W − D; its values are differentiable in the weights."""
    (i, j), diagonal = edges.T, torch.arange(n)
    row, col = torch.cat([diagonal, i, j]), torch.cat([diagonal, j, i])
    order = torch.argsort(row * n + col)
    crow, col = torch.searchsorted(row[order].contiguous(), torch.arange(n + 1)), col[order]

    def build(w):
        values = torch.cat([w.new_zeros(n).index_add(0, i, -w).index_add(0, j, -w), w, w])[order]
        return ritz.operators.Sparse(crow, col, values, (n, n), hermitian=True)  # declared: not checked every step

    return build


laplacian = laplacian_of(edges, n)

# %% The hidden truth: papers with similar words exchange heat quickly; and what is observed of it
words = torch.nn.functional.normalize(graph.features.to_dense()[near].double())
similarity = (words[edges[:, 0]] * words[edges[:, 1]]).sum(1)
w_true = (0.1 + 1.2 * torch.sigmoid(15 * (similarity - 0.15))) * torch.exp(0.2 * torch.randn(m, generator=generator))
start = (torch.rand(n, experiments, generator=generator) < 0.05).double()  # each experiment heats 5 % of the papers
heat = ritz.expm_multiply(laplacian(w_true), start, times, method=method)  # (times, n, experiments)
observed = heat + noise * torch.randn(heat.shape, generator=generator)

# %% Does e^{tA}v and its gradient hold?  Against a dense matrix exponential, on a small subgraph
_, few = ball(edges, 60, n)
w = (0.5 + torch.rand(len(few), generator=generator)).requires_grad_()
u, v = torch.rand(2, 60, generator=generator)
fast = ritz.expm_multiply(laplacian_of(few, 60)(w), v, 2.0)
dense = torch.linalg.matrix_exp(2.0 * laplacian_of(few, 60)(w).to_dense()) @ v
(g_fast,), (g_dense,) = torch.autograd.grad(u @ fast, w), torch.autograd.grad(u @ dense, w)
errors = [((x - y).norm() / y.norm()).item() for x, y in ((fast, dense), (g_fast, g_dense))]
print(f"dense check on 60 nodes: relative error {errors[0]:.1e} of the value, {errors[1]:.1e} of the gradient")


# %% The fit: least squares in units of the noise, so that about 1 is what the truth itself would reach
def misfit(w):
    return (ritz.expm_multiply(laplacian(w), start, times, method=method) - observed).square().mean() / noise**2


def fit(theta, to_weights, rounds):
    """L-BFGS on the weights to_weights(θ), five iterations a round; the weights, and the misfit at every evaluation."""
    optimizer, history = torch.optim.LBFGS([theta], max_iter=5, history_size=20, line_search_fn="strong_wolfe"), []

    def closure():
        optimizer.zero_grad()
        (loss := misfit(to_weights(theta))).backward()
        history.append(loss.item())
        return loss

    for _ in range(rounds):
        optimizer.step(closure)
    return to_weights(theta).detach(), history


clock = time.perf_counter()
softplus = torch.nn.functional.softplus  # keeps the weights positive
w_same, _ = fit(torch.zeros(1, requires_grad=True), lambda x: softplus(x).expand(m), 1)  # one weight for all edges
w_fit, history = fit(torch.zeros(m, requires_grad=True), softplus, rounds)
seconds, best = time.perf_counter() - clock, misfit(w_true).item()

# %% What was learned: the weights, and the heat from single sources, which no experiment has shown
across = (heat[:, edges[:, 0]] - heat[:, edges[:, 1]]).square().sum((0, 2)).sqrt() / noise
carries = across > 10  # the temperature difference over the edge stands out of the noise; the others cannot be known
correlation = torch.corrcoef(torch.stack([w_fit[carries], w_true[carries]]))[0, 1].item()
sources = torch.randperm(n, generator=generator)[:20]
late, learned, same = (ritz.expm_multiply(laplacian(w), torch.eye(n)[:, sources], 2.0) for w in (w_true, w_fit, w_same))
error_fit, error_same = (((x - late).norm() / late.norm()).item() for x in (learned, same))
print(f"{m} weights, {observed.numel()} observations, {len(history)} evaluations in {seconds:.0f} s")
print(f"misfit {history[0]:.1f} -> {history[-1]:.3f}   (one weight for all {misfit(w_same):.2f}, truth {best:.3f})")
print(f"correlation with the truth on the {int(carries.sum())} edges that carry heat: {correlation:.3f}")
print(f"heat at t = 2 from 20 unseen sources: error {error_fit:.1%}   (one weight for all: {error_same:.1%})")

# %% Figure
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
figure, (a, b, c) = plt.subplots(1, 3, figsize=(10.5, 3.2), constrained_layout=True)
a.semilogy(history, lw=1.8)
a.axhline(best, color="k", ls=":", label="the truth's own misfit")
a.set(xlabel="evaluation of loss and gradient", ylabel="misfit / noise variance", title="fit")
b.plot([0, w_true.max()], [0, w_true.max()], color="k", lw=0.8, ls=":")
b.scatter(w_true[carries], w_fit[carries], s=3, alpha=0.35, lw=0, rasterized=True)
b.set(xlim=0, ylim=0, xlabel="true weight", ylabel="learned weight", title=f"edges: correlation {correlation:.2f}")
steps = torch.stack([distances(edges, s, n) for s in sources], dim=1)
shells = range(min(9, int(steps.max()) + 1))
lines = (late, "ko", "heat"), (same - late, "C1--", "error, one weight"), (learned - late, "C0-", "error, learned")
for x, style, label in lines:
    c.semilogy(shells, [x[steps == d].square().mean().sqrt() for d in shells], style, ms=4, lw=1.6, label=label)
c.set(xlabel="distance from the source (edges)", ylabel="root mean square at t = 2", title="20 unseen sources")
_ = a.legend(frameon=False), c.legend(frameon=False)
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "graph_diffusion.png", dpi=200)

# %% The claim
assert max(errors) < 1e-8, "e^{tA}v or its gradient is off"
assert history[-1] < 1.1 * best and correlation > (0.85 if small else 0.95), "the weights were not recovered"
