"""Scores of predictions, and the tables and the figure of the Laplace study."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

BINS = 15  # of the calibration error
LEVELS = [0.05 * i for i in range(1, 20)]  # central intervals whose coverage is looked at


# -- scores ----------------------------------------------------------------------------------------
def scores(found: Any, inside: Any, outside: Any) -> dict[str, Any]:
    return regression(found, inside) if found.regression else classification(found, inside, outside)


def classification(found: Any, p: Any, outside: Any) -> dict[str, Any]:
    """Mean negative log-likelihood, error rate, expected calibration error, area under the curve for turned digits."""
    import torch

    y, p = found.test[1], p.double()
    confidence, label = p.max(-1)
    hit = (label == y).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(bins, minlength=BINS)
    gaps = torch.bincount(bins, hit - confidence, minlength=BINS).abs() / len(y)
    row: dict[str, Any] = {
        "nll": float(-p.gather(1, y[:, None]).log().mean()), "error_rate": float(1 - hit.mean()),
        "calibration": float(gaps.sum()),
        "reliability": {
            "count": count.tolist(),
            "confidence": torch.bincount(bins, confidence, minlength=BINS).tolist(),
            "hits": torch.bincount(bins, hit, minlength=BINS).tolist(),
        },
    }  # fmt: skip
    if outside is not None:
        known, other = (-torch.special.entr(q.double()).sum(-1) for q in (p, outside))
        ranks = torch.cat([known, other]).argsort().argsort().double() + 1
        n, m = len(known), len(other)
        row["auroc"] = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    return row


def regression(found: Any, prediction: Any) -> dict[str, Any]:
    """Of an equal mixture of Gaussians, targets standardised: as above, with the root mean squared error, and the mean
    difference between the share of targets in central intervals and their probability."""
    import torch

    y = found.test[1].squeeze(-1).double()
    mean, variance = (t.double() for t in prediction)
    z = (y - mean) / variance.sqrt()
    logs = -0.5 * z.square() - 0.5 * torch.log(2 * torch.pi * variance)
    place = torch.special.ndtr(z).mean(0)  # where the target lies in its predictive distribution
    covered = [float(((place - 0.5).abs() <= level / 2).double().mean()) for level in LEVELS]
    return {
        "nll": float(-(torch.logsumexp(logs, 0) - math.log(len(mean))).mean()),
        "rmse": float((mean.mean(0) - y).square().mean().sqrt()),
        "calibration": statistics.fmean(abs(c - level) for c, level in zip(covered, LEVELS)),
        "covered": covered,
    }


# -- tables ----------------------------------------------------------------------------------------
Rows = dict[str, dict[str, list[dict[str, Any]]]]


def grouped(result: dict[str, Any]) -> Rows:
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for row in result["rows"]:
        if "error" not in row:
            rows[row["set"]][row["method"]].append(row)
    return rows


def spread(values: list[float], digits: int = 3) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def column(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [r[key] for r in rows if r.get(key) is not None]


def table(name: str, methods: dict[str, list[dict[str, Any]]], starts: dict[str, float], seeds: int) -> list[str]:
    some = next(iter(methods.values()))[0]
    second = "rmse" if "rmse" in some else "error_rate"
    turned = "auroc" in some
    head = ["contestant", "test NLL", "RMSE" if second == "rmse" else "error rate", "calibration error"]
    head += ["AUROC turned digits"] * turned + ["log evidence", "fit s", "predict s", "peak MiB"]
    out = [f"## {name}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, rows in methods.items():
        label = method if len(rows) == seeds else f"{method} ({len(rows)} seeds)"
        cells = [label, spread(column(rows, "nll")), spread(column(rows, second)), spread(column(rows, "calibration"))]
        cells += [spread(column(rows, "auroc"))] * turned
        cells.append(spread(column(rows, "evidence"), 0))
        fit = [r["fit_s"] + (starts.get(name, 0.0) if method == "MAP" else 0.0) for r in rows]
        cells += [f"{statistics.median(fit):.1f}", f"{statistics.median(column(rows, 'predict_s')):.1f}"]
        cells.append(f"{statistics.median(column(rows, 'peak_bytes')) / 2**20:.0f}")
        out.append("| " + " | ".join(cells) + " |")
    return [*out, ""]


def bars(rows: Rows) -> list[str]:
    """The evidence bar seed by seed, and the likelihood bar by means over the seeds that everybody ran."""
    out = [
        "## Bars",
        "",
        "| set | evidence, full − best of kron and diag | on seeds | test NLL, online full | best other | |",
    ]
    out.append("|---|---|---|---|---|---|")
    won = tried = 0
    for name, methods in rows.items():
        full = {r["seed"]: r for r in methods.get("ritz full", [])}
        gains = []
        for seed, row in full.items():
            others = list(row["about"]["others"].values())
            others += [
                r["evidence"] for m in ("laplace-torch diag", "laplace-torch kron")
                for r in methods.get(m, []) if r["seed"] == seed and r["evidence"] is not None
            ]  # fmt: skip
            gains.append(row["evidence"] - max(others))
        evidence = (
            f"{min(gains):.0f} to {max(gains):.0f} | {sum(g > 0 for g in gains)} of {len(gains)}" if gains else "– | –"
        )
        everybody = set.intersection(*({r["seed"] for r in runs} for runs in methods.values()))
        nlls = {m: [r["nll"] for r in runs if r["seed"] in everybody] for m, runs in methods.items()}
        ours = nlls.pop("ritz online full", [])
        peers = {m: statistics.fmean(v) for m, v in nlls.items() if v and not m.startswith("ritz")}
        if ours and peers:
            best = min(peers, key=peers.__getitem__)
            fine = statistics.fmean(ours) <= peers[best]
            won, tried = won + fine, tried + 1
            verdict = f"{spread(ours)} | {peers[best]:.3f} ({best}) | {'no worse' if fine else 'worse'}"
        else:
            verdict = "– | – | –"
        out.append(f"| {name} | {evidence} | {verdict} |")
    return [
        *out,
        "",
        f"Online full no worse than the best other contestant on {won} of {tried} sets (bar: 4 of 6).",
        "",
    ]


def markdown(result: dict[str, Any]) -> str:
    rows = grouped(result)
    about = result["environment"]
    seeds = len({r["seed"] for r in result["rows"]})
    out = [
        f"# Laplace posteriors on real data, {about['date']}", "",
        f"{about['cpu']}, {about['jobs']} runs at a time with one thread each; torch {about['versions']['torch']}, "
        f"laplace-torch {about['versions']['laplace-torch']}, ivon-opt {about['versions']['ivon-opt']}; {seeds} seeds, "
        "mean ± standard deviation; seconds and memory are medians. Regression: targets standardised by the training "
        "rows. Fit: what a contestant needs beyond the MAP network it starts from; MAP's own has the search of its "
        "decay. Peak: growth over a process that has the data and its libraries.", "",
    ]  # fmt: skip
    starts: dict[str, list[float]] = defaultdict(list)
    for row in result["starts"]:
        if "error" not in row:
            starts[row["set"]].append(row["seconds"])
    seconds = {k: statistics.median(v) for k, v in starts.items()}
    for name, methods in rows.items():
        out += table(name, methods, seconds, seeds)
    out += bars(rows)
    failed = [r for r in result["rows"] if "error" in r]
    if failed:
        out += (
            ["## Failed", ""] + [f"- {r['set']}, {r['method']}, seed {r['seed']}: {r['error']}" for r in failed] + [""]
        )
    return "\n".join(out)


# -- figure ----------------------------------------------------------------------------------------
SHOWN = {
    "MAP": ("0.6", "--"), "ensemble of 5": ("tab:orange", "-"), "laplace-torch kron": ("tab:green", "-"),
    "laplace-torch online kron": ("tab:olive", "-"), "ritz full": ("tab:blue", "-"),
    "ritz online full": ("tab:red", "-"),
}  # fmt: skip


def curve(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Nominal against observed, over all seeds."""
    if "covered" in rows[0]:
        return LEVELS, [statistics.fmean(r["covered"][i] for r in rows) for i in range(len(LEVELS))]
    sums = {k: [sum(r["reliability"][k][i] for r in rows) for i in range(BINS)] for k in rows[0]["reliability"]}
    kept = [i for i in range(BINS) if sums["count"][i] >= 20]
    return tuple([sums[k][i] / sums["count"][i] for i in kept] for k in ("confidence", "hits"))  # type: ignore


def figure(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = grouped(result)
    if not rows:
        return
    across = min(3, len(rows))
    down = math.ceil(len(rows) / across)
    fig, axes = plt.subplots(down, across, figsize=(4 * across, 3.7 * down), squeeze=False)
    for ax in axes.flat[len(rows) :]:
        ax.axis("off")
    for ax, (name, methods) in zip(axes.flat, rows.items()):
        ax.plot([0, 1], [0, 1], color="0.85", lw=3, zorder=0)
        for method, (colour, style) in SHOWN.items():
            if methods.get(method):
                ax.plot(*curve(methods[method]), style, color=colour, marker=".", ms=4, label=method)
        classes = "reliability" in next(iter(methods.values()))[0]
        ax.set(title=name, xlim=(0, 1), ylim=(0, 1), xlabel="confidence" if classes else "probability of the interval")
        ax.set_ylabel("share that is right" if classes else "share of targets inside")
    axes.flat[0].legend(fontsize=8, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
