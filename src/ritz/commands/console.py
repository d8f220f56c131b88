"""What a person sees while a command works: facts as they become known, and a bar for long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Console:
    """Facts go to standard output, bars to standard error; with ``quiet`` (``--json``) neither is shown.

    Where standard error is not a terminal, a bar would fill a log file, so a line now and then takes its place.
    """

    def __init__(self, quiet: bool):
        self.quiet = quiet

    def fact(self, label: str, text: str) -> None:
        """One aligned line: a label once, then what is known."""
        self.line(f"{label:<8}  {text}")

    def line(self, text: str = "") -> None:
        """One line as it is."""
        if not self.quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def phase(self, label: str, total: int) -> Iterator[Phase]:
        """A stretch of ``total`` steps; the phase records the loss of each and shows how it goes."""
        bar = None
        if not self.quiet and sys.stderr.isatty():
            bar = tqdm(total=total, desc=label, unit="step", leave=False, file=sys.stderr, dynamic_ncols=True)
        phase = Phase(self, label, total, bar)
        try:
            yield phase
        finally:
            if bar is not None:
                bar.close()


class Phase:
    """The history of one stretch of training.

    Attributes:
        steps: step numbers, from 1.
        loss: the loss at each.
        seconds: time since the phase began, at each.
        stopped: why it ended before the last step; empty if it did not.
    """

    def __init__(self, console: Console, label: str, total: int, bar: tqdm | None):
        self.steps: list[int] = []
        self.loss: list[float] = []
        self.seconds: list[float] = []
        self.stopped = ""
        self._console, self._label, self._total, self._bar = console, label, total, bar
        self._start = self._spoke = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began."""
        return time.perf_counter() - self._start

    def step(self, loss: float) -> None:
        """Record and show one step."""
        now = time.perf_counter()
        self.steps.append(len(self.steps) + 1)
        self.loss.append(loss)
        self.seconds.append(now - self._start)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()
        elif now - self._spoke > 10:
            self._spoke = now
            self._console.fact("", f"{self._label}: step {len(self.steps)} of {self._total}, loss {loss:.4f}")
