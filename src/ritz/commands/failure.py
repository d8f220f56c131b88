"""What goes wrong on a command line, as one sentence and an exit code; packages that are optional."""

from __future__ import annotations

import enum
import importlib
from types import ModuleType


class Exit(enum.IntEnum):
    """Exit codes of ``ritz`` (documented in docs/command_line.md)."""

    SUCCESS = 0
    INPUT = 1  # a file, a column, a model or a directory is not what the command needs
    USAGE = 2  # the options are wrong; the code that argparse and most shells use
    PACKAGE = 3  # an optional package is missing
    INTERNAL = 70  # a defect in ritz; sysexits' EX_SOFTWARE
    INTERRUPTED = 130  # 128 + SIGINT
    TERMINATED = 143  # 128 + SIGTERM


class CommandError(Exception):
    """A command cannot go on: one sentence for standard error, and the exit code."""

    def __init__(self, sentence: str, code: Exit = Exit.INPUT):
        super().__init__(sentence)
        self.code = code


class Terminated(Exception):
    """SIGTERM arrived; raised so that what is half written is removed on the way out."""


def optional(package: str, purpose: str, extra: str = "cli") -> ModuleType:
    """Import an optional package, or say in one sentence what it is for and how to get it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).split(".")[0]
        raise CommandError(f"{purpose} needs {missing}: pip install ritz[{extra}]", Exit.PACKAGE) from error


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; its type where the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: OSError) -> str:
    """Why a file operation failed, without number and path: 'permission denied'."""
    return (error.strerror or one_line(error)).lower()
