"""What a network does not know: error bars that grow away from the data, and intervals that hold what they promise.

python examples/04_error_bars_of_a_network.py [--out out]        RITZ_SMALL=1: fewer epochs
"""

# %% Setting
import argparse
import functools
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.distributions import Normal

import ritz
from ritz.laplace import marglik_training

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
out, small = parser.parse_args().out, os.environ.get("RITZ_SMALL") == "1"
adam = functools.partial(torch.optim.Adam, lr=1e-2)

# %% Regression with a gap in the data; network, noise and one prior precision a layer are trained together
torch.manual_seed(0)
x = torch.cat([torch.rand(40, 1) * 2 - 4, torch.rand(40, 1) * 2 + 1])
y = torch.sin(2 * x) + 0.15 * torch.randn_like(x)
model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
epochs = 400 if small else 2000
training = marglik_training(model, [(x, y)], "regression", structure="full", optimizer=adam, n_epochs=epochs,
                            n_epochs_burnin=epochs // 10, marglik_frequency=epochs // 40)  # fmt: skip
la = training.laplace
line = torch.linspace(-6, 5, 300).unsqueeze(1)
mean, variance = (t.reshape(-1) for t in la.predict(line))
spread = variance.sqrt()
print(f"noise {la.sigma_noise:.3f} (0.15 made the data); standard deviation of the function "
      f"{spread[(line[:, 0] + 3).abs().argmin()]:.3f} among the data, {spread[(line[:, 0]).abs().argmin()]:.3f} in the "
      f"gap, {spread[0]:.3f} two units outside")  # fmt: skip

# %% Real data with much noise (442 patients): a network trained without a prior, and one trained with its evidence
patients = load_diabetes()
X, t = (torch.tensor(v, dtype=torch.float32) for v in (patients.data, patients.target[:, None]))
X, t = X / X.std(0), (t - t.mean()) / t.std()
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
train, test = order[:300], order[300:]


def network():
    return nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1))


plain = network()
optimizer = adam(plain.parameters())
for _ in range(300):
    optimizer.zero_grad()
    nn.functional.mse_loss(plain(X[train]), t[train]).backward()
    optimizer.step()
bayes = marglik_training(network(), [(X[train], t[train])], "regression", structure="full", optimizer=adam,
                         n_epochs=300, n_epochs_burnin=30, marglik_frequency=10)  # fmt: skip
with torch.no_grad():
    f, noise = plain(X[test]), (plain(X[train]) - t[train]).std()
g, own = bayes.laplace.predict(X[test])
found = {
    "trained, noise from its residuals": Normal(f[:, 0], noise),
    "trained with the evidence": Normal(g[:, 0], (own[:, 0, 0] + bayes.laplace.sigma_noise**2).sqrt()),
}
deltas = torch.logspace(-1, 2.5, 60, dtype=torch.float64)
evidence = bayes.laplace.log_marginal_likelihood(deltas)  # the whole curve from one decomposition
losses = {name: -normal.log_prob(t[test, 0]).mean().item() for name, normal in found.items()}
print("test negative log-likelihood: " + ", ".join(f"{k} {v:.2f}" for k, v in losses.items()))
levels = torch.linspace(0.05, 0.95, 19)
covered = {}
for name, normal in found.items():
    place = normal.cdf(t[test, 0])  # uniform where error bars are right
    covered[name] = torch.stack([((place - 0.5).abs() <= level / 2).float().mean() for level in levels])

# %% Figure
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
axes[0].fill_between(line[:, 0], mean - 2 * spread, mean + 2 * spread, color=ritz.plot.BLUE, alpha=0.2, linewidth=0)
axes[0].plot(line, mean, color=ritz.plot.BLUE)
axes[0].plot(x, y, ".", color="k", markersize=4)
axes[0].set(title="mean, and two standard deviations of it", ylim=(-4, 4), xlabel="x")
axes[1].semilogx(deltas, evidence, color=ritz.plot.BLUE)
axes[1].set(title="patients: log evidence at these weights", xlabel="one prior precision for all layers")
axes[2].plot([0, 1], [0, 1], color=ritz.plot.GREY, linestyle="--")
for (name, share), colour in zip(covered.items(), (ritz.plot.ORANGE, ritz.plot.BLUE)):
    axes[2].plot(levels, share, "o-", color=colour, markersize=4, label=name)
axes[2].set(title="patients: targets inside of intervals", xlabel="probability", ylabel="share of targets")
axes[2].legend(frameon=False, fontsize=8)
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "error_bars.png", dpi=130)

# %% What must hold
gap, among = spread[line[:, 0].abs() < 0.3].mean(), spread[(line[:, 0] + 3).abs() < 0.5].mean()
assert gap > 2 * among and spread[0] > 2 * among, "the network knows less where there are no data"
off = {name: (share - levels).abs().mean().item() for name, share in covered.items()}
assert losses["trained with the evidence"] < losses["trained, noise from its residuals"]
assert off["trained with the evidence"] < 0.08 < off["trained, noise from its residuals"]
print(f"wrote {out / 'error_bars.png'}")
