"""Seconds of each layer inside a compiled program, from JAX's own profiler.

Profiling slows a program down; only the shares of the layers mean something. Which layer a fusion counts for: `hlo.owners`.
XLA:CPU starts an operation on several threads and goes on: the event named after the instruction ends when it is started, and an
event "end: instruction" marks when it is done.
"""

from __future__ import annotations

import bisect
import heapq
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mpjax.xla import hlo

OUTSIDE = "(outside of layers)"
_CONTAINERS = re.compile(r"(while|conditional|call)(\.\d+)?$")  # their time is that of the instructions inside
_RUN, _END = "mpjax: run of program ", "end: "


class Event(NamedTuple):
    """Something that ran, in nanoseconds."""

    start: float
    end: float
    name: str


def layer_seconds(
    run: Callable[[], Any], text: str, layers: Sequence[str], *, repeats: int = 20
) -> dict[str, float] | None:
    """Seconds of one run by layer, and `OUTSIDE` of them: what no layer owns, and moments in which no instruction runs.

    A moment in which several instructions run counts in equal parts for each, so that a run's parts add up to its time.

    Args:
        run: runs the compiled program once.
        text: its optimised HLO.
        layers: names.
        repeats: runs; of each layer the lower quartile of its times is taken.

    Returns:
        All layers' and `OUTSIDE`; None where the profiler names no instruction of this program.
    """
    return layer_seconds_in_turns([(run, text)], layers, rounds=1, repeats=repeats)[0]


def layer_seconds_in_turns(
    programs: Sequence[tuple[Callable[[], Any], str]], layers: Sequence[str], *, rounds: int = 6, repeats: int = 5
) -> list[dict[str, float] | None]:
    """`layer_seconds` of several programs, pairs of `run` and `text`, that take turns.

    In each round every program runs once to warm the caches, and `repeats` times under the profiler's eye.
    """
    events = _profiled([run for run, _ in programs], rounds, repeats)
    return [
        _by_layer(events, f"{_RUN}{number}", hlo.owners(text, layers), layers)
        for number, (_, text) in enumerate(programs)
    ]


def instruction_seconds(run: Callable[[], Any], text: str, *, repeats: int = 50) -> dict[str, float] | None:
    """`layer_seconds` of the instructions of a program, by their names in its optimised HLO; those that ran."""
    names = [instruction.name for instruction in hlo.instructions(text)]
    seconds = _by_layer(_profiled([run], 1, repeats), f"{_RUN}0", {name: name for name in names}, names)
    return seconds and {name: number for name, number in seconds.items() if number or name == OUTSIDE}


def _profiled(runs: Sequence[Callable[[], Any]], rounds: int, repeats: int) -> list[Event]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    for run in runs:
        jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(rounds):
                for number, run in enumerate(runs):
                    jax.block_until_ready(run())
                    for _ in range(repeats):
                        with jax.profiler.TraceAnnotation(f"{_RUN}{number}"):
                            jax.block_until_ready(run())
        return [event for path in Path(folder).rglob("*.xplane.pb") for event in _read(path)]


def _by_layer(
    events: Sequence[Event], run: str, owners: Mapping[str, str | None], layers: Sequence[str]
) -> dict[str, float] | None:
    """`layer_seconds` of the program whose runs have that name."""
    instructions = sorted(_instructions(events, owners))
    starts = [event.start for event in instructions]
    by_run = []
    for whole in (event for event in events if event.name == run):
        nanoseconds = dict.fromkeys((*layers, OUTSIDE), 0.0)
        inside = instructions[bisect.bisect_left(starts, whole.start) : bisect.bisect_left(starts, whole.end)]
        parts = shares([event._replace(end=min(event.end, whole.end)) for event in inside])
        for name, part in parts.items():
            nanoseconds[owners[name] or OUTSIDE] += part
        if parts:
            nanoseconds[OUTSIDE] += whole.end - whole.start - sum(parts.values())
            by_run.append(list(nanoseconds.values()))
    if not by_run:
        return None
    return dict(zip((*layers, OUTSIDE), (1e-9 * np.percentile(by_run, 25, axis=0)).tolist(), strict=True))


def shares(events: Sequence[Event]) -> dict[str, float]:
    """Name -> its part of the time in which anything runs: a moment counts in equal parts for all that run then."""
    result: dict[str, float] = defaultdict(float)
    running: list[tuple[float, str]] = []  # (end, name), the first to end in front
    now = 0.0

    def advance(until: float) -> None:
        nonlocal now
        while running and now < until:
            step = min(running[0][0], until)
            for _, name in running:
                result[name] += (step - now) / len(running)
            now = step
            while running and running[0][0] <= now:
                heapq.heappop(running)
        now = until

    for event in sorted(events):
        advance(event.start)
        heapq.heappush(running, (event.end, event.name))
    advance(float("inf"))
    return dict(result)


def _read(path: Path) -> Iterable[Event]:
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            yield Event(event.start_ns, event.start_ns + event.duration_ns, event.name)


def _instructions(events: Sequence[Event], owners: Mapping[str, str | None]) -> list[Event]:
    """The events of the program's instructions, each until the end that is marked."""
    marks: dict[str, float] = {}  # the next one
    result = []
    for event in sorted(events, reverse=True):
        if event.name.startswith(_END):
            marks[event.name.removeprefix(_END)] = event.start
        elif event.name in owners and not _CONTAINERS.match(event.name):
            result.append(event._replace(end=max(event.end, marks.pop(event.name, event.end))))
    return result
