"""From a table to a regression problem: target and features, a split that does not leak, standardised numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from .failure import CommandError
from .table import Table

MIN_ROWS = 10


@dataclass(frozen=True)
class Columns:
    """Which column of a table plays which part; a saved model remembers it, and reads the next table by it.

    Attributes:
        header: whether ``names`` come from the file; without a header they are positions.
        names: all columns of the file that was fitted, in order.
        target: the name of the column to predict.
        features: names of the inputs.
        constant: names of inputs left out because they do not vary.
        dropped: names left out by request.
    """

    header: bool
    names: list[str]
    target: str
    features: list[str]
    constant: list[str]
    dropped: list[str]

    def to_json(self) -> dict[str, object]:
        """As plain data; ``Columns(**data)`` is the way back."""
        return asdict(self)

    def inputs(self, table: Table) -> np.ndarray:
        """The features of another table, (rows, features); it may lack the target and whatever was left out."""
        table = self._renamed(table)
        present = set(table.names)
        lacking = [name for name in self.features if name not in present]
        if lacking:
            raise CommandError(f"{table.path}: lacks {_columns(lacking)}, which the model was fitted on")
        unknown = [name for name in table.names if name not in self.names]
        if unknown:
            raise CommandError(f"{table.path}: has {_columns(unknown)}, which the model does not know; remove it")
        return table.numbers(self.features)

    def outputs(self, table: Table) -> np.ndarray | None:
        """The target of another table where it is there and complete, else None."""
        table = self._renamed(table)
        if self.target not in table.names:
            return None
        try:
            return table.numbers([self.target])[:, 0]
        except CommandError:
            return None

    def _renamed(self, table: Table) -> Table:
        """A table without a header gets the names of the positions that its width allows."""
        if table.header != self.header:
            have, want = ("a header", "none") if table.header else ("no header", "one")
            raise CommandError(
                f"{table.path}: has {have}, the table that the model was fitted on had {want}; "
                f"columns cannot be matched (--header says how to read the first row)"
            )
        if self.header:
            return table
        without = [name for name in self.names if name != self.target]
        for names in (self.names, without):
            if len(table.names) == len(names):
                return Table(table.path, table.header, table.frame.set_axis(names, axis=1))
        raise CommandError(
            f"{table.path}: has {len(table.names)} columns, expected {len(self.names)}, or {len(without)} "
            f"without the target (column {self.target} of the table that the model was fitted on)"
        )


@dataclass(frozen=True)
class Problem:
    """A regression problem in the units of the file: inputs (n, d), targets (n,), and the rows on each side."""

    columns: Columns
    X: np.ndarray
    y: np.ndarray
    train: np.ndarray
    test: np.ndarray
    repeated: int  # rows whose inputs equal those of an earlier row


def make_problem(table: Table, target: str, drop: list[str], test_fraction: float, seed: int) -> Problem:
    """Choose columns, check them, and split the rows: rows with equal inputs stay on the same side.

    Raises:
        CommandError: too few rows, a target that is absent or constant, no input that varies.
    """
    names = table.names
    at = table.position(target, "--target")
    target = names[at]
    dropped = [names[table.position(name, "--drop")] for name in drop]
    if target in dropped:
        raise CommandError(f"{table.path}: {table.describe(target)} is both --target and --drop")
    features = [name for name in names if name != target and name not in dropped]
    if not features:
        raise CommandError(f"{table.path}: nothing but the target is left; at least one input column is needed")
    if len(table) < MIN_ROWS:
        raise CommandError(f"{table.path}: has {len(table)} rows of data; at least {MIN_ROWS} are needed")
    X, y = table.numbers(features), table.numbers([target])[:, 0]
    train, test, repeated = split(X, test_fraction, seed)
    if len(train) < 2 or len(test) < 1:
        raise CommandError(
            f"{table.path}: cannot be split: {len(table)} rows, {repeated} of which repeat the inputs of another, "
            "and equal inputs stay on one side"
        )
    if y[train].min() == y[train].max():
        raise CommandError(f"{table.path}: the target ({table.describe(target)}) is constant: nothing to learn")
    varies = X[train].min(axis=0) < X[train].max(axis=0)
    constant = [name for name, keep in zip(features, varies) if not keep]
    if not varies.any():
        raise CommandError(f"{table.path}: no input column varies: nothing to learn from")
    features = [name for name, keep in zip(features, varies) if keep]
    columns = Columns(table.header, names, target, features, constant, dropped)
    return Problem(columns, X[:, varies], y, train, test, repeated)


def split(X: np.ndarray, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows to train and to test on, sorted, and how many rows repeat the inputs of an earlier one.

    Groups of equal inputs are shuffled, not rows, so that no test row is a training row again.
    """
    _, group = np.unique(X + 0.0, axis=0, return_inverse=True)  # + 0.0: minus zero equals zero
    group = group.reshape(-1)
    groups = int(group.max()) + 1
    order = np.random.default_rng(seed).permutation(groups)
    rank = np.empty(groups, dtype=np.int64)
    rank[order] = np.arange(groups)
    sizes = np.bincount(group, minlength=groups)[order]
    wanted = round(len(X) * (1 - test_fraction))
    cut = int(np.searchsorted(np.cumsum(sizes), wanted, side="left")) + 1  # the first `cut` groups hold that many rows
    cut = max(1, min(cut, groups - 1))
    trains = rank[group] < cut
    return np.flatnonzero(trains), np.flatnonzero(~trains), len(X) - groups


@dataclass(frozen=True)
class Scaling:
    """Shift and scale to zero mean and unit variance: inputs per column, and the target."""

    x_mean: np.ndarray
    x_scale: np.ndarray
    y_mean: float
    y_scale: float

    @classmethod
    def of(cls, X: np.ndarray, y: np.ndarray) -> Scaling:
        """From the training rows."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaling = cls(X.mean(axis=0), X.std(axis=0), float(y.mean()), float(y.std()))
            usable = np.isfinite(scaling.x_scale) & (scaling.x_scale > 0)
        if not (usable.all() and np.isfinite(scaling.y_scale) and scaling.y_scale > 0):
            raise CommandError("the numbers are too large or too small to standardise in float64; rescale the table")
        return scaling

    def inputs(self, X: np.ndarray) -> np.ndarray:
        """Inputs as the model sees them."""
        return (X - self.x_mean) / self.x_scale

    def targets(self, y: np.ndarray) -> np.ndarray:
        """Targets as the model sees them."""
        return (y - self.y_mean) / self.y_scale

    def outputs(self, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The model's predictions in the units of the data."""
        return mean * self.y_scale + self.y_mean, std * self.y_scale


def _columns(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"column{'s' if len(names) > 1 else ''} {shown}"
