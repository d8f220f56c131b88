"""From the runs of a result to bars, markdown tables and figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from _optim_search import CONTESTANTS, mean_curve, reach, score, smooth, window

YARDSTICK, OURS = "AdamW", "SINGD"
STEPS_BAR, TASKS_BAR, TEST_BAR, BF16_BAR = 0.6, 3, 0.10, 0.02
MIB = 2.0**20
COLOURS = {
    "AdamW": "black", "SGD": "0.6", "Muon": "tab:brown", "KFAC": "tab:orange", "IKFAC": "tab:red",
    "SINGD dense": "tab:blue", "SINGD hierarchical": "tab:cyan", "SINGD block": "tab:green",
    "SINGD diagonal": "tab:purple", "SINGD Toeplitz": "tab:pink",
}  # fmt: skip


# -- reading ---------------------------------------------------------------------------------------
def of(result: dict, section: str, **tags: Any) -> list[dict]:
    return [r for r in result["rows"] if r["section"] == section and all(r.get(k) == v for k, v in tags.items())]


def spread(values: list[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation over the seeds; None where a run has no value."""
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else 0.0


def compare(result: dict, task: str) -> dict[str, dict[str, Any]]:
    """One entry a contestant with final runs: what it took to get to AdamW's final training loss, and the end."""
    metric = result["tasks"][task]["metric"]
    base = spread([r.get("final_loss") for r in of(result, "final", task=task, contestant=YARDSTICK)])
    target = None if base is None else base[0]
    out: dict[str, dict[str, Any]] = {}
    for name in CONTESTANTS:
        rows = of(result, "final", task=task, contestant=name)
        if not rows:
            continue
        points = len(rows[0].get("loss", [])) or 1
        at, seconds = reach(mean_curve(rows), target), mean_curve(rows, "seconds")
        single = [reach(mean_curve([r]), target) for r in rows]
        out[name] = {
            "rows": rows,
            "fraction": None if at is None else (at + 1) / points,
            "each": [None if k is None else (k + 1) / points for k in single],
            "reach_s": None if at is None or seconds is None else float(seconds[at]),
            "total_s": None if seconds is None else float(seconds[-1]),
            "loss": spread([r.get("final_loss") for r in rows]),
            "short": spread([r.get("final_loss") for r in of(result, "short", task=task, contestant=name)]),
            "test": spread([r["tests"][-1][metric] if r.get("tests") else None for r in rows]),
            "target": target,
        }
    return out


def best_of_ours(entries: dict[str, dict[str, Any]], only: str | None = None) -> str | None:
    """Our structure that needs the fewest steps; by the training loss where none, or several, get there."""
    mine = {k: e for k, e in entries.items() if k.startswith(OURS) and e["loss"] and only in (None, k)}
    return min(mine, key=lambda k: (mine[k]["fraction"] or math.inf, mine[k]["loss"][0]), default=None)


def best_short(entries: dict[str, dict[str, Any]], only: str | None = None) -> str | None:
    """Our structure with the least training loss after the shorter run."""
    mine = {k: e for k, e in entries.items() if k.startswith(OURS) and e["short"] and only in (None, k)}
    return min(mine, key=lambda k: mine[k]["short"][0], default=None)


