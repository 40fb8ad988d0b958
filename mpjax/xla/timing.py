"""Seconds that compiled programs take on this device, in turns, cached per device and versions.

The cache knows a program by its StableHLO text and the compiler options, so a changed program is timed anew whatever its name.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from mpjax.files import Checkpoint
from mpjax.xla import executable
from mpjax.xla.environment import environment

Name = TypeVar("Name", bound=Hashable)
Run = Callable[[], Any]

SHORTEST = 1e-3  # seconds of a turn; a shorter run is repeated until one timing takes that long
WHOLE = 0.02  # the same for whole programs, whose first run in a turn finds other programs' data in the caches


@dataclass(frozen=True, kw_only=True)
class Programs:
    """What is timed for one entry: `whole`, and `product` (the same without the cast; None where there is no cast)."""

    name: str
    whole: tuple[Callable[..., Any], tuple]  # a function and its arguments
    product: tuple[Any, tuple] | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Seconds of one run in each round, of the whole and of the product without the cast."""

    seconds: tuple[float, ...]
    product_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Interquartile range."""
        return float(np.subtract(*np.percentile(self.seconds, [75, 25])))

    @property
    def cast(self) -> float:
        """Median difference within rounds, limited to between 0 and the whole."""
        if not self.product_seconds:
            return 0.0
        return float(np.clip(np.median(np.subtract(self.seconds, self.product_seconds)), 0.0, self.median))


def start_only() -> Programs:
    """A program that does next to nothing, to time the start of a program."""
    x = np.ones((), np.float32)
    return Programs(name="starting a program", whole=(lambda x, y, z: x + y * z, (x, x, x)), product=None)


def here() -> dict[str, Any]:
    """What a timing depends on besides the program: device, cores, versions, XLA's flags."""
    now = environment()
    return {
        **{name: now[name] for name in ("device", "cores", "jax", "jaxlib")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


class Timings:
    """Timings of programs, from the cache where it has them.

    Args:
        folder: of the cache, a file for each entry (`Checkpoint`); None: no cache.
        rounds: timings of each program; an entry with fewer is measured anew.
        options: compiler options; one that this jaxlib does not know is left out.
    """

    def __init__(self, folder: Path | None, *, rounds: int, options: Mapping[str, Any]) -> None:
        self.rounds, self.options = rounds, dict(options)
        self.cache = None if folder is None else Checkpoint(folder, here() | {"options": self.options})

    def measure(self, wanted: Mapping[Name, Programs]) -> dict[Name, Entry | str]:
        """The entries by the same names; a text, in place of an entry, says why a program could not be compiled."""
        results: dict[Name, Entry | str] = {}
        missing: dict[Name, tuple[str, list[Run]]] = {}
        for name, programs in wanted.items():
            pair = [program for program in (programs.whole, programs.product) if program is not None]
            try:
                texts = [jax.jit(function).lower(*arguments).as_text() for function, arguments in pair]
                digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
                if (entry := self._load(digest)) is not None:
                    results[name] = entry
                else:
                    missing[name] = digest, [ready(function, arguments, self.options) for function, arguments in pair]
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
                results[name] = f"it does not compile here ({str(error).splitlines()[0][:200]})"
        samples = iter(in_turns([run for _, runs in missing.values() for run in runs], self.rounds) if missing else ())
        for name, (digest, runs) in missing.items():
            seconds, *product = (tuple(next(samples)) for _ in runs)
            entry = Entry(seconds=seconds, product_seconds=product[0] if product else ())
            results[name] = entry
            self._save(digest, entry, wanted[name].name)
        return results

    def _load(self, digest: str) -> Entry | None:
        piece = None if self.cache is None else self.cache.load(digest)
        if piece is None or len(piece.arrays["seconds"]) < self.rounds:
            return None
        return Entry(**{name: tuple(numbers.tolist()) for name, numbers in piece.arrays.items()})

    def _save(self, digest: str, entry: Entry, name: str) -> None:
        """Save an entry; where that cannot be done the timings are only returned, and a warning says so once."""
        if self.cache is not None:
            try:
                self.cache.save(digest, vars(entry), {"program": name})
            except OSError as error:
                warnings.warn(f"timings are not kept: {self.cache.folder} cannot be written ({error})", stacklevel=4)
                self.cache = None


def ready(function: Callable[..., Any], arguments: tuple, options: Mapping[str, Any]) -> Run:
    """A run of the compiled program on arguments that lie on the device."""
    placed = jax.device_put(arguments)
    program = executable.build(function, placed, options)
    return lambda: jax.block_until_ready(program(*placed))


def in_turns(runs: Sequence[Run], rounds: int, *, shortest: float = SHORTEST) -> list[list[float]]:
    """Seconds of one run, for each of `runs` and each round; in every second round they take turns backwards.

    A run shorter than `shortest` seconds is repeated until a turn takes that long, after one that warms the caches.
    """
    repeats = []
    for run in runs:
        run()
        count = 1
        while (elapsed := _clock(run, count)) < shortest:
            count = max(2 * count, int(1.2 * count * shortest / max(elapsed, 1e-9)))
        repeats.append(count)
    samples: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for number in range(len(runs))[:: -1 if turn % 2 else 1]:
            run, count = runs[number], repeats[number]
            if count > 1:
                run()
            samples[number].append(_clock(run, count) / count)
    return samples


def _clock(run: Run, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return time.perf_counter() - start
