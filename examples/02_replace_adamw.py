"""A deep autoencoder on handwritten digits, by AdamW and by SINGD: one line of the training loop changes.

python examples/02_replace_adamw.py [--out out]        RITZ_SMALL=1: fewer steps
"""

# %% Setting
import argparse
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from ritz.optim import SINGD, EarlyDense, KLClip

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
out, steps = parser.parse_args().out, 150 if os.environ.get("RITZ_SMALL") == "1" else 600
torch.set_num_threads(1)  # layers this small are slower on several
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
held_out, images = images[:300], images[300:]
optimizers = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0),
    "SINGD": lambda model: SINGD(model, lr=0.1, lr_cov=0.05, update_interval=EarlyDense(10), clip=KLClip(3e-3)),
}


# %% Training: the loop is the same for both
def train(name):
    torch.manual_seed(0)
    widths = [64, 128, 64, 32, 8, 32, 64, 128, 64]
    layers = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers[:-1])
    optimizer = optimizers[name](model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, 2 - 2 * t / steps))
    curve, began = [], time.perf_counter()
    for _ in range(steps):
        batch = images[torch.randint(len(images), (128,))]
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch), batch, reduction="none").sum(1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append((time.perf_counter() - began, loss.item()))
    with torch.no_grad():
        error = nn.functional.mse_loss(torch.sigmoid(model(held_out)), held_out).sqrt()
    return torch.tensor(curve), error.item()


# %% Compare
found = {name: train(name) for name in optimizers}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for name, (curve, error) in found.items():
    smooth = curve[:, 1].unfold(0, 20, 1).mean(1)
    axes[0].plot(torch.arange(len(smooth)) + 20, smooth, label=f"{name}, held-out error {error:.3f}")
    axes[1].plot(curve[19:, 0], smooth)
    print(f"{name}: loss {smooth[-1]:.2f} nats an image, held-out error {error:.4f}, {curve[-1, 0]:.1f} s")
axes[0].set(xlabel="steps", ylabel="cross-entropy, nats an image")
axes[1].set(xlabel="seconds")
axes[0].legend()
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "replace_adamw.png", dpi=150)

# %% The headline: a lower loss after as many steps
assert found["SINGD"][0][-20:, 1].mean() < found["AdamW"][0][-20:, 1].mean()
