"""Progress as M/N with the time left; lines instead of a bar where stderr is no terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Advance(Protocol):
    """Reports further steps as done."""

    def __call__(self, steps: int = 1) -> None: ...


@contextmanager
def progress(description: str, total: int, *, every: float = 10.0) -> Iterator[Advance]:
    """Yields the function that reports a step as done; without a terminal, at most a line in `every` seconds."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=600) as bar:
            task = bar.add_task(escape(description), total=total)
            yield lambda steps=1: bar.advance(task, steps)
        return
    start = printed = time.monotonic()
    done = 0

    def advance(steps: int = 1) -> None:
        nonlocal done, printed
        done += steps
        now = time.monotonic()
        if now - printed >= every and 0 < done < total:
            printed = now
            left = (now - start) / done * (total - done)
            print(f"{description}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
    print(f"{description}: {done}/{total} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