# -- bars ------------------------------------------------------------------------------------------
def bars(result: dict) -> list[dict]:
    out: list[dict] = []

    def bar(claim: str, figure: float | None, limit: float, note: str, least: bool = False) -> None:
        met = None if figure is None else bool(figure >= limit if least else figure <= limit)
        out.append({"claim": claim, "figure": figure, "limit": limit, "met": met, "note": note})

    compared = {task: compare(result, task) for task in result["tasks"]}
    compared = {k: e for k, e in compared.items() if e.get(YARDSTICK, {}).get("loss")}
    for only in (None, "SINGD dense"):
        who = "SINGD, best structure of each task" if only is None else only
        chosen = {k: best_of_ours(e, only) for k, e in compared.items()}
        found = {k: compared[k][name] for k, name in chosen.items() if name is not None}
        if not found:
            continue
        count = sum((e["fraction"] or math.inf) <= STEPS_BAR for e in found.values())
        note = ", ".join(
            f"{k} {'never' if e['fraction'] is None else format(e['fraction'], '.0%')}"
            + (f" ({(chosen[k] or '').removeprefix('SINGD ')})" if only is None else "")
            for k, e in found.items()
        )
        bar(f"{who}: tasks where it is at AdamW's final training loss within 60 % of the steps", count, TASKS_BAR,
            note + (f"; {len(found)} tasks measured" if len(found) < 5 else ""), least=True)  # fmt: skip
        short = {k: best_short(e, only) for k, e in compared.items()}
        if any(name is not None for name in short.values()):
            ratio = {
                k: compared[k][name]["short"][0] / compared[k][name]["target"] for k, name in short.items() if name
            }
            note = "loss / AdamW's: " + ", ".join(f"{k} {v:.3g} ({(short[k] or '')[6:]})" for k, v in ratio.items())
            bar(f"{who}: tasks where a run of 60 % of the steps ends at the loss of AdamW's whole run or below",
                sum(v <= 1 for v in ratio.values()), TASKS_BAR, note, least=True)  # fmt: skip
        worse = {k: excess(e, compared[k][YARDSTICK]) for k, e in found.items() if e["test"]}
        if worse:
            note = ", ".join(f"{k} {v:+.1%} ± {error:.1%}" for k, (v, error) in worse.items())
            bar(f"{who}: test metric worse than AdamW's by at most 10 % on every task (largest; ± standard error)",
                max(v for v, _ in worse.values()), TEST_BAR, note)  # fmt: skip
    for name in CONTESTANTS:
        pairs = bf16_pairs(result, name)
        if name.startswith(OURS) and pairs:
            lost = [k for k, (low, _) in pairs.items() if low.get("final_loss") is None]
            steps = max(low["steps"] for low, _ in pairs.values())
            bar(f"{name} in bfloat16: {steps} steps, not finite on how many of {len(pairs)} tasks", len(lost), 0,
                ", ".join(lost))  # fmt: skip
            drops = {k: drop(result["tasks"][k], *pair) for k, pair in pairs.items()}
            known = {k: v for k, v in drops.items() if v is not None}
            if known:
                note = ", ".join(f"{k} {v:+.2%}" for k, v in known.items())
                bar(f"{name} in bfloat16: test metric worse than float32's by at most 2 % (largest)",
                    max(known.values()), BF16_BAR, note)  # fmt: skip
    return out


def excess(mine: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """By how much a test metric is worse, relative to AdamW's, and the standard error of that over the seeds."""
    variance = sum(e["test"][1] ** 2 / len(e["rows"]) for e in (mine, base))
    return mine["test"][0] / base["test"][0] - 1, math.sqrt(variance) / base["test"][0]


def bf16_pairs(result: dict, name: str) -> dict[str, tuple[dict, dict]]:
    """Runs (bfloat16, float32) of each task."""
    rows = {(r["task"], r["dtype"]): r for r in of(result, "bf16", contestant=name)}
    both = [t for t in result["tasks"] if (t, "bfloat16") in rows and (t, "float32") in rows]
    return {t: (rows[t, "bfloat16"], rows[t, "float32"]) for t in both}


def goodness(about: dict, row: dict) -> float | None:
    """What bfloat16 is judged by: the accuracy of a classifier, the metric itself elsewhere."""
    value = row["tests"][-1][about["metric"]] if row.get("tests") else None
    return None if value is None or row.get("final_loss") is None else 1 - value if about["accuracy"] else value


def drop(about: dict, low: dict, full: dict) -> float | None:
    """By how much bfloat16 is worse, relative to float32; negative where it is better."""
    a, b = goodness(about, low), goodness(about, full)
    return None if a is None or b is None else (b - a if about["accuracy"] else a - b) / b


# -- tables ----------------------------------------------------------------------------------------
def table(head: str, rows: list[str]) -> list[str]:
    return ["| " + head + " |", "|" + "---|" * (head.count("|") + 1), *(f"| {r} |" for r in rows), ""]


def number(value: float | None, form: str = ".4g") -> str:
    return "—" if value is None else format(value, form)


def pair(value: tuple[float, float] | None, form: str = ".4g") -> str:
    return "—" if value is None else f"{value[0]:{form}} ± {value[1]:.1g}"


def named(chosen: dict) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in chosen.items())


