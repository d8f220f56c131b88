"""Tables and work–precision plots of `pde.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TARGET = 1e-4
HAND_WRITTEN = ("taylor", "chebyshev")  # compiled schemes written for the problem, no package
ORDER_5, ORDER_8 = ("dopri5", "tsit5"), ("dopri8",)


def good(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if "ms" in row]


def by_hand(row: dict[str, Any]) -> bool:
    return any(word in row["setting"]["method"].lower() for word in HAND_WRITTEN)


def compiled(record: dict[str, Any], row: dict[str, Any]) -> bool:
    return record["contestant"] == "diffrax" and "ms" in row and by_hand(row)


def products(row: dict[str, Any]) -> str:
    if row.get("forward") is None:
        return "–"
    unit = "" if "product" in row.get("counted", "") else f" {row['counted']}"
    return f"{row['forward']} + {row['backward']}{unit}"


def groups(result: dict[str, Any]) -> dict[tuple, list[dict[str, Any]]]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for r in result["records"]:
        if r["target"] == TARGET:
            found.setdefault((r["problem"], r["N"], r["scale"], r["dtype"]), []).append(r)
    return found


def fewest_products(packages: list[tuple[dict[str, Any], str]], words: tuple[str, ...]) -> int | None:
    """Of the packages' methods whose names have one of the words."""
    found = [
        p["forward"] + p["backward"]
        for p, _ in packages
        if p.get("forward") is not None and any(w in p["setting"]["method"].lower() for w in words)
    ]
    return min(found, default=None)


def ratios(records: list[dict[str, Any]]) -> list[str]:
    """What the bars ask for: times against the best package, products against order 5, memory against backprop."""
    ours = [row for r in records if r["contestant"] == "ritz" for row in good(r)]
    packages = [
        (row, r["contestant"])
        for r in records
        if r["contestant"] in ("torchdiffeq", "diffrax")
        for row in good(r)
        if not by_hand(row)
    ]
    direct = [row for r in records if r["contestant"] == "direct" for row in good(r)]
    lines = []
    for row in ours:
        text = f"{row['setting']['method']}: {row['ms']:.2f} ms"
        if packages:
            best, who = min(packages, key=lambda pair: pair[0]["ms"])
            text += f"; {best['ms'] / row['ms']:.2f} times as fast as the best package ({who}, {best['label']})"
        for words, order in ((ORDER_5, 5), (ORDER_8, 8)):
            fewest = fewest_products(packages, words)
            if fewest and "product" in row["counted"]:
                text += f"; {fewest / (row['forward'] + row['backward']):.2f} times fewer products than order {order}"
        for other in sorted(direct, key=lambda d: d["ms"]):
            text += f"; {other['ms'] / row['ms']:.2f} times as fast as {other['label']} with direct solves"
        peer = [p["peak_bytes"] for p, w in packages if w == "torchdiffeq" and "peak_bytes" in p]
        if peer and row.get("peak_bytes"):
            text += f"; memory {row['peak_bytes'] / max(peer[0], 1):.2f} of torchdiffeq's by backprop"
        lines.append(text)
    return lines


def markdown(result: dict[str, Any]) -> str:
    env = result["environment"]
    names = ("ritz", "torch", "torchdiffeq", "jax", "diffrax", "scipy")
    versions = ", ".join(f"{n} {env['versions'].get(n)}" for n in names)
    out = [
        f"# Value and gradient through linear PDEs, {env['date']}",
        "",
        f"{env['cpu']}, one thread; {versions}. Cheapest settings whose u(t) and gradient are both within 1e-4 of the "
        "reference (relative 2-norm); medians. Products: forward + those of the gradient.",
    ]
    for (name, N, scale, dtype), records in groups(result).items():
        how = next((r["reference"] for r in records if r.get("reference")), "")
        kind = "t·ρ" if name.startswith("wave") else "‖tA‖"
        out += ["", f"## {name} {N} × {N}, {kind} = {scale:g}, {dtype}", "", f"Reference: {how}.", ""]
        out += [
            "| contestant | setting | ms | products | error of u | of the gradient | peak MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in records:
            for row in r["rows"]:
                who = f"{r['contestant']}{' (hand-written in JAX)' if compiled(r, row) else ''}"
                if r["contestant"] == "direct":
                    who = "hand-written, direct solves"
                if "failed" in row:
                    out.append(f"| {who} | {row['label']} | – | – | – | – | {row['failed']} |")
                    continue
                peak = f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else "–"
                out.append(
                    f"| {who} | {row['label']} | {row['ms']:.2f} | {products(row)} | {row['errors'][0]:.1e} "
                    f"| {row['errors'][1]:.1e} | {peak} |"
                )
        out += [""] + [f"- {line}" for line in ratios(records)]
    return "\n".join(out) + "\n"


def figures(result: dict[str, Any], path: Path) -> None:
    """Work–precision in time and in products, where other targets were asked for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    several = {(r["problem"], r["N"], r["scale"], r["dtype"]) for r in result["records"] if r["target"] != TARGET}
    for name, N, scale, dtype in sorted(several):
        curves: dict[str, list[tuple[float, float, float | None]]] = {}
        for r in result["records"]:
            if (r["problem"], r["N"], r["scale"], r["dtype"]) != (name, N, scale, dtype):
                continue
            for row in good(r):
                who = f"{r['contestant']}: {row['setting']['method']}, {row['setting']['gradient']}"
                if r["contestant"] in ("torchdiffeq", "diffrax") and not by_hand(row):
                    who += ", adaptive" if row["setting"]["steps"] is None else ", equal steps"
                count = None if row.get("forward") is None else row["forward"] + row["backward"]
                curves.setdefault(who, []).append((max(row["errors"]), row["ms"], count))
        figure, axes = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
        for i, (who, points) in enumerate(sorted(curves.items())):
            points.sort()
            style = {
                "marker": "o" if who.startswith("ritz") else "x",
                "linewidth": 2.2 if who.startswith("ritz") else 0.9,
            }
            style |= {"color": plt.get_cmap("tab20")(i % 20), "label": who}
            axes[0].loglog([e for e, _, _ in points], [ms for _, ms, _ in points], **style)
            counted = [(e, c) for e, _, c in points if c]
            if counted:
                axes[1].loglog(*zip(*counted, strict=True), **style)
        for axis, label in zip(axes, ("ms, value and gradient", "products, gradient included"), strict=True):
            axis.set(xlabel="larger relative error of u(t) and gradient", ylabel=label)
            axis.grid(True, which="both", alpha=0.2)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
        figure.suptitle(f"{name} {N} × {N}, {'t·ρ' if name.startswith('wave') else '‖tA‖'} = {scale:g}, {dtype}")
        figure.savefig(path.with_name(f"{path.stem}-{name}.png"), dpi=130)
        plt.close(figure)
