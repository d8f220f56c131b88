"""From the records of optim_step.py to what people read: ratios, memory formulas, bars, tables, the figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
import numpy as np

STRUCTURES: dict[str, Callable[[int], int]] = {  # stored numbers of a d x d factor
    "dense": lambda d: d * d,
    "diagonal": lambda d: d,
    "block30": lambda d: d // 30 * 900 + (d % 30) ** 2,
    "hierarchical": lambda d: hierarchical(d, 15, 15),
    "toeplitz": lambda d: d,
}
BARS = [  # model, structure, form, limit: T = 10, CPU time over AdamW foreach
    ("mlp", "dense", "auto", 3.0),
    ("mlp", "dense", "plain", 5.0),
    ("mlp", "diagonal", "auto", 0.95),
    ("mlp", "hierarchical", "auto", 1.3),
    ("mlp", "hierarchical", "plain", 1.7),
    ("mlp", "toeplitz", "auto", 1.8),
    ("mlp", "toeplitz", "plain", 5.5),
    ("transformer", "dense", "auto", 1.35),
]
TITLES = {"mlp": "MLP", "transformer": "transformer"}
COLOURS = {"torch": "0.55", "ritz": "tab:blue", "singd": "tab:orange"}
ITEM = 4  # bytes of a float32


def hierarchical(d: int, top: int, bottom: int) -> int:
    """[[A, B1, B2], [0, diag c, 0], [0, D, E]]; in a small matrix A comes first, then E, then c."""
    top = min(top, d)
    bottom = min(bottom, d - top)
    middle = d - top - bottom
    return top * d + middle + bottom * (middle + bottom)


def formula(row: dict, shapes: dict) -> int:
    """Bytes that the state of an optimizer should take.

    A linear layer has K, C, their momenta and the momentum of its weights (KFAC: two running factors and that
    momentum); a vector of a norm has a diagonal factor of its length by the same rule; AdamW has two moments. singd
    leaves norms to AdamW too.
    """
    if row["package"] == "torch":
        return ITEM * shapes["total"] * (1 if row["optimizer"].startswith("SGD") else 2)
    size = STRUCTURES[row["structure"] or "dense"]
    copies = 1 if row["optimizer"] == "KFAC" else 2
    layers = sum(copies * (size(d_K) + size(d_C)) + d_K * d_C for d_K, d_C in shapes["linear"])
    norms = (copies + 1 if row["package"] == "ritz" else 2) * shapes["norms"]
    return ITEM * (layers + norms + 2 * shapes["rest"])


def summarise(result: dict) -> None:
    """Adds medians, spreads, ratios and formula bytes to the rows that were timed."""
    timed = [r for r in result["rows"] if r["rounds"]]
    base = {(r["model"], s["round"]): s for r in timed if r["optimizer"] == "AdamW foreach" for s in r["rounds"]}
    for r in timed:
        for clock in ("cpu", "wall"):
            samples = [s[clock] for s in r["rounds"]]
            q1, r[f"{clock}_s"], q3 = (float(x) for x in np.percentile(samples, [25, 50, 75]))
            r[f"{clock}_iqr_s"] = q3 - q1
            ratios = [s[clock] / base[r["model"], s["round"]][clock] for s in r["rounds"]]
            low, r[f"{clock}_ratio"], high = (float(x) for x in np.percentile(ratios, [25, 50, 75]))
            r[f"{clock}_ratio_iqr"] = high - low
        r["formula_bytes"] = formula(r, result["models"][r["model"]]["shapes"])
    key = lambda r: (r["model"], r["structure"], r["interval"], r["sharing"])  # noqa: E731
    theirs = {key(r): r["cpu_s"] for r in timed if r["package"] == "singd"}
    for r in timed:
        if r["package"] == "ritz" and r["optimizer"] == "SINGD" and key(r) in theirs:
            r["singd_over_ours"] = theirs[key(r)] / r["cpu_s"]


def barred(rows: list[dict], model: str, structure: str, form: str) -> list[dict]:
    """The rows that a bar is about (one or none)."""
    asked: dict[str, Any] = {"model": model, "package": "ritz", "optimizer": "SINGD", "interval": 10}
    asked |= {"structure": structure, "form": form, "sharing": "expand" if model == "transformer" else ""}
    return [r for r in rows if all(r[k] == v for k, v in asked.items())]


def bars(result: dict) -> list[dict]:
    """Each bar with its figure. Configurations that were not asked for have none; those that failed do not meet it."""
    summarise(result)
    out = []
    for model, structure, form, limit in BARS:
        for r in barred(result["rows"], model, structure, form):
            claim, ratio = f"{r['label']}, T = 10: step time over AdamW foreach", r.get("cpu_ratio")
            met = ratio is not None and ratio <= limit and bool(np.isfinite(r["loss"])) and "failure" not in r
            out.append({"model": model, "claim": claim, "figure": ratio, "limit": limit, "met": met})
    for model in result["models"]:
        ours = [r for r in result["rows"] if r["model"] == model and r["package"] == "ritz"]
        gaps = [abs(r["state_bytes"] - r["formula_bytes"]) for r in ours if r["rounds"]]
        if gaps:
            claim = f"{len(gaps)} of {len(ours)} ritz rows: largest difference of state and formula, bytes"
            met = max(gaps) == 0 and len(gaps) == len(ours)
            out.append({"model": model, "claim": claim, "figure": max(gaps), "limit": 0, "met": met})
    return out


def markdown(result: dict) -> str:
    env, s = result["environment"], result["settings"]
    result["bars"] = bars(result)
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v and k in ("ritz", "torch", "singd"))
    load = " after, ".join(f"{env[k][0]:.1f}" for k in ("load_average_end", "load_average") if k in env)
    lines = [
        "# A training step of second-order optimizers against AdamW",
        "",
        f"Batch {s['batch']}, {env['dtype']}, {env['threads']} thread(s), {env['cpu']}, {env['date']}; {versions}; "
        f"data: {s['data']}; load average {load} before. Everybody: rate {s['lr']:g}, weight decay "
        f"{s['weight_decay']:g}; SGD and second order: momentum {s['momentum']:g}; second order: damping "
        f"{s['damping']:g}, Riemannian momentum {s['riemannian_momentum']:g}, lr_cov {s['lr_cov']:g} normalised.",
        "",
        "A step is zero_grad, forward, backward and step. Ratio: median over rounds of the time of a block of ten "
        "steps over AdamW's (`torch.optim.AdamW(foreach=True)`) in the same round. Bars are about CPU time.",
        "",
    ]
    if s["quick"]:
        lines += ["**Quick run at small sizes: a smoke test, not a measurement. The bars do not apply to it.**", ""]
    lines += ["| model | bar | figure | limit | met |", "|---|---|---|---|---|"]
    for b in result["bars"]:
        met = "—" if s["quick"] and b["limit"] else "yes" if b["met"] else "**no**"
        found = "failed" if b["figure"] is None else f"{b['figure']:.3g}"
        lines.append(f"| {TITLES[b['model']]} | {b['claim']} | {found} | {b['limit']:g} | {met} |")
    for model, about in result["models"].items():
        settings = ", ".join(f"{k} {v}" for k, v in about["settings"].items())
        lines += [
            "",
            f"## {TITLES[model]} ({settings}; {about['shapes']['total']} parameters)",
            "",
            "| optimizer | T | CPU ms per step (IQR) | CPU / AdamW (IQR) | wall / AdamW | singd / ritz | rounds | "
            "state MiB | formula MiB | caches MiB | loss after |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [table_row(r) for r in result["rows"] if r["model"] == model]
    lines += ["", *("- " + note for note in result["notes"] + legend(result))]
    return "\n".join(lines) + "\n"


def table_row(r: dict) -> str:
    head = f"| {r['label']} | {r['interval'] or '—'} |"
    said = r.get("failure", "")
    if not r["rounds"]:
        return f"{head} {said or 'not run'} |" + " |" * 8
    loss = f"{r['loss']:.3g}" if np.isfinite(r["loss"]) else "**not finite**"
    cells = [
        f"{1e3 * r['cpu_s']:.2f} ({1e3 * r['cpu_iqr_s']:.2f})",
        f"{r['cpu_ratio']:.2f} ({r['cpu_ratio_iqr']:.2f})",
        f"{r['wall_ratio']:.2f}",
        f"{r['singd_over_ours']:.1f}" if "singd_over_ours" in r else "—",
        str(len(r["rounds"])),
        *(f"{r[key] / 2**20:.2f}" for key in ("state_bytes", "formula_bytes", "cache_bytes")),
        loss + (f"; then {said}" if said else ""),
    ]
    return f"{head} {' | '.join(cells)} |"


def legend(result: dict) -> list[str]:
    notes = [
        "rows / plain / auto: natural gradient from the captured rows, from the gradient, or by cost (the default).",
        "singd / ritz: median CPU time of the package singd over ours, same structure, interval and weight sharing. "
        "Its class takes linear layers only; the rest is trained by AdamW in the same step.",
        "State: tensors kept between steps, the largest total seen; step counters (tensors without an axis) are not in "
        "it. Caches, which can be rebuilt from the state, are counted apart.",
    ]
    if any(r["slow"] for r in result["rows"]):
        notes.append(
            "singd's Toeplitz rows and T = 1 on the transformer ran in fewer rounds (column) and in blocks of "
            "one update and of five steps."
        )
    gaps = [r for r in result["rows"] if r["rounds"] and r["state_bytes"] != r["formula_bytes"]]
    if gaps:
        names = [f"{TITLES[r['model']]}, {r['label']}, T = {r['interval']}" for r in gaps]
        found = [f"{name}: {r['state_bytes']} instead of {r['formula_bytes']}" for name, r in zip(names, gaps)]
        notes.append(f"State that differs from its formula, bytes: {'; '.join(found)}.")
    return notes


def figure(result: dict, path: Path) -> None:
    """CPU time over AdamW on a log scale, a panel a model; T = 10 over T = 1, ticks at the bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in result["rows"] if r["rounds"]]
    models = [m for m in result["models"] if any(r["model"] == m for r in timed)]
    if not models:
        return
    labels = {m: list(dict.fromkeys(r["label"] for r in timed if r["model"] == m)) for m in models}
    height = 1.4 + 0.3 * max(len(found) for found in labels.values())
    fig, axes = plt.subplots(1, len(models), figsize=(7 * len(models), height), squeeze=False)
    for ax, model in zip(axes[0], models):
        place = {label: i for i, label in enumerate(labels[model])}
        for r in (r for r in timed if r["model"] == model):
            y, ratio = place[r["label"]], r["cpu_ratio"]
            at = y if not r["interval"] else y + (-0.2 if r["interval"] == 10 else 0.2)
            often = r["interval"] == 1
            bar = ax.barh(at, ratio, 0.38, color=COLOURS[r["package"]], alpha=0.45 if often else 1.0)
            ax.bar_label(bar, [f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"], fontsize=6.5, padding=2)
        for bar_model, structure, form, limit in BARS:
            for r in barred(timed, model, structure, form) if model == bar_model else []:
                y = place[r["label"]]
                ax.plot([limit, limit], [y - 0.42, y + 0.02], color="tab:red", lw=1.8)
        ax.set_yticks(range(len(place)), list(place), fontsize=7.5)
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xticks([1, 2, 3, 5, 10, 20, 50, 100, 200, 500])
        ratios = [r["cpu_ratio"] for r in timed if r["model"] == model]
        ax.set_xlim(0.6 * min(ratios), 2.0 * max(ratios))
        ax.axvline(1.0, color="0.3", lw=0.8)
        ax.set(title=TITLES[model], xlabel="CPU time of a step over AdamW (foreach)")
        ax.grid(alpha=0.3, axis="x")
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[package]) for package in COLOURS]
    handles.append(plt.Rectangle((0, 0), 1, 1, color="0.3", alpha=0.45))
    handles.append(plt.Line2D([], [], color="tab:red", lw=1.8))
    axes[0][-1].legend(handles, [*COLOURS, "lighter: T = 1", "bar (T = 10)"], fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(fig)


def finish(result: dict, path: Path) -> int:
    """Writes table, bars and figure beside the JSON; the exit status says whether anything was timed."""
    text = markdown(result)
    _common.write_json(path, result)
    path.with_suffix(".md").write_text(text)
    figure(result, path.with_suffix(".png"))
    print("\n" + text)
    return 0 if any(r["rounds"] for r in result["rows"]) else 1