def markdown(result: dict) -> str:
    env, asked = result["environment"], result["settings"]
    result["bars"] = bars(result)
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    load = f"load average {env['load_average'][0]:.1f} before, {env.get('load_average_end', [math.nan])[0]:.1f} after"
    lines = [
        "# Training to a target",
        "",
        f"{env['cpu']}, {env['jobs']} runs at a time of one thread each, {env['date']}; {versions}; {load}; "
        f"{len(result['rows'])} runs in {result['seconds'] / 60:.0f} minutes.",
        "",
        f"Everybody: {asked['trials']} settings from the ranges below, at the same points of the unit cube (one in "
        f"each layer of every axis), one seed; the best by final training loss runs again with {asked['seeds']} "
        "fresh seeds. Learning rates decay as a cosine to zero. Training loss: mean over batches of the last "
        "tenth of the steps up to a point. Target: AdamW's at the end, mean over its seeds; it is reached where "
        "the curve averaged over the seeds is there. After 60 %: runs of their own, with a schedule that ends "
        "there. Seconds are of training steps alone. ±: standard deviation over the seeds.",
        "",
    ]
    rows = []
    for b in result["bars"]:
        verdict = "not measured" if b["met"] is None else "yes" if b["met"] else "**no**"
        rows.append(f"{b['claim']} | {number(b['figure'], '.3g')} | {b['limit']:g} | {verdict} | {b['note']}")
    lines += table("bar | figure | limit | met | remark", rows)
    lines += [
        "Test metric: the error rate of classifiers (differences relative to AdamW's error rate), loss per character, "
        "squared error of an image. bfloat16 is judged by the classifiers' accuracy instead of their error rate.",
        "",
    ]
    for task in result["tasks"]:
        lines += task_table(result, task)
    lines += bf16_table(result) + ablation_tables(result)
    lines += ["## Ranges of the search (log-uniform)", ""]
    head = "optimizer | " + " | ".join(("lr", "weight_decay", "damping", "lr_cov"))
    cells = {k: [" … ".join(f"{x:g}" for x in v.get(n, ())) or "—" for n in head.split(" | ")[1:]]
             for k, v in result["ranges"].items()}  # fmt: skip
    return "\n".join(lines + table(head, [f"{k} | {' | '.join(c)}" for k, c in cells.items()]))


def task_table(result: dict, task: str) -> list[str]:
    about, entries = result["tasks"][task], compare(result, task)
    tried = dict.fromkeys(r["contestant"] for r in of(result, "search", task=task))
    rows = []
    for name in [n for n in CONTESTANTS if n in entries or n in tried]:
        trials = of(result, "search", task=task, contestant=name)
        bad = sum(score(r) == math.inf for r in trials)
        errors = {r["error"] for r in trials if "error" in r}
        lost = f"{bad} of {len(trials)}" + "".join(f"; {' '.join(e.split())[:150]}" for e in errors).replace("|", "/")
        e = entries.get(name)
        if e is None:
            rows.append(f"{name} |" + " — |" * 11 + f" {lost}")
            continue
        times = [[r[k] for r in e["rows"] if k in r] for k in ("mean_step_s", "mean_step_cpu_s")]
        wall, cpu = (number(float(np.mean(t)) * 1e3 if t else None, ".2f") for t in times)
        each = ", ".join("never" if v is None else f"{v:.0%}" for v in e["each"])
        state = max((r.get("state_bytes", 0) for r in e["rows"]), default=0) / MIB
        cache = max((r.get("cache_bytes", 0) for r in e["rows"]), default=0) / MIB
        rows.append(
            f"{name} | {named(e['rows'][0]['settings'])} | {number(e['fraction'], '.0%')} ({each}) "
            f"| {number(e['reach_s'], '.2f')} | {number(e['total_s'], '.2f')} | {pair(e['loss'])} | {pair(e['short'])} "
            f"| {pair(e['test'])} | {wall} | {cpu} | {state:.2f} | {cache:.2f} | {lost}"
        )
    if not rows:
        return []
    head = "optimizer | settings | steps to AdamW's loss (each seed) | s to it | s in all | training loss"
    head += f" | after 60 % of the steps | {about['label']} | ms a step | CPU ms | state MiB | caches MiB | trials lost"
    return [f"## {about['title']}: {about['steps']} steps", "", *table(head, rows)]


