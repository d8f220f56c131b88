"""From records to what people read: the merged JSON, a markdown table, the bars, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MATRIX_BARS = [  # claim, numerator, denominator, comparison, limit: ratio of median times at k = 50
    ("ritz forward ≤ 1.3 × plain eager loop, forward", "ritz forward", "loop forward", "<=", 1.3),
    ("Frechet value and gradient ≤ 1.4 × ritz forward", "ritz Frechet", "ritz forward", "<=", 1.4),
    ("Frechet value and gradient ≥ 7 × faster than matfree's", "matfree adjoint", "ritz Frechet", ">=", 7.0),
    ("Adjoint value and gradient ≥ 2.5 × faster than matfree's", "matfree adjoint", "ritz Adjoint", ">=", 2.5),
]
NETWORK_BARS = [
    ("callable: Frechet value and gradient ≤ 1.6 × ritz forward", "ritz Frechet", "ritz forward", "<=", 1.6)
]
COLOURS = {
    "loop forward": ("0.55", "--", "v"),
    "loop autograd": ("0.25", "-", "v"),
    "matfree forward": ("tab:orange", "--", "s"),
    "matfree adjoint": ("tab:red", "-", "s"),
    "ritz forward": ("tab:cyan", "--", "o"),
    "ritz Adjoint": ("tab:green", "-", "D"),
    "ritz Frechet, COO": ("tab:blue", ":", "x"),
    "ritz Frechet": ("tab:blue", "-", "o"),
}


def merge(records: list[dict]) -> list[dict]:
    """One record a configuration: samples of all rounds pooled (median, quartiles), everything else taken as found."""
    merged: dict[tuple, dict] = {}
    for record in records:
        key = (record["problem"], record["contestant"], record["k"])
        entry = merged.setdefault(key, {"samples": [], "round_medians": []})
        samples = record.get("samples", [])
        if samples:
            entry["samples"] += samples
            entry["round_medians"].append(float(np.median(samples)))
        entry.update({name: value for name, value in record.items() if name != "samples" and value is not None})
    for entry in merged.values():
        if entry["samples"]:
            q1, entry["median_s"], q3 = (float(x) for x in np.percentile(entry["samples"], [25, 50, 75]))
            entry["iqr_s"] = q3 - q1
            entry["runs"] = len(entry["samples"])
    return list(merged.values())


def bars(records: list[dict]) -> list[dict]:
    """Each bar on each problem at k = 50 (or the largest k measured, which is then named)."""
    out = []
    for problem in dict.fromkeys(r["problem"] for r in records):
        mine = [r for r in records if r["problem"] == problem and "median_s" in r]
        ks = sorted({r["k"] for r in mine})
        if not ks:
            continue
        k = 50 if 50 in ks else ks[-1]
        times = {r["contestant"]: r["median_s"] for r in mine if r["k"] == k}
        for claim, top, bottom, sign, limit in NETWORK_BARS if problem == "network" else MATRIX_BARS:
            entry: dict[str, Any] = {"problem": problem, "k": k, "claim": claim, "ratio": None, "met": None}
            if top in times and bottom in times:
                entry["ratio"] = times[top] / times[bottom]
                entry["met"] = entry["ratio"] <= limit if sign == "<=" else entry["ratio"] >= limit
            out.append(entry)
    return out


def _cell(record: dict, name: str, form: str, scale: float | None = None) -> str:
    number = record.get(name)
    if number is None:
        return "—"
    return format(number if scale is None else number * scale, form)


def markdown(result: dict) -> str:
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    lines = [
        "# Gradients of matrix functions",
        "",
        f"{env['cpu']}, {env['threads']} threads, {env['device']}, float64, {env['date']}; {versions}; "
        f"load average {env['load_average'][0]:.1f} before, {env['load_average_end'][0]:.1f} after"
        + (" — **quick sizes**" if result["quick"] else ""),
        "",
        "| problem | bar (time ratio) | k | figure | met |",
        "|---|---|---|---|---|",
    ]
    for bar in result["bars"]:
        verdict = "not measured" if bar["met"] is None else ("yes" if bar["met"] else "**no**")
        figure = "—" if bar["ratio"] is None else f"{bar['ratio']:.2f}"
        lines.append(f"| {bar['problem']} | {bar['claim']} | {bar['k']} | {figure} | {verdict} |")
    for problem, about in result["problems"].items():
        rows = [r for r in result["records"] if r["problem"] == problem]
        lines += ["", f"## {about['title']}", "", f"{about['parameters']}. Reference: {about['reference']}.", ""]
        lines.append(
            "| k | contestant | time ms (IQR) | peak MiB | products value + gradient | value error | gradient error "
            "| as handed out | product | compile s |"
        )
        lines.append("|---|---|---|---|---|---|---|---|---|---|")
        for r in sorted(rows, key=lambda r: (r["k"], list(COLOURS).index(r["contestant"]))):
            spent = f"{_cell(r, 'products_value', 'd')} + {_cell(r, 'products_grad', 'd')}"
            spread = _cell(r, "iqr_s", ".1f", 1e3)
            lines.append(
                f"| {r['k']} | {r['contestant']} | {_cell(r, 'median_s', '.1f', 1e3)} ({spread}) "
                f"| {_cell(r, 'peak_bytes', '.1f', 2.0**-20)} | {spent} | {_cell(r, 'value_error', '.0e')} "
                f"| {_cell(r, 'grad_error', '.0e')} | {_cell(r, 'grad_error_raw', '.0e')} | {r.get('product', '—')} "
                f"| {_cell(r, 'compile_s', '.1f')} |"
            )
    return "\n".join(lines) + "\n"


def figure(result: dict, path: Path) -> None:
    """Top row: time against k. Bottom row: gradient error against products spent on value and gradient."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(result["problems"])
    fig, axes = plt.subplots(2, len(problems), figsize=(4.6 * len(problems), 7.6), squeeze=False)
    for column, problem in enumerate(problems):
        top, bottom = axes[:, column]
        for name, (colour, style, marker) in COLOURS.items():
            rows = [r for r in result["records"] if r["problem"] == problem and r["contestant"] == name]
            rows.sort(key=lambda r: r["k"])
            look = {"color": colour, "linestyle": style, "marker": marker, "markersize": 5, "label": name}
            timed = [r for r in rows if "median_s" in r]
            if timed:
                top.plot([r["k"] for r in timed], [1e3 * r["median_s"] for r in timed], **look)
            graded = [r for r in rows if "grad_error" in r and "products_value" in r]
            if graded:
                spent = [r["products_value"] + r["products_grad"] for r in graded]
                bottom.plot(spent, [max(r["grad_error"], 1e-16) for r in graded], **look)
        top.set(xscale="log", yscale="log", xlabel="depth k", title=result["problems"][problem]["title"])
        ks = sorted({r["k"] for r in result["records"] if r["problem"] == problem})
        top.set_xticks(ks, [str(k) for k in ks])
        top.minorticks_off()
        bottom.set(yscale="log", xlabel="products spent (value and gradient)")
        for ax in (top, bottom):
            ax.grid(alpha=0.3)
        top.title.set_fontsize(9)
    axes[0, 0].set_ylabel("time, ms (dashed: value only)")
    axes[1, 0].set_ylabel("relative error of the gradient (symmetric part)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=min(len(labels), 7), frameon=False)
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    fig.savefig(path, dpi=140)
    plt.close(fig)
