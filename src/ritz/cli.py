"""The ``ritz`` command: options, exit codes, and one sentence for everything that goes wrong.

What the sub-commands do is in :mod:`ritz.commands`, imported when one of them runs, so that ``ritz --help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from .commands.failure import CommandError, Exit, Terminated, one_line
from .errors import RitzError

_DESCRIPTION = "Exact Gaussian processes on large tables, from the command line."
_EPILOG = """\
examples:
  ritz demo                                                  a first look: two minutes on two cores
  ritz gp fit houses.csv --target price --out houses-gp      fit, score on held-out rows, save
  ritz gp predict houses-gp new.csv --out predictions.csv    mean and standard deviation for every row

exit codes: 0 success, 1 bad input, 2 bad options, 3 an optional package is missing, 70 a defect in ritz,
130 interrupted, 143 terminated. A failure is one sentence on standard error and leaves nothing half-written.
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for a wrong option instead of the usage and a line."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        sentence = " ".join(message.split())
        raise CommandError(f"{sentence} (see {self.prog} --help)", Exit.USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ritz`` with these arguments (None: those of the process) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _terminable(), _plain_warnings():
            options = _parser().parse_args(given)
            return int(options.run(options) or Exit.SUCCESS)
    except SystemExit as stop:  # argparse, after --help and --version
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of a pipe has had enough; keep the interpreter from saying so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.SUCCESS
    except (KeyboardInterrupt, Terminated) as stop:
        terminated = isinstance(stop, Terminated)
        return _fail("terminated" if terminated else "interrupted", Exit.TERMINATED if terminated else Exit.INTERRUPTED)
    except BaseException as error:
        if "--traceback" in given:
            traceback.print_exc()
        if isinstance(error, CommandError):
            return _fail(str(error), error.code)
        if isinstance(error, RitzError):
            return _fail(one_line(error), Exit.INPUT)
        if isinstance(error, MemoryError):
            return _fail(f"not enough memory: {one_line(error)}", Exit.INPUT)
        return _fail(
            f"a defect in ritz: {type(error).__name__}: {one_line(error)} (--traceback shows where)", Exit.INTERNAL
        )


def _fail(sentence: str, code: Exit) -> int:
    print("ritz: " + " ".join(sentence.split()), file=sys.stderr)
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise, so that temporary directories are removed; signals belong to the main thread."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning as one line, without the place in the source."""

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        print(f"ritz: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(prog="ritz", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"ritz {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    common.add_argument("--traceback", action="store_true", help="on failure, also show where in the source")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    gp = commands.add_parser(
        "gp", help="fit a Gaussian process, and predict with it", description="Exact Gaussian processes."
    )
    jobs = gp.add_subparsers(title="commands", metavar="COMMAND", required=True)
    from .commands import options

    options.add_fit(jobs, common)
    options.add_predict(jobs, common)
    options.add_demo(commands, common)
    options.add_bench(commands, common)
    options.add_info(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
