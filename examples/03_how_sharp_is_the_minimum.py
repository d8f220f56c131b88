"""The curvature of a network while it trains: sharpness, the subspace of the leading directions, the whole spectrum.

python examples/03_how_sharp_is_the_minimum.py [--out out]        RITZ_SMALL=1: fewer steps
"""

# %% Setting
import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import ritz
from ritz.curvature import GGN, CrossEntropy, Hessian

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
out, steps = parser.parse_args().out, 60 if os.environ.get("RITZ_SMALL") == "1" else 400
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[:500], torch.tensor(digits.target)[:500]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
rate, classes = 0.5, 10

# %% Gradient descent on all of the data; the curvature at a few of its steps
looks = [round(steps * (k / 8) ** 2) for k in range(1, 9)]
losses, sharpness, overlap, before = [], [], [], None
for step in range(1, steps + 1):
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= rate * p.grad
    losses.append(loss.item())
    if step in looks:
        G = GGN(model, CrossEntropy(), None, (x, y))
        values, vectors = ritz.eigsh(G, classes - 1, block=10, rtol=1e-3)
        sharpness.append(values[0].item())
        # Share of the leading subspace that was there at the last look: 1 where it stands still, 9/P by chance.
        overlap.append(None if before is None else ((before.mT @ vectors).square().sum() / (classes - 1)).item())
        before = vectors

# %% The whole spectrum at the end, of the Hessian, which also has negative eigenvalues
H = Hessian(model, CrossEntropy(), None, (x, y))
grid, density, error = ritz.spectral_density(H, estimator=ritz.Hutchinson(10), method=ritz.Lanczos(60))
mass = torch.trapezoid(density, grid).item()
print(f"loss {losses[-1]:.3f}, sharpness {sharpness[-1]:.2f}, negative eigenvalues about "
      f"{torch.trapezoid(density[grid < 0], grid[grid < 0]):.0f} of {H.shape[0]}")  # fmt: skip

figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
axes[0].plot(range(1, steps + 1), losses, color=ritz.plot.BLUE)
axes[0].set(title="loss", xlabel="step")
axes[1].plot(looks, sharpness, "o-", color=ritz.plot.BLUE, label="largest eigenvalue of the Gauss–Newton matrix")
axes[1].axhline(2 / rate, color=ritz.plot.GREY, linestyle="--", label="2 / learning rate")
twin = axes[1].twinx()
twin.plot(looks[1:], overlap[1:], "s:", color=ritz.plot.ORANGE)
twin.set(ylim=(0, 1.05), ylabel="overlap with the last look (dotted)")
axes[1].set(title="sharpness, and how the leading subspace turns", xlabel="step", ylim=(0, None))
axes[1].legend(frameon=False, fontsize=8)
ritz.plot.spectrum(axes[2], grid, density, error, title="spectrum of the Hessian at the end")
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "curvature.png", dpi=130)

# %% What must hold
assert losses[-1] < losses[0] and abs(mass / H.shape[0] - 1) < 0.02
assert overlap[-1] > 0.5, "the leading subspace settles"
print(f"wrote {out / 'curvature.png'}")
