"""How fast is sound below the ground?  Recover a field of wave speeds from echoes, through exact waves.

A pressure u obeys u_tt = c(x)² Δu on a square with reflecting borders; c is unknown. Pulses are sent from several
places, and the pressure is read off at a few hundred sensors at several times, with noise. c(x) is a network of the
coordinates, fitted through u(t) = C cos(t√S) C⁻¹ u(0), S = C(−Δ)C with C = diag(c): ``ritz.expint.wave_multiply``
takes all pulses to the next time by one symmetric Krylov run, no time steps, and gives the gradient in c.

    python examples/06_find_the_wave_speed.py [--out out]        RITZ_SMALL=1: 16 × 16 points, seconds
"""

# %% Setting
import argparse
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import ritz
from ritz.expint import Grid, WaveOperator, wave_multiply

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
out, small = parser.parse_args().out, os.environ.get("RITZ_SMALL") == "1"
N, steps = (16, 60) if small else (32, 120)
torch.manual_seed(0)
grid = Grid((N, N), border="neumann")
x = grid.coordinates(dtype=torch.float32)
method = ritz.Lanczos(rtol=1e-4, reorthogonalize=False)  # far below the noise
interval, readings, noise = 0.1, 8, 0.01


# %% The truth: a fast layer, a slow lens; pulses; sensors
def bump(center, width):
    return torch.exp(-(x - torch.tensor(center)).square().sum(1) / (2 * width**2))


c_true = 1 + 0.4 * torch.sigmoid(20 * (x[:, 1] - 0.6)) - 0.35 * bump((0.35, 0.35), 0.12)
places = [(0.15, 0.15), (0.85, 0.2), (0.5, 0.5), (0.2, 0.85), (0.8, 0.8), (0.5, 0.1)]
pulses = torch.stack([bump(p, 0.09) for p in places], 1)  # (n, 6)
sensors = torch.randperm(grid.size)[: grid.size // 3]


def seismograms(c):
    """Pressure at the sensors at every reading, (readings, sensors, pulses)."""
    S = WaveOperator(c.reshape(grid.shape), grid)
    w, speed, seen = pulses / c.unsqueeze(1), None, []
    for _ in range(readings):
        w, speed = wave_multiply(S, w, speed, interval, method=method)
        seen.append(c[sensors].unsqueeze(1) * w[sensors])
    return torch.stack(seen)


with torch.no_grad():
    observed = seismograms(c_true)
observed = observed + noise * observed.std() * torch.randn_like(observed)

# %% The unknown: log c as a network of the coordinates, which enter as cosines that fit the square
waves = torch.cartesian_prod(torch.arange(7.0), torch.arange(7.0))[1:]
features = torch.cos(torch.pi * x[:, :1] * waves[:, 0]) * torch.cos(torch.pi * x[:, 1:] * waves[:, 1])
network = torch.nn.Sequential(torch.nn.Linear(len(waves), 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
with torch.no_grad():
    network[2].weight.zero_(), network[2].bias.zero_()  # c = 1 everywhere to begin with


def guess():
    return network(features).squeeze(1).exp()


def rmse(c):
    return (c - c_true).square().mean().sqrt().item()


# %% Fit
optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
start, losses, first = time.perf_counter(), [], rmse(guess().detach())
for step in range(steps):
    optimizer.zero_grad()
    loss = (seismograms(guess()) - observed).square().mean() / observed.var()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
    if step % (steps // 5) == 0:
        print(f"step {step:4d}: misfit {loss.item():.2e}, speed off by {rmse(guess().detach()):.4f}", flush=True)
c = guess().detach()
seconds = time.perf_counter() - start
print(f"{steps} steps in {seconds:.0f} s: misfit {losses[-1]:.2e} (noise {noise**2:.0e})")
print(f"root mean square error of the speed: {first:.4f} at first, {rmse(c):.4f} now")

# %% What was found
out.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
low, high = c_true.min().item(), c_true.max().item()
for axis, (title, field) in zip(axes, (("true speed", c_true), ("found", c))):
    image = axis.imshow(field.reshape(N, N).T, origin="lower", extent=(0, 1, 0, 1), vmin=low, vmax=high)
    axis.set_title(title)
axes[0].scatter(*torch.tensor(places).T, marker="*", color="white", edgecolor="black", label="pulses")
axes[0].scatter(*x[sensors].T, s=1.5, color="white", label="sensors")
axes[0].legend(loc="lower right", fontsize=7)
figure.colorbar(image, ax=axes[:2], label="c")
difference, most = (c - c_true).reshape(N, N).T, (c - c_true).abs().max().item()
error = axes[2].imshow(difference, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu", vmin=-most, vmax=most)
axes[2].set_title("found − true")
figure.colorbar(error, ax=axes[2])
axes[3].semilogy(losses)
axes[3].axhline(noise**2, color="black", linestyle=":", label="noise")
axes[3].set(title="misfit", xlabel="step")
axes[3].legend()
figure.savefig(out / "wave_speed.png", dpi=130)
print(f"figure: {out / 'wave_speed.png'}")

assert losses[-1] < 0.05 * losses[0], "the waves should be explained much better than by a constant speed"
assert rmse(c) < 0.6 * first, "the field should be nearer to the truth than a constant"
