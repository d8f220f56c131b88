"""Results appear all at once or not at all: directories and files are written beside their place and moved into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .failure import CommandError, reason

_STAGE = ".ritz-"


@contextmanager
def staged_directory(target: Path, force: bool) -> Iterator[Path]:
    """A directory to write into, which becomes ``target`` when the block ends well, and vanishes when it does not.

    A new target is made by one rename of a sibling. An existing directory (a mount point, perhaps) stays where it is:
    the stage lies inside and its files are moved over, so ``force`` replaces files of the same name and no others.

    Raises:
        CommandError: the target is a file, holds files and ``force`` was not given, or cannot be written.
    """
    target = Path(os.path.abspath(target))
    if os.path.lexists(target) and not target.is_dir():
        raise CommandError(f"{target}: is a file; --out takes a directory")
    made: list[Path] = []
    try:
        exists = target.is_dir()
        if exists and not force and any(not entry.name.startswith(_STAGE) for entry in target.iterdir()):
            raise CommandError(f"{target}: is not empty; choose another directory, or replace its results with --force")
        if not exists:
            _make_parents(target.parent, made)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=target if exists else target.parent))
    except OSError as error:
        _remove(made)
        raise CommandError(f"{target}: cannot be written: {reason(error)}") from None
    try:
        yield stage
        if exists:
            for file in sorted(stage.iterdir()):
                os.replace(file, target / file.name)
            stage.rmdir()
        else:
            stage.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            stage.rename(target)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        _remove(made)
        if isinstance(error, OSError):
            raise CommandError(f"{target}: cannot be written: {reason(error)}") from None
        raise


def write_file(target: Path, text: str, force: bool) -> None:
    """Write a text file through a sibling and a rename."""
    check_file(target, force)
    target = Path(os.path.abspath(target))
    stage = None
    try:
        handle, stage = tempfile.mkstemp(prefix=_STAGE, dir=target.parent)
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(stage, 0o666 & ~_umask())
        os.replace(stage, target)
    except BaseException as error:
        if stage is not None and os.path.exists(stage):
            os.unlink(stage)
        if isinstance(error, OSError):
            raise CommandError(f"{target}: cannot be written: {reason(error)}") from None
        raise


def check_file(target: Path, force: bool) -> None:
    """Refuse early what :func:`write_file` would refuse late."""
    if target.is_dir():
        raise CommandError(f"{target}: is a directory; --out takes a file")
    if os.path.lexists(target) and not force:
        raise CommandError(f"{target}: exists; replace it with --force")
    if not target.absolute().parent.is_dir():
        raise CommandError(f"{target.parent}: there is no such directory")


def _make_parents(directory: Path, made: list[Path]) -> None:
    """Create a directory and what it needs; the new ones are put at the front of ``made``, so deepest first."""
    if not directory.exists():
        _make_parents(directory.parent, made)
        directory.mkdir()
        made.insert(0, directory)


def _remove(made: list[Path]) -> None:
    for directory in made:
        try:
            directory.rmdir()
        except OSError:
            return  # someone else put something there meanwhile


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
