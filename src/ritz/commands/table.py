"""Reading a table of numbers: csv or csv.gz, with or without a header; every defect is one sentence."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .failure import CommandError, one_line, optional, reason

if TYPE_CHECKING:
    import pandas

_MISSING = {"", "na", "n/a", "nan", "null", "none", "<na>", "#n/a"}


@dataclass(frozen=True)
class Table:
    """A file as read: named columns of equal length, not yet known to be numbers.

    Attributes:
        path: where it came from; only used in messages.
        header: whether the first row held names; without, column i is called ``str(i)``.
        frame: the rows.
    """

    path: Path
    header: bool
    frame: pandas.DataFrame

    @property
    def names(self) -> list[str]:
        """Column names, in the order of the file."""
        return list(self.frame.columns)

    def __len__(self) -> int:
        return len(self.frame)

    def describe(self, name: str) -> str:
        """A column as it is called in messages: ``'height'``, or ``column 3`` (counted from 0) without a header."""
        return f"column {name!r}" if self.header else f"column {name}"

    def position(self, wanted: str, option: str) -> int:
        """The column that ``wanted`` names, or whose position it is: 0 is the first column, -1 the last."""
        names = self.names
        if self.header and wanted in names:
            return names.index(wanted)
        try:
            position = int(wanted)
        except ValueError:
            what = (
                f"the columns are {_listed(names)}"
                if self.header
                else "it has no header, so give a position such as -1"
            )
            raise CommandError(f"{self.path}: there is no column {wanted!r} for {option}; {what}") from None
        if not -len(names) <= position < len(names):
            raise CommandError(
                f"{self.path}: {option} {position} is out of range; the file has {len(names)} columns, "
                f"so positions go from {-len(names)} to {len(names) - 1}"
            )
        return position % len(names)

    def numbers(self, names: list[str]) -> np.ndarray:
        """The columns as finite float64, shape (rows, columns); text, NaN or Inf is an error that names the place."""
        columns = [self._column(name) for name in names]
        return np.stack(columns, axis=1) if columns else np.empty((len(self), 0))

    def _column(self, name: str) -> np.ndarray:
        pandas = optional("pandas", "reading tables")
        column = self.frame[name]
        try:
            values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        except (ValueError, TypeError, OverflowError):
            bad = pandas.to_numeric(column, errors="coerce").isna() & column.notna()
            row = int(bad.to_numpy().argmax())
            raise CommandError(
                f"{self.path}: {self.describe(name)} holds text ({str(column.iloc[row])[:40]!r} in data row {row + 1})"
                f"; only numbers can be used: recode it, or leave it out with --drop {name}"
            ) from None
        finite = np.isfinite(values)
        if not finite.all():
            row = int((~finite).argmax())
            kind = "a missing value" if np.isnan(values[row]) else "Inf"
            raise CommandError(
                f"{self.path}: {self.describe(name)} holds {kind} in data row {row + 1} "
                f"({int((~finite).sum())} such rows); remove or fill them first"
            )
        return values


def read_table(path: str | Path, header: bool | None = None) -> Table:
    """Read a csv or csv.gz file of UTF-8 text, separated by commas, or else by semicolons or tabs.

    Args:
        header: whether the first row holds names; None finds out: it does if none of its fields is a number.

    Raises:
        CommandError: the file is missing, unreadable, binary, empty, ragged or has a doubtful header.
    """
    pandas = optional("pandas", "reading tables")
    path = Path(path)
    text = _text(path)
    first = next((line for line in text.splitlines() if line.strip()), None)
    if first is None:
        raise CommandError(f"{path}: the file is empty")
    separator = next((mark for mark in ",;\t" if mark in first), ",")
    names, width, rows = _check_shape(path, text, separator)
    if header is None:
        header = _has_header(path, names)
    if header:
        names = _checked_names(path, names)
        rows -= 1
    else:
        names = [str(i) for i in range(width)]
    if rows == 0:
        raise CommandError(f"{path}: there is a header and no row of data")
    try:
        frame = pandas.read_csv(
            io.StringIO(text), sep=separator, header=0 if header else None, names=names, index_col=False,
            skipinitialspace=True, low_memory=False,
        )  # fmt: skip
    except (ValueError, OverflowError) as error:  # pandas' parser errors are ValueErrors
        raise CommandError(f"{path}: pandas cannot read it: {one_line(error)}") from error
    if len(frame) != rows:
        raise CommandError(f"{path}: is ambiguous csv: {rows} rows by one count and {len(frame)} by another")
    return Table(path, header, frame)


def _text(path: Path) -> str:
    """The decoded content of a file."""
    name = path.name.lower()
    if not name.endswith((".csv", ".csv.gz")):
        raise CommandError(f"{path}: expected a file named *.csv or *.csv.gz")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CommandError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {reason(error)}") from None
    compressed = data[:2] == b"\x1f\x8b"
    if name.endswith(".gz"):
        if data and not compressed:
            raise CommandError(f"{path}: is named .gz but is not gzip-compressed")
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise CommandError(f"{path}: cannot be decompressed: {one_line(error)}") from None
    elif compressed:
        raise CommandError(f"{path}: is gzip-compressed; rename it to end in .csv.gz")
    if b"\0" in data:
        raise CommandError(f"{path}: is not a text file (it holds NUL bytes, as binary and UTF-16 files do)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _check_shape(path: Path, text: str, separator: str) -> tuple[list[str], int, int]:
    """Fields of the first row, its width and the number of rows; pandas would fill short rows without a word."""
    names: list[str] = []
    width = rows = 0
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    try:
        for fields in reader:
            if not fields or (len(fields) == 1 and not fields[0].strip()):
                continue
            if rows == 0:
                names, width = [field.strip() for field in fields], len(fields)
            elif len(fields) != width:
                raise CommandError(
                    f"{path}: line {reader.line_num} has {len(fields)} fields where the first row has {width}"
                )
            rows += 1
    except csv.Error as error:
        raise CommandError(f"{path}: line {reader.line_num} is not csv: {one_line(error)}") from None
    return names, width, rows


def _has_header(path: Path, fields: list[str]) -> bool:
    numeric = [_is_number(field) for field in fields]
    if all(numeric):
        return False
    if any(is_number and field for is_number, field in zip(numeric, fields)):
        raise CommandError(
            f"{path}: the first row mixes numbers and text ({_listed(fields, 4)}); "
            "say --header yes if it holds column names, --header no if it is data"
        )
    return True


def _is_number(field: str) -> bool:
    if field.lower() in _MISSING:
        return True
    try:
        float(field)
    except ValueError:
        return False
    return True


def _checked_names(path: Path, names: list[str]) -> list[str]:
    if "" in names:
        raise CommandError(
            f"{path}: column {names.index('')} (counted from 0) has no name in the header; name it, or write the "
            "file without its index (pandas: to_csv(..., index=False))"
        )
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise CommandError(f"{path}: the header names {sorted(repeated)[0]!r} more than once")
    return names


def _listed(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(name[:40] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
