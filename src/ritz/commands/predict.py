"""``ritz gp predict``: mean and standard deviation of the target for every row of a table."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from . import model, scores
from .console import Console
from .failure import optional
from .output import check_file, write_file
from .store import load, to_json
from .table import read_table


@dataclass(frozen=True)
class PredictOptions:
    """Which model, which table, and where the predictions go (None: standard output)."""

    model: Path
    data: Path
    out: Path | None = None
    header: bool | None = None
    force: bool = False
    as_json: bool = False


def run_predict(options: PredictOptions) -> None:
    """Write a csv with the columns ``mean`` and ``std``, one row for each row of the table, in its order.

    Both are in the units of the target; the standard deviation is that of a new observation, noise included.
    """
    pandas = optional("pandas", "reading tables")
    if options.out is not None:
        check_file(options.out, options.force)
    saved = load(options.model)
    table = read_table(options.data, options.header)
    inputs, targets = saved.columns.inputs(table), saved.columns.outputs(table)
    X = saved.spec.tensor(saved.scaling.inputs(inputs))
    mean, std = saved.scaling.outputs(*model.predict(saved.gp, saved.X, saved.y, X))
    scored = scores.score(targets, mean, std) if targets is not None else None
    text = io.StringIO()
    pandas.DataFrame({"mean": mean, "std": std}).to_csv(text, index=False)
    console = Console(quiet=options.as_json or options.out is None)
    if options.out is not None:
        write_file(options.out, text.getvalue(), options.force)
        console.fact("wrote", f"{options.out}: mean and std of {len(table)} rows")
    if scored is not None:
        console.fact(
            "scores",
            f"against {table.describe(saved.columns.target)}: RMSE {scored['rmse']:.5g}, NLL {scored['nll']:.4f}",
        )
    if options.as_json:
        where = {"out": str(options.out)} if options.out is not None else {"mean": mean.tolist(), "std": std.tolist()}
        print(to_json({"rows": len(table), "scores": scored, **where}))
    elif options.out is None:
        sys.stdout.write(text.getvalue())
