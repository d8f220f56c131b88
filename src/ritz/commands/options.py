"""The options of each sub-command, and how they become the arguments of what runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .recipe import KERNELS, Recipe

_HEADER = {"auto": None, "yes": True, "no": False}
_DEFAULT = Recipe()


def add_fit(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ritz gp fit``."""
    parser = commands.add_parser(
        "fit",
        parents=[common],
        usage="ritz gp fit DATA.csv --target COLUMN --out DIR [options]",
        help="fit a table, score on held-out rows, save",
        description=(
            "Fit an exact Gaussian process to a table, score it on held-out rows, and save model and figure.\n\n"
            "Hyper-parameters are fitted twice: on a random subset, by Cholesky and L-BFGS, which is quick and\n"
            "finds the region; then on all training rows, by Krylov methods and L-BFGS, from there."
        ),
        epilog=(
            "DIR receives model.safetensors and model.json (for `ritz gp predict`), metrics.json (scores, coverage,\n"
            "training history) and figure.png. It appears when everything is done, or not at all.\n\n"
            "example: ritz gp fit houses.csv.gz --target price --drop id --out houses-gp --budget 60"
        ),
    )
    parser.add_argument(
        "data", metavar="DATA.csv", type=Path, help="*.csv or *.csv.gz, UTF-8, numbers, one row a sample"
    )
    required = parser.add_argument_group("required")
    required.add_argument(
        "--target", metavar="COLUMN", required=True, help="what to predict: a name, or a position (0 first, -1 last)"
    )
    required.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory for the results")
    table = parser.add_argument_group("the table")
    _add_header(table)
    table.add_argument(
        "--drop", metavar="COLUMN", action="append", default=[], help="leave a column out; may be given more than once"
    )
    table.add_argument(
        "--test-fraction", metavar="F", type=_fraction, default=0.2, help="share of rows held out (default 0.2)"
    )
    table.add_argument("--seed", metavar="N", type=_count, default=0, help="split, subset and probes (default 0)")
    table.add_argument("--force", action="store_true", help="replace the results in DIR; other files there are kept")
    add_model(parser)
    parser.set_defaults(run=_fit)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that make a :class:`Recipe`."""
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--kernel",
        choices=list(KERNELS),
        default=_DEFAULT.kernel,
        help=f"default {_DEFAULT.kernel}; smoother to the right",
    )
    model.add_argument(
        "--no-ard", dest="ard", action="store_false", help="one length-scale for all inputs, not one each"
    )
    model.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default=None,
        help="default: float64 up to 5000 training rows, float32 above",
    )
    first = parser.add_argument_group("first phase, on a subset")
    first.add_argument(
        "--subset", metavar="N", type=_positive, default=_DEFAULT.subset, help=f"its size (default {_DEFAULT.subset})"
    )
    first.add_argument("--no-subset", dest="subset", action="store_const", const=0, help="leave this phase out")
    first.add_argument(
        "--subset-steps", metavar="N", type=_positive, default=_DEFAULT.subset_steps,
        help=f"at most this many steps of L-BFGS (default {_DEFAULT.subset_steps})",
    )  # fmt: skip
    second = parser.add_argument_group("second phase, on all training rows")
    second.add_argument(
        "--steps", metavar="N", type=_count, default=_DEFAULT.steps,
        help=f"at most this many steps of L-BFGS, 0 for none (default {_DEFAULT.steps})",
    )  # fmt: skip
    second.add_argument(
        "--lr", metavar="X", type=_number, default=_DEFAULT.lr, help="use Adam instead, with this step size (0.05, say)"
    )
    second.add_argument(
        "--probes", metavar="N", type=_positive, default=_DEFAULT.probes,
        help=f"random probes of the log-determinant (default {_DEFAULT.probes})",
    )  # fmt: skip
    second.add_argument(
        "--depth",
        metavar="N",
        type=_positive,
        default=_DEFAULT.depth,
        help="Lanczos depth for each probe (default: as deep as a relative error of 1e-2 needs)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="SECONDS", type=_number, default=None,
        help="train so that everything is done after about this long (default: no limit)",
    )  # fmt: skip


def add_predict(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ritz gp predict``."""
    parser = commands.add_parser(
        "predict",
        parents=[common],
        help="predict the target for every row of a table",
        description=(
            "Predict mean and standard deviation of the target for every row of a table, in the target's units.\n"
            "The standard deviation is that of a new observation: it includes the noise.\n\n"
            "The columns must be those that were fitted, by name where there is a header, else by position. The\n"
            "target may be among them: then the predictions are scored against it."
        ),
        epilog="example: ritz gp predict houses-gp new.csv --out predictions.csv",
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="directory that `ritz gp fit` wrote")
    parser.add_argument("data", metavar="NEW.csv", type=Path, help="*.csv or *.csv.gz")
    parser.add_argument("--out", metavar="FILE", type=Path, help="csv to write (default: standard output)")
    _add_header(parser)
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=_predict)


