"""From the rows of a run to bars, a markdown table and two figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MAIN = "elevators"
SAME = ("gpytorch, rank 15", "gpytorch, rank 100")  # GPyTorch dense at our tolerance
LOOSE = "gpytorch, tolerance 1"
SCALED = "ritz NumbaTiles, no P"
NOT_ITERATIVE = ("ritz Cholesky",)
FIT_FROM = 2000  # sizes below are left out of the fitted slopes
STUDY = {  # Krämer et al. 2024, one GPU, full size: RMSE and seconds a step, adjoint (JAX) and GPyTorch with KeOps
    "elevators": (0.095, 0.096, 1.69, 0.10),
    "kin40k": (0.116, 0.102, 8.27, 0.25),
    "protein": (0.388, 0.385, 12.6, 0.59),
    "keggdirected": (0.119, 0.118, 13.3, 0.66),
}
MIB = 2.0**20
COLOURS = {"ritz": "tab:blue", "gpytorch": "tab:orange", "gpytorch KeOps": "tab:red", "sklearn": "0.5"}


# -- reading ---------------------------------------------------------------------------------------
def of(result: dict, section: str, **tags: Any) -> list[dict]:
    return [r for r in result["rows"] if r["section"] == section and all(r.get(k) == v for k, v in tags.items())]


def contestants(result: dict, name: str) -> dict[str, dict]:
    """One entry a contestant: samples of all rounds pooled, everything else from its first round."""
    merged: dict[str, dict] = {}
    for row in of(result, "race", set=name):
        entry = merged.setdefault(row["contestant"], row | {"samples": []})
        entry["samples"] = entry["samples"] + row.get("samples", [])
    for entry in merged.values():
        if entry["samples"]:
            low, entry["median_s"], high = (float(x) for x in np.percentile(entry["samples"], [25, 50, 75]))
            entry["iqr_s"] = high - low
    return merged


def ours(rows: dict[str, dict], limit: float = np.inf) -> list[dict]:
    """Our iterative rows that were timed and whose true residual is below the limit."""
    return [
        r for k, r in rows.items()
        if k.startswith("ritz") and k not in NOT_ITERATIVE and "median_s" in r and r.get("residual", np.inf) <= limit
    ]  # fmt: skip


def slope(rows: list[dict], key: str) -> float | None:
    """Of a straight line through log(key) against log(n)."""
    points = [(r["n"], r[key]) for r in rows if r.get("n", 0) >= FIT_FROM and r.get(key)]
    if len(points) < 2:
        return None
    n, value = np.log(np.array(points)).T
    return float(np.polyfit(n, value, 1)[0])


def bars(result: dict) -> list[dict]:
    out: list[dict] = []

    def bar(claim: str, figure: float | None, limit: float, *, least: bool = False, note: str = "") -> None:
        met = None if figure is None else bool(figure >= limit if least else figure <= limit)
        out.append({"claim": claim, "figure": figure, "limit": limit, "met": met, "note": note})

    rows, rtol = contestants(result, MAIN), result["settings"]["rtol"]
    peers = [rows[k] for k in SAME if "median_s" in rows.get(k, {})]
    able = ours(rows, 2 * rtol)
    if rows:
        # Time and memory of one row: what ritz chooses by itself, or the fastest where that was not measured.
        chosen = [r for r in able if r["contestant"] == "ritz"] or able
        best, peer = (min(r, key=lambda r: r["median_s"]) if r else None for r in (chosen, peers))
        both = best is not None and peer is not None
        names = f"{best['contestant']} against {peer['contestant']}" if both else "not measured"
        ratio = peer["median_s"] / best["median_s"] if both else None
        bar(f"{MAIN}: step ≥ 5 × faster than GPyTorch dense at equal tolerance", ratio, 5.0, least=True, note=names)
        light = min(peers, key=lambda r: r["peak_bytes"]) if peers else None
        ratio = best["peak_bytes"] / light["peak_bytes"] if both else None
        bar(f"{MAIN}: peak memory ≤ 1/5 of GPyTorch dense, the same row of ours", ratio, 0.2, note="whole process")
        if LOOSE in rows and "median_s" in rows[LOOSE] and best is not None:
            ratio = rows[LOOSE]["median_s"] / best["median_s"]
            note = f"its default tolerance of 1: true residual {rows[LOOSE].get('residual', np.nan):.1e}"
            bar(f"{MAIN}: step faster than GPyTorch at its default tolerance", ratio, 1.0, least=True, note=note)
    for at in ("all steps", "equal steps", "equal seconds"):
        scored = {r["contestant"]: r for r in of(result, "score", set=MAIN, at=at) if "rmse" in r}
        mine = [r for k, r in scored.items() if k.startswith("ritz")]
        theirs = [r for k, r in scored.items() if k.startswith("gpytorch")]
        if mine and at == "all steps":
            best_rmse, note = min(r["rmse"] for r in mine), f"{mine[0]['step']} steps"
            bar(f"{MAIN}: RMSE ≤ 0.096 in raw units", best_rmse, 0.096, note=note)
        if mine and theirs and at != "all steps":
            gap = min(r["nll"] for r in mine) - min(r["nll"] for r in theirs)
            steps = ", ".join(f"{k}: {r['step']} steps in {r['train_s']:.0f} s" for k, r in scored.items())
            bar(f"{MAIN}: NLL minus GPyTorch's ≤ 0.001 nats at {at}", gap, 1e-3, note=steps)
    for row in of(result, "gradients"):
        if "own" in row:
            at = f"tolerance {result['settings'].get('check_rtol', rtol):g}"
            bar(f"{row['set']}: gradient = derivative of its own objective (relative)", row["own"], 1e-3, note=at)
            note = "1.1 is expected; in standard errors, root mean square over probe sets"
            bar(f"{row['set']}: gradient − Cholesky's", row["cholesky"], 2.0, note=note)
    for row in of(result, "agreement"):
        if "worst" in row:
            bar(f"{row['set']}: log p of everybody at equal parameters (relative)", row["worst"], 1e-6)
    mine = of(result, "scaling", contestant=SCALED)
    for key, limit, what in (("median_s", 2.2, "time"), ("growth_bytes", 1.2, "memory")):
        exponent = slope(with_medians(mine), key)
        if exponent is not None:
            bar(f"scaling of {what} with n (exponent)", exponent, limit, note=f"n ≥ {FIT_FROM}")
    return out


def with_medians(rows: list[dict]) -> list[dict]:
    return [r | {"median_s": float(np.median(r["samples"]))} for r in rows if r.get("samples")]


# -- table -----------------------------------------------------------------------------------------
def cell(record: dict, key: str, form: str, scale: float = 1.0) -> str:
    value = record.get(key)
    return "—" if value is None else format(value if scale == 1.0 else value * scale, form)


def table(head: str, rows: list[str]) -> list[str]:
    return ["| " + head + " |", "|" + "---|" * (head.count("|") + 1), *(f"| {r} |" for r in rows), ""]


def plain(text: str, size: int = 200) -> str:
    return " ".join(text.replace("|", "/").split())[:size]


def markdown(result: dict) -> str:
    env, settings = result["environment"], result["settings"]
    result["bars"] = bars(result)
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    load, later = env["load_average"][0], env["load_average_end"][0]
    lines = [
        "# Exact Gaussian processes on equal terms",
        "",
        f"{env['cpu']}, {env['threads']} threads, {env['dtype']}, {env['date']}; {versions}; "
        f"load average {load:.1f} before, {later:.1f} after; {result['seconds'] / 60:.0f} minutes.",
        "",
        f"Matérn 3/2 with ARD, constant mean, learned noise; Adam at {settings['lr']}; 10 probes; everybody's stopping "
        f"tolerance is {settings['rtol']:g} unless its name says otherwise.",
        "",
    ]
    rows = []
    for b in result["bars"]:
        verdict = "not measured" if b["met"] is None else "yes" if b["met"] else "**no**"
        figure = "—" if b["figure"] is None else f"{b['figure']:.3g}"
        rows.append(f"{b['claim']} | {figure} | {b['limit']:g} | {verdict} | {b['note']}")
    lines += table("bar | figure | limit | met | remark", rows)
    lines += ["## Sets", ""]
    head = "set | rows | training rows | test rows | noise, output scale where steps are timed | remark"
    lines += table(head, [set_row(k, entry) for k, entry in result["sets"].items()])
    lines += checks(result)
    for name in result["sets"]:
        lines += steps_table(result, name) + scores_table(result, name)
    lines += scaling_table(result)
    lines += ["## Reference: the original study (one GPU, full size, 75 steps, mean of 5 seeds)", ""]
    head = "set | RMSE, adjoint | RMSE, GPyTorch + KeOps | s a step, adjoint | s a step, GPyTorch + KeOps"
    lines += table(head, [f"{k} | {' | '.join(map(str, figures))}" for k, figures in STUDY.items()])
    return "\n".join(lines)


def set_row(name: str, entry: dict) -> str:
    if "error" in entry:
        return f"{name} | — | — | — | — | {plain(entry['error'])}"
    a = entry["about"]
    train = f"{a['train']}" + (f" of {a['train_full']}" if a["train"] < a["train_full"] else "")
    return (
        f"{name} | {a['rows']} | {train} | {a['test']} | {a['noise']:.3g}, {a['outputscale']:.3g} "
        f"(Cholesky on {a['state_rows']} rows) | {plain(str(a.get('grouped', '')), 400)}"
    )


def checks(result: dict) -> list[str]:
    lines: list[str] = []
    rows = []
    for r in of(result, "agreement"):
        for who, e in r.get("errors", {"—": {"error": r.get("error", "")}}).items():
            text = [f"{e[k]:.0e}" if k in e else "—" for k in ("start", "trained")]
            rows.append(f"{r['set']} | {who} | {' | '.join(text)} | {plain(e.get('error', ''))}")
    if rows:
        lines += ["## log p at equal hyper-parameters, against a plain float64 formula (relative)", ""]
        lines += table("set | contestant | start values | trained values | error", rows)
    rows = []
    for r in of(result, "gradients"):
        text = [cell(r, k, f) for k, f in (("rows", "d"), ("depth", "d"), ("own", ".1e"), ("cholesky", ".2f"),
                                           ("value", ".2f"), ("relative", ".1e"))]  # fmt: skip
        rows.append(f"{r['set']} | {' | '.join(text)} | {plain(r.get('error', ''))}")
    if rows:
        lines += ["## The iterative gradient, float64", ""]
        head = "set | rows | depth | against differences of its own objective | − Cholesky's, in standard errors"
        head += " | value − Cholesky's, in standard errors | gradient − Cholesky's, relative | error"
        lines += table(head, rows)
    return lines


def steps_table(result: dict, name: str) -> list[str]:
    found = contestants(result, name)
    if not found:
        return []
    rows = []
    for who, r in found.items():
        remark = [plain(r["error"], 300)] if "error" in r else []
        remark += [f"{count} × {plain(text, 110)}" for text, count in r.get("warnings", {}).items()]
        if r.get("compile_s", 0.0) > 1.0:
            remark.insert(0, f"compiled first in {r['compile_s']:.0f} s")
        if r.get("slow"):
            remark.insert(0, "one step only, too slow to repeat")
        report = r.get("report", {})
        if report.get("backend"):
            remark.insert(0, report["backend"])
        time = f"{cell(r, 'median_s', '.3f')} ({cell(r, 'iqr_s', '.3f')})"
        rows.append(
            f"{who} | {time} | {cell(r, 'peak_bytes', '.0f', 1 / MIB)} | {cell(r, 'baseline_bytes', '.0f', 1 / MIB)} "
            f"| {cell(r, 'residual', '.1e')} | {cell(report, 'depth', 'd')} | {cell(report, 'products', 'd')} "
            f"| {cell(r, 'warm_step_s', '.1f')} | {'; '.join(remark)}"
        )
    head = "contestant | s a step (IQR) | peak MiB | of it before | true residual | depth | products"
    head += " | warm-up step s | remark"
    return [f"## {name}: a training step at the same hyper-parameters", "", *table(head, rows)]


def scores_table(result: dict, name: str) -> list[str]:
    found = of(result, "score", set=name)
    if not found:
        return []
    rows, raced = [], contestants(result, name)
    for r in found:
        own = raced[r["contestant"]].get("own", {}) if r["at"] == "all steps" else {}
        text = [cell(r, k, f) for k, f in (("rmse", ".4g"), ("nll", ".4f"), ("cover50", ".3f"), ("cover90", ".3f"),
                                           ("cover95", ".3f"))]  # fmt: skip
        pair = f"{cell(own, 'nll_first', '.3f')} ({cell(r, 'nll_first', '.3f')})" if own else "—"
        text += [cell(own, "rmse", ".4g"), pair, cell(own, "seconds", ".1f")]
        remark = plain(r.get("error", own.get("error", "")))
        rows.append(f"{r['contestant']} | {r['at']} | {r['step']} | {r['train_s']:.1f} | {' | '.join(text)} | {remark}")
    head = "contestant | compared at | steps | seconds | RMSE | NLL | 50 % | 90 % | 95 %"
    head += " | RMSE of its own prediction | its NLL on 100 rows (exact) | s | error"
    return [f"## {name}: test scores in raw units, by exact prediction at everybody's hyper-parameters", "",
            *table(head, rows)]  # fmt: skip


def scaling_table(result: dict) -> list[str]:
    found = of(result, "scaling")
    if not found:
        return []
    rows, mib = [], 1 / MIB
    for r in [*with_medians(found), *(r for r in found if not r.get("samples"))]:
        rows.append(
            f"{r['contestant']} | {r['size']} | {cell(r, 'median_s', '.3f')} | {cell(r, 'growth_bytes', '.1f', mib)} "
            f"| {cell(r, 'peak_bytes', '.0f', mib)} | {plain(r.get('error', ''))}"
        )
    head = "contestant | n | s | growth MiB | peak MiB | error"
    title = f"## Likelihood and gradient against n: kin40k, {result['settings']['depth']} products a vector"
    return [title, "", *table(head, rows)]


# -- figures ---------------------------------------------------------------------------------------
def colour(name: str) -> str:
    return next(COLOURS[k] for k in sorted(COLOURS, key=len, reverse=True) if name.startswith(k))


def figures(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    names = [n for n in result["sets"] if any("median_s" in r for r in contestants(result, n).values())]
    if names:
        race_figure(result, MAIN if MAIN in names else names[0], names, path.with_suffix(".png"))
    if with_medians(of(result, "scaling")):
        scaling_figure(result, path.with_name(path.stem + "-scaling.png"))


def race_figure(result: dict, name: str, names: list[str], path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(15, 8.4))
    rows = {k: r for k, r in contestants(result, name).items() if "median_s" in r}
    n = next(iter(rows.values()))["n"]
    for ax, key, unit, label in (
        (axes[0, 0], "median_s", 1.0, "seconds per training step"),
        (axes[0, 1], "peak_bytes", 2.0**30, "peak memory of the process, GiB"),
    ):
        order = sorted(rows, key=lambda k: rows[k][key], reverse=True)
        values = [rows[k][key] / unit for k in order]
        drawn = ax.barh(order, values, color=[colour(k) for k in order])
        ax.bar_label(drawn, [f"{v:.2f}" for v in values], padding=3, fontsize=8)
        if key == "peak_bytes":
            ax.barh(order, [rows[k]["baseline_bytes"] / unit for k in order], color="white", alpha=0.5)
            label += " (pale: before the model)"
        ax.set(xlabel=label, title=f"{name}, n = {n}", xlim=(0, 1.15 * max(values)))
        ax.tick_params(axis="y", labelsize=8)
    curves(axes[0, 2], result, name)
    calibration(axes[1, 0], result, name)
    lengthscales(axes[1, 1], result, name)
    across(axes[1, 2], result, names)
    fig.tight_layout()
    fig.savefig(path, dpi=140)
    plt.close(fig)


STYLES = ("-", "--", ":", "-.")


def trained(result: dict, name: str) -> list[tuple[str, dict, str]]:
    """(contestant, training, line style) of everybody who was trained; styles tell one family's members apart."""
    out: list[tuple[str, dict, str]] = []
    for who, r in contestants(result, name).items():
        if r.get("training", {}).get("losses") and len(r["training"]["losses"]) > 1:
            family = sum(colour(w) == colour(who) for w, _, _ in out)
            out.append((who, r["training"], STYLES[family % len(STYLES)]))
    return out


