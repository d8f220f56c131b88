"""Two substances spread and react; at what rates?  Learn diffusion and reaction from snapshots of a pattern.

The Allen–Cahn equation u_t = D Δu + r (u − u³) turns noise into domains of u ≈ ±1 with walls of width √(D/r) between
them. Snapshots of one run from a known start are observed with noise; D and r are unknown. ``ritz.expint.odeint`` takes
steps that the stiff Δ does not limit: the linear part goes in as an operator, the reaction as a function with its
diagonal derivative, and gradients reach D and r through all of it.

    python examples/07_learn_a_reaction.py [--out out]        RITZ_SMALL=1: 16 × 16 points, seconds
"""

# %% Setting
import argparse
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ritz.expint import EXPRB43, Grid, Laplacian, odeint
from ritz.operators import Diagonal

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
out, small = parser.parse_args().out, os.environ.get("RITZ_SMALL") == "1"
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
N, evaluations = (16, 12) if small else (32, 20)
grid = Grid((N, N), border="periodic")
laplacian = Laplacian(grid)
times, noise = torch.linspace(0, 0.3, 4), 0.05
truth = {"D": 2e-3, "r": 8.0}
x, y = grid.coordinates().T
start = (
    0.5 * torch.cos(2 * torch.pi * (x + 2 * y)) + 0.4 * torch.sin(2 * torch.pi * (2 * x - y)) + 0.1 * torch.randn(N * N)
)


def snapshots(D, r, **options):
    """u at every time, (times, n)."""
    return odeint(
        lambda t, u: r * (u - u**3),
        start,
        times,
        linear=D * laplacian,
        jacobian=lambda t, u: Diagonal(r * (1 - 3 * u**2)),
        method=EXPRB43(),
        rtol=1e-3,  # far below the noise
        atol=1e-3,
        checkpoints=2,  # keep two states and repeat the steps between them in backward
        **options,
    )


# %% What was seen
with torch.no_grad():
    clean, info = snapshots(truth["D"], truth["r"], return_info=True)
observed = clean + noise * torch.randn_like(clean)
print(f"{info.accepted} steps to t = {times[-1]:.1f}, {info.num_matvecs} products; noise {noise}")

# %% What is sought: the logarithms of two rates
log_D = torch.tensor(2e-2).log().requires_grad_()
log_r = torch.tensor(2.0).log().requires_grad_()
optimizer = torch.optim.LBFGS([log_D, log_r], max_iter=evaluations, max_eval=evaluations, line_search_fn="strong_wolfe")
began, course = time.perf_counter(), []


def misfit():
    """Mean square of what is not explained, in units of the noise; its gradient goes to the two rates."""
    optimizer.zero_grad()
    value = (snapshots(log_D.exp(), log_r.exp())[1:] - observed[1:]).square().mean() / noise**2
    value.backward()
    course.append((log_D.exp().item(), log_r.exp().item(), value.item()))
    print("D = {:.5f}, r = {:.3f}: misfit {:.2f} of the noise".format(*course[-1]), flush=True)
    return value


optimizer.step(misfit)
found = snapshots(log_D.exp(), log_r.exp()).detach()
D, r = log_D.exp().item(), log_r.exp().item()
print(f"{len(course)} evaluations in {time.perf_counter() - began:.0f} s: D = {D:.5f}, r = {r:.3f}; true {truth}")

# %% Figure
out.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(1, 5, figsize=(17, 3.4), layout="constrained")
panels = (
    ("start", clean[0]),
    (f"t = {times[-1]:.1f}", clean[-1]),
    ("as observed", observed[-1]),
    ("fitted", found[-1]),
)
for axis, (title, field) in zip(axes, panels):
    image = axis.imshow(field.reshape(N, N), vmin=-1.1, vmax=1.1, cmap="RdBu")
    axis.set(title=title, xticks=[], yticks=[])
figure.colorbar(image, ax=axes[:4], label="u")
for i, name in enumerate(truth):
    axes[4].semilogy([c[i] / truth[name] for c in course], label=f"{name} / true {name}")
axes[4].axhline(1, color="black", linewidth=0.6)
axes[4].set(xlabel="evaluation", title="rates")
axes[4].legend()
figure.savefig(out / "reaction.png", dpi=130)
print(f"figure: {out / 'reaction.png'}")

assert abs(r / truth["r"] - 1) < 0.1, "the reaction rate should be found within a tenth"
assert abs(D / truth["D"] - 1) < 0.3, "and the diffusion within a third"