def add_demo(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ritz demo``."""
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="fit the shipped elevators set, 16599 rows, in two minutes",
        description=(
            "Fit an exact Gaussian process to the shipped elevators set (16599 rows, 18 inputs) and compare it, on\n"
            "held-out rows, with a constant and with an exact GP on a subset of 1000 rows. Two minutes on two cores."
        ),
        epilog="May be run again: it replaces its own results.",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("ritz-demo"), help="results (default ./ritz-demo)"
    )
    parser.add_argument(
        "--small", action="store_true", help="1500 rows and a few steps: seconds, for checking an installation"
    )
    parser.add_argument(
        "--budget", metavar="SECONDS", type=_number, default=120.0, help="for everything together (default 120)"
    )
    parser.add_argument("--seed", metavar="N", type=_count, default=0, help="split, subset and probes (default 0)")
    parser.set_defaults(run=_demo)


def add_bench(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ritz bench``."""
    parser = commands.add_parser(
        "bench",
        help="run a benchmark of the source checkout",
        description="Run benchmarks/NAME.py of the source checkout; what follows NAME is passed on to it.",
        epilog="example: ritz bench gradients",
    )
    parser.add_argument("name", metavar="NAME", help="benchmark, without .py")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the benchmark")
    parser.set_defaults(run=_bench)


def add_info(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ritz info``."""
    parser = commands.add_parser(
        "info",
        parents=[common],
        help="versions, devices, back ends, threads",
        description="Say what is installed, which devices and kernel back ends were found, and how many threads run.",
    )
    parser.set_defaults(run=_info)


def _add_header(group: Any) -> None:
    group.add_argument(
        "--header", choices=list(_HEADER), default="auto",
        help="does the first row hold names? auto (the default): it does if nothing in it is a number",
    )  # fmt: skip


def _recipe(given: argparse.Namespace) -> Recipe:
    return Recipe(**{name: getattr(given, name) for name in Recipe.__dataclass_fields__})


def _fit(given: argparse.Namespace) -> None:
    from .fit import FitOptions, run_fit

    run_fit(
        FitOptions(
            data=given.data,
            out=given.out,
            target=given.target,
            header=_HEADER[given.header],
            drop=given.drop,
            force=given.force,
            as_json=given.json,
            test_fraction=given.test_fraction,
            seed=given.seed,
            recipe=_recipe(given),
        )  # fmt: skip
    )


def _predict(given: argparse.Namespace) -> None:
    from .predict import PredictOptions, run_predict

    run_predict(PredictOptions(given.model, given.data, given.out, _HEADER[given.header], given.force, given.json))


def _demo(given: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(given.out, given.small, given.budget, given.seed, given.json)


def _bench(given: argparse.Namespace) -> int:
    from .info import run_bench

    return run_bench(given.name, given.arguments)


def _info(given: argparse.Namespace) -> None:
    from .info import run_info

    run_info(given.json)


def _checked(convert: Callable[[str], Any], allowed: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
        return value

    return check


_positive = _checked(int, lambda n: n >= 1, "a whole number from 1")
_count = _checked(int, lambda n: n >= 0, "a whole number from 0")
_number = _checked(float, lambda x: x > 0 and math.isfinite(x), "a number above 0")
_fraction = _checked(float, lambda x: 0 < x < 1, "a number between 0 and 1")