def curves(ax: Any, result: dict, name: str) -> None:
    for who, t, style in trained(result, name):
        ax.plot(t["seconds"][1:], t["losses"], color=colour(who), linestyle=style, label=who)
    ax.set(xlabel="seconds of training", ylabel="−log p(y)/n as each one sees it", title=f"{name}: training")
    ax.grid(alpha=0.3)
    if ax.has_data():
        ax.legend(fontsize=8)


def calibration(ax: Any, result: dict, name: str) -> None:
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    styles = {who: style for who, _, style in trained(result, name)}
    for r in of(result, "score", set=name, at="all steps"):
        if "rmse" in r:
            share = [r[f"cover{k}"] for k in (50, 90, 95)]
            label = f"{r['contestant']}: RMSE {r['rmse']:.4g}, NLL {r['nll']:.3f}"
            style = styles.get(r["contestant"], "-")
            ax.plot([0.5, 0.9, 0.95], share, style, marker="o", color=colour(r["contestant"]), label=label)
    ax.set(xlabel="nominal coverage", ylabel="share of test rows inside", title=f"{name}: calibration",
           xlim=(0.4, 1.0), ylim=(0.4, 1.0))  # fmt: skip
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)


def lengthscales(ax: Any, result: dict, name: str) -> None:
    for who, t, style in trained(result, name):
        values = t.get("final", {}).get("lengthscales")
        if values:
            ax.plot(range(1, len(values) + 1), values, style, marker="o", markersize=4, color=colour(who), label=who)
            ax.set_xticks(range(1, len(values) + 1))
    ax.set(xlabel="input column", ylabel="learned length-scale (standardised)", yscale="log",
           title=f"{name}: length-scales after training")  # fmt: skip
    ax.grid(alpha=0.3)
    if ax.has_data():
        ax.legend(fontsize=8)


