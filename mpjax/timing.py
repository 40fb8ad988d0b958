"""Seconds that compiled programs take on this device, in turns, kept in a file per device and versions.

A program is known by its lowered text and the compiler options, so a changed program is timed anew whatever its name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from mpjax import executable
from mpjax.files import write_json

Name = TypeVar("Name", bound=Hashable)

SHORTEST = 1e-3  # seconds of a turn; a shorter run is repeated until one timing takes that long
WHOLE = 0.02  # the same for whole programs, whose first run in a turn finds other programs' data in the caches
_VERSION = 1  # of the file


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def environment(*, device: str) -> dict[str, Any]:
    """What a result was computed with; `device` in words. `cores` are those this process may use."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {
        "python": platform.python_version(),
        **versions,
        "device": device,
        "cores": cores(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low)

    @property
    def cast(self) -> float:
        """Median difference within rounds, kept between 0 and the whole."""
        if not self.product_seconds:
            return 0.0
        difference = np.median(np.subtract(self.seconds, self.product_seconds))
        return float(np.clip(difference, 0.0, self.median))


def start_only() -> Programs:
    """A program that does next to nothing: what is left is the time of starting one."""
    x = np.ones((), np.float32)
    return Programs(name="starting a program", whole=(lambda x, y, z: x + y * z, (x, x, x)), product=None)


class Timings:
    """Timings of programs, from the cache where it has them.

    Args:
        folder: of the cache file, made if it is not there; None keeps nothing. Of two processes that write at the same time, the
            later one's entries stay. A damaged file is set aside as `*.damaged`, with a warning.
        rounds: timings of each program; an entry with fewer is measured anew.
        options: compiler options; one that this jaxlib does not know is left out.
    """

    def __init__(self, folder: Path | None, *, rounds: int, options: Mapping[str, Any]) -> None:
        self.rounds, self.options = rounds, dict(options)
        here = environment(device=device_name())
        self.header = {name: here[name] for name in ("device", "cores", "jax", "jaxlib")}
        self.header["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        self.entries: dict[str, Entry] = {}
        self.path: Path | None = None
        if folder is not None:
            digest = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()[:8]
            words = (self.header["device"], "jax", self.header["jax"], self.header["cores"], "cores", digest)
            self.path = folder / (re.sub(r"[^\w.]+", "-", " ".join(map(str, words))) + ".json")
            self.entries = self._read(self.path)

    def of(self, wanted: Mapping[Name, Programs]) -> dict[Name, Entry | str]:
        """The entries by the same names; a text, in place of an entry, says why a program could not be compiled."""
        found: dict[Name, Entry | str] = {}
        missing: dict[Name, tuple[str, list[Callable[[], Any]]]] = {}
        for name, programs in wanted.items():
            pair = [each for each in (programs.whole, programs.product) if each is not None]
            try:
                lowered = [jax.jit(function).lower(*arguments) for function, arguments in pair]
                texts = "\n".join([json.dumps(self.options, sort_keys=True), *(each.as_text() for each in lowered)])
                key = f"{programs.name} #{hashlib.sha256(texts.encode()).hexdigest()[:12]}"
                if key in self.entries and len(self.entries[key].seconds) >= self.rounds:
                    found[name] = self.entries[key]
                    continue
                runs = [_ready(function, arguments, self.options) for function, arguments in pair]
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
                found[name] = f"it does not compile here ({str(error).splitlines()[0][:200]})"
                continue
            missing[name] = (key, runs)
        if missing:
            flat = [run for _, runs in missing.values() for run in runs]
            samples = iter(in_turns(flat, self.rounds))
            for name, (key, runs) in missing.items():
                seconds, *product = (tuple(next(samples)) for _ in runs)
                found[name] = self.entries[key] = Entry(seconds=seconds, product_seconds=product[0] if product else ())
            if self.path is not None:
                kept = {key: vars(entry) for key, entry in self.entries.items()}
                self._write({"version": _VERSION, **self.header, "entries": kept})
        return found

    def _write(self, content: Mapping[str, Any]) -> None:
        """Saves the cache; where that cannot be done the timings stay in memory, and a warning says so once."""
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, content)
        except OSError as error:
            warnings.warn(f"timings are not kept: {self.path.parent} cannot be written ({error})", stacklevel=4)
            self.path = None

    def _read(self, path: Path) -> dict[str, Entry]:
        """The entries of a cache file; none where there is no file, or a damaged one, which is set aside."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = ""
        except OSError:
            return {}  # not there, or not readable: measured anew
        try:
            content = json.loads(text)
            if {name: content[name] for name in ("version", *self.header)} != {
                "version": _VERSION,
                **self.header,
            }:
                raise ValueError("it was measured elsewhere")
            return {key: _entry(value) for key, value in content["entries"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = path.with_name(path.name + ".damaged")
            os.replace(path, damaged)
            warnings.warn(f"{path.name} is damaged ({error}); set aside as {damaged.name}", stacklevel=4)
            return {}


def _entry(value: Mapping[str, Any]) -> Entry:
    seconds, product = (tuple(map(float, value[name])) for name in ("seconds", "product_seconds"))
    if not seconds or len(product) not in (0, len(seconds)) or not all(0 < each < np.inf for each in seconds + product):
        raise ValueError("a timing is missing or not positive")
    return Entry(seconds=seconds, product_seconds=product)


def _ready(function: Callable[..., Any], arguments: tuple, options: Mapping[str, Any]) -> Callable[[], Any]:
    """A run of the compiled program on arguments that lie on the device."""
    placed = jax.device_put(arguments)
    program = executable.build(function, placed, options)
    return lambda: jax.block_until_ready(program(*placed))


def in_turns(runs: Sequence[Callable[[], Any]], rounds: int, *, shortest: float = SHORTEST) -> list[list[float]]:
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
        order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
        for which in order:
            if repeats[which] > 1:
                runs[which]()
            samples[which].append(_clock(runs[which], repeats[which]) / repeats[which])
    return samples


def _clock(run: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return time.perf_counter() - start


def device_name() -> str:
    """The device in words; of a CPU, the processor's model, because jax calls them all alike."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine() or kind
