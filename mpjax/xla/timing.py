"""Seconds that compiled programs take on this device, in turns, kept in a file per device and versions.

A program is known by its lowered text and the compiler options, so a changed program is timed anew whatever its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from mpjax.files import write_json
from mpjax.xla import executable
from mpjax.xla.environment import environment

Name = TypeVar("Name", bound=Hashable)
Run = Callable[[], Any]

SHORTEST = 1e-3  # seconds of a turn; a shorter run is repeated until one timing takes that long
WHOLE = 0.02  # the same for whole programs, whose first run in a turn finds other programs' data in the caches
_VERSION = 1  # of the file


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
        folder: of the cache file, made if it is not there; None: no cache. Of two processes that write at the same time, the
            later one's entries stay. A damaged file is set aside as `*.damaged`, with a warning.
        rounds: timings of each program; an entry with fewer is measured anew.
        options: compiler options; one that this jaxlib does not know is left out.
    """

    def __init__(self, folder: Path | None, *, rounds: int, options: Mapping[str, Any]) -> None:
        self.rounds, self.options = rounds, dict(options)
        self.header = {"version": _VERSION, **here()}
        self.entries: dict[str, Entry] = {}
        self.path: Path | None = None
        if folder is not None:
            digest = hashlib.sha256(json.dumps(here(), sort_keys=True).encode()).hexdigest()[:8]
            words = f"{self.header['device']} jax {self.header['jax']} {self.header['cores']} cores {digest}"
            self.path = folder / (re.sub(r"[^\w.]+", "-", words) + ".json")
            self.entries = self._read(self.path)

    def measure(self, wanted: Mapping[Name, Programs]) -> dict[Name, Entry | str]:
        """The entries by the same names; a text, in place of an entry, says why a program could not be compiled."""
        results: dict[Name, Entry | str] = {}
        missing: dict[Name, tuple[str, list[Run]]] = {}
        for name, programs in wanted.items():
            pair = [program for program in (programs.whole, programs.product) if program is not None]
            try:
                texts = [jax.jit(function).lower(*arguments).as_text() for function, arguments in pair]
                text = "\n".join([json.dumps(self.options, sort_keys=True), *texts])
                key = f"{programs.name} #{hashlib.sha256(text.encode()).hexdigest()[:12]}"
                if key in self.entries and len(self.entries[key].seconds) >= self.rounds:
                    results[name] = self.entries[key]
                    continue
                missing[name] = key, [_ready(function, arguments, self.options) for function, arguments in pair]
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
                results[name] = f"it does not compile here ({str(error).splitlines()[0][:200]})"
        if missing:
            samples = iter(in_turns([run for _, runs in missing.values() for run in runs], self.rounds))
            for name, (key, runs) in missing.items():
                seconds, *product = (tuple(next(samples)) for _ in runs)
                results[name] = self.entries[key] = Entry(
                    seconds=seconds, product_seconds=product[0] if product else ()
                )
            self._write()
        return results

    def _write(self) -> None:
        """Save the cache; where that cannot be done the timings stay in memory, and a warning says so once."""
        if self.path is None:
            return
        content = {**self.header, "entries": {key: vars(entry) for key, entry in self.entries.items()}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, content)
        except OSError as error:
            warnings.warn(f"timings are not kept: {self.path.parent} cannot be written ({error})", stacklevel=4)
            self.path = None

    def _read(self, path: Path) -> dict[str, Entry]:
        """The entries of a cache file; none where there is no file, or a damaged one, which is set aside."""
        try:
            content = json.loads(path.read_bytes())
            if {name: content[name] for name in self.header} != self.header:
                raise ValueError("it was measured elsewhere")
            return {key: _entry(**value) for key, value in content["entries"].items()}
        except OSError:
            return {}  # not there, or not readable: measured anew
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = path.with_name(path.name + ".damaged")
            os.replace(path, damaged)
            warnings.warn(f"{path.name} is damaged ({error}); set aside as {damaged.name}", stacklevel=4)
            return {}


def _entry(seconds: Sequence[float], product_seconds: Sequence[float]) -> Entry:
    numbers, product = tuple(map(float, seconds)), tuple(map(float, product_seconds))
    if not numbers or len(product) not in (0, len(numbers)) or not all(0 < x < np.inf for x in numbers + product):
        raise ValueError("a timing is missing or not positive")
    return Entry(seconds=numbers, product_seconds=product)


def _ready(function: Callable[..., Any], arguments: tuple, options: Mapping[str, Any]) -> Run:
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