def across(ax: Any, result: dict, names: list[str]) -> None:
    """Steps of the main contestants on every set."""
    everyone = ("ritz", "gpytorch, rank 100", LOOSE, "gpytorch KeOps", "sklearn")
    shades = {"ritz": 1.0, "gpytorch, rank 100": 1.0, LOOSE: 0.5, "gpytorch KeOps": 1.0, "sklearn": 1.0}
    width = 0.8 / len(everyone)
    for i, who in enumerate(everyone):
        at, values = [], []
        for j, name in enumerate(names):
            r = contestants(result, name).get(who, {})
            if "median_s" in r:
                at.append(j + (i - 2) * width)
                values.append(r["median_s"])
        if not at:
            continue
        ax.bar(at, values, width, color=colour(who), alpha=shades[who], label=who)
    labels = [f"{k}\n{result['sets'][k]['about']['train']}" for k in names]
    ax.set_xticks(range(len(names)), labels, fontsize=8)
    ax.set(yscale="log", ylabel="seconds per training step", title="all sets (training rows below)")
    ax.grid(alpha=0.3, axis="y")
    ax.legend(fontsize=8)


def scaling_figure(result: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.4))
    for ax, key, unit, label, order in (
        (axes[0], "median_s", 1.0, "seconds, likelihood and gradient", 2),
        (axes[1], "growth_bytes", MIB, "growth of peak memory, MiB", 1),
    ):
        for who in dict.fromkeys(r["contestant"] for r in of(result, "scaling")):
            rows = [r for r in with_medians(of(result, "scaling", contestant=who)) if r.get(key)]
            if not rows:
                continue
            exponent = slope(rows, key)
            fitted = "" if exponent is None else f", ∝ n^{exponent:.2f}"
            n, values = np.array([r["n"] for r in rows]), np.array([r[key] / unit for r in rows])
            ax.plot(n, values, "o-", color=colour(who), label=who + fitted)
            if who == SCALED:
                ax.plot(n, values[-1] * (n / n[-1]) ** order, color="0.7", linestyle="--", label=f"n^{order}")
        ax.set(xscale="log", yscale="log", xlabel="n", ylabel=label)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=9)
    fig.suptitle(f"kin40k rows, {result['settings']['depth']} products a vector, {result['environment']['dtype']}")
    fig.tight_layout()
    fig.savefig(path, dpi=140)
    plt.close(fig)