def bf16_table(result: dict) -> list[str]:
    rows = []
    for name in CONTESTANTS:
        for task, (low, full) in bf16_pairs(result, name).items():
            about = result["tasks"][task]
            end = "no" if low.get("lost_at") is None else f"step {low['lost_at']}"
            end = f"cut at {low['cut_at']}" if "cut_at" in low else low.get("error", end)[:150]
            worse = drop(about, low, full)
            rows.append(
                f"{name} | {task} | {low['steps']} | {end} | {number(full.get('final_loss'))} "
                f"| {number(low.get('final_loss'))} | {number(goodness(about, full))} | {number(goodness(about, low))} "
                f"| {number(worse, '+.2%')} | {number(full.get('state_bytes', 0) / MIB, '.2f')} "
                f"| {number(low.get('state_bytes', 0) / MIB, '.2f')}"
            )
    head = "optimizer | task | steps | lost | training loss, float32 | bfloat16 | accuracy or metric, float32"
    head += " | bfloat16 | worse by | state MiB, float32 | bfloat16"
    remark = "Model, factors and momentum in bfloat16, tuned settings of float32; losses are computed in float32. "
    remark += "gcn: the 256 most frequent words only, in both dtypes."
    return ["## bfloat16", "", remark, "", *table(head, rows)] if rows else []


def ablation_tables(result: dict) -> list[str]:
    lines: list[str] = []
    for task in result["tasks"]:
        found, metric = of(result, "ablation", task=task), result["tasks"][task]["metric"]
        for group in dict.fromkeys(r["group"] for r in found):
            rows = []
            runs = [r for r in found if r["group"] == group]
            for label in dict.fromkeys(r["variant"] for r in runs):
                rates = dict.fromkeys(r["settings"].get("lr_times", 1.0) for r in runs if r["variant"] == label)
                sets = [[r for r in runs if (r["variant"], r["settings"].get("lr_times", 1.0)) == (label, f)]
                        for f in rates]  # fmt: skip
                best = min(sets, key=lambda rows: float(np.mean([score(r) for r in rows])))
                ends = ", ".join(number((spread([r.get("final_loss") for r in s]) or (None,))[0]) for s in sets)
                test = spread([r["tests"][-1][metric] if r.get("tests") else None for r in best])
                times = [r["mean_step_s"] for r in best if "mean_step_s" in r]
                lost = sum(score(r) == math.inf for r in best)
                rows.append(
                    f"{label} | {pair(spread([r.get('final_loss') for r in best]))} | {ends} | {pair(test)} "
                    f"| {number(float(np.mean(times)) * 1e3 if times else None, '.2f')} "
                    f"| {best[0].get('state_bytes', 0) / MIB:.2f} | {lost} of {len(best)}"
                )
            several = "at lr ÷ 3, lr, 3 lr" if group == "structures" else "at lr"
            head = f"variant | training loss, best lr | {several} | {result['tasks'][task]['label']} | ms a step"
            lines += [f"## Ablation, {task}: {group}", "", *table(head + " | state MiB | lost", rows)]
    return lines


