"""The spectrum of a small transformer: its 10 402 directions of curvature, before and after training.

python examples/05_spectrum_of_a_transformer.py [--out out]        RITZ_SMALL=1: fewer steps and products
"""

# %% Setting: a digit is a sequence of eight rows
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
out, small = parser.parse_args().out, os.environ.get("RITZ_SMALL") == "1"
digits = load_digits()
x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:300], torch.tensor(digits.target)[:300]


class Transformer(nn.Module):
    """Two blocks of width 24; the mean over rows is classified."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(8, 24), nn.Parameter(0.1 * torch.randn(8, 24))
        block = nn.TransformerEncoderLayer(24, 4, dim_feedforward=48, dropout=0.0, batch_first=True)
        self.blocks, self.head = nn.TransformerEncoder(block, 2), nn.Linear(24, 10)

    def forward(self, rows):
        return self.head(self.blocks(self.embed(rows) + self.position).mean(1))


torch.manual_seed(0)
model = Transformer()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
estimator, method = ritz.Hutchinson(3 if small else 5), ritz.Lanczos(30 if small else 50)


# %% The density of the Hessian's eigenvalues, and the largest ones of the Gauss-Newton matrix
def look():
    H = Hessian(model, CrossEntropy(), None, (x, y))
    density = ritz.spectral_density(H, estimator=estimator, method=method)
    G = GGN(model, CrossEntropy(), None, (x, y))
    return H.shape[0], density, ritz.eigsh(G, 12, block=12, rtol=1e-2).values


size, before, _ = look()
for _ in range(40 if small else 200):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
_, after, leading = look()
print(f"{size} parameters, loss {loss.item():.3f}; leading eigenvalues of the Gauss–Newton matrix: "
      + ", ".join(f"{v:.2f}" for v in leading.tolist()))  # fmt: skip

# %% Figure
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
ritz.plot.spectrum(axes[0], *before, title="Hessian before training")
ritz.plot.spectrum(axes[1], *after, title="Hessian after training")
axes[2].semilogy(range(1, 13), leading, "o", color=ritz.plot.BLUE)
axes[2].axvline(9.5, color=ritz.plot.GREY, linestyle="--", label="classes − 1")
axes[2].set(title="Gauss–Newton matrix after training", xlabel="number", ylabel="eigenvalue")
axes[2].legend(frameon=False, fontsize=8)
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "transformer_spectrum.png", dpi=130)

# %% What must hold
for grid, density, _ in (before, after):
    assert abs(torch.trapezoid(density, grid).item() / size - 1) < 0.02, "it integrates to the number of parameters"
assert bool((leading[:-1] >= leading[1:]).all()) and float(leading[-1]) > 0
print(f"wrote {out / 'transformer_spectrum.png'}")