# -- figures ---------------------------------------------------------------------------------------
def figures(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    compared = {task: compare(result, task) for task in result["tasks"]}
    compared = {k: e for k, e in compared.items() if any(mean_curve(c["rows"]) is not None for c in e.values())}
    for task, entries in compared.items():
        task_figure(result["tasks"][task], entries, path.with_name(f"{path.stem}-{task}.png"))
    if compared:
        summary_figure(compared, path.with_suffix(".png"))


def task_figure(about: dict, entries: dict[str, dict[str, Any]], path: Path) -> None:
    """Smoothed training loss (mean and range over the seeds) against steps, seconds and at the end; test metric."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(13, 9.5))
    (by_steps, by_seconds), (tail, test) = axes
    ends = []
    for name, e in entries.items():
        if (curve := mean_curve(e["rows"])) is None:
            continue
        w = window(len(curve))
        runs = np.array([smooth(np.asarray(r["loss"]))[w - 1 :] for r in e["rows"]])
        mean, low, high = runs.mean(0), runs.min(0), runs.max(0)
        steps = (np.arange(len(curve))[w - 1 :] + 1) * about["steps"] / len(curve)
        seconds = np.mean([r["seconds"] for r in e["rows"]], 0)[w - 1 :]
        for ax, x in ((by_steps, steps), (by_seconds, seconds), (tail, steps)):
            ax.plot(x, mean, color=COLOURS[name], label=name, linewidth=1.4)
            ax.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        ends.append(mean[len(mean) // 2 :])
        at = [t["step"] for t in e["rows"][0]["tests"]]
        values = [[t[about["metric"]] for t in r["tests"]] for r in e["rows"]]
        test.plot(at, np.mean(np.array(values, dtype=float), 0), color=COLOURS[name], marker=".", label=name)
    target = entries.get(YARDSTICK, {}).get("target")
    for ax in (by_steps, by_seconds, tail):
        if target is not None:
            ax.axhline(target, color="black", linestyle=":", linewidth=1)
        ax.set(yscale="log", ylabel="training loss, mean over a tenth of the run")
    by_steps.set(xlabel="steps", title="against steps (dotted: where AdamW ends)")
    by_seconds.set(xlabel="seconds of training, one thread", xscale="log", title="against seconds")
    everything = np.concatenate(ends)
    low, high = float(everything.min()), float(np.quantile(everything, 0.9))
    tail.set(xlabel="steps", title="second half", xlim=(about["steps"] / 2, about["steps"]),
             ylim=(low * 0.98, max(high, (target or high)) * 1.02))  # fmt: skip
    test.set(xlabel="steps", ylabel=about["label"], yscale="log", title="test")
    for ax in axes.flat:
        ax.grid(alpha=0.3, which="both")
    by_steps.legend(fontsize=8)
    fig.suptitle(about["title"])
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def summary_figure(compared: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Steps and seconds to AdamW's final training loss relative to AdamW's run, and the optimizers' state."""
    import matplotlib.pyplot as plt

    names = [n for n in CONTESTANTS if any(n in e for e in compared.values())]
    width = 0.85 / len(names)
    fig, axes = plt.subplots(1, 3, figsize=(17, 5.2))
    for i, name in enumerate(names):
        for j, entries in enumerate(compared.values()):
            if name not in entries:
                continue
            e, base = entries[name], entries.get(YARDSTICK, {}).get("total_s")
            seconds = None if e["reach_s"] is None or not base else e["reach_s"] / base
            state = max((r.get("state_bytes", 0) for r in e["rows"]), default=0) / MIB
            at = j + (i - (len(names) - 1) / 2) * width
            for ax, value in zip(axes, (e["fraction"], seconds, state)):
                if value is None:
                    ax.text(at, 0.01, "×", transform=ax.get_xaxis_transform(), ha="center", color=COLOURS[name])
                else:
                    ax.bar(at, value, width, color=COLOURS[name], label=name if j == 0 else None)
    titles = ("steps to AdamW's final training loss, share of its steps (×: never)",
              "seconds to it, relative to AdamW's run (×: never)", "optimizer state, MiB")  # fmt: skip
    for ax, title in zip(axes, titles):
        ax.set_xticks(range(len(compared)), list(compared))
        ax.set_xlim(-0.5, len(compared) - 0.5)
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3, axis="y")
    axes[0].axhline(STEPS_BAR, color="0.3", linestyle="--", linewidth=1)
    axes[1].axhline(1.0, color="0.3", linestyle=":", linewidth=1)
    axes[1].set(yscale="log", ylim=(0.1, None))
    axes[2].set_yscale("log")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[n]) for n in names]
    fig.legend(handles, names, fontsize=9, ncols=len(names), loc="lower center")
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    fig.savefig(path, dpi=130)
    plt.close(fig)
