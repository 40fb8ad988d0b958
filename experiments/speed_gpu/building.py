"""Programs built side by side, and timed only while none is built.

XLA compiles without Python's lock, and tries kernels on the GPU as it does: a program of the pose model takes half a minute, and
twelve of them take little longer than one. Times that are taken meanwhile are worthless.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np

from mpjax.kernels import stored
from mpjax.xla import executable, profile, timing

ROUNDS = 7  # of a product that the device is asked for
GRACE = 45.0  # seconds that a task may take beyond the deadline
_form: ContextVar[str | None] = ContextVar("form", default=None)
_forms: ContextVar[Counter[str] | None] = ContextVar("forms", default=None)


class OutOfTime(Exception):
    """The run's minutes were over before something was begun, or long before it was finished."""


class Gate:
    """Lets threads build at the same time, and one of them time while none builds; who wants to time goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._building = self._waiting = 0
        self._timing = False

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Of a thread that builds."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Within `building`: until its end no other thread builds or times."""
        with self._changed:
            self._waiting += 1
        self._leave()
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._building and not self._timing)
                self._timing = True
            try:
                yield
            finally:
                with self._changed:
                    self._timing = False
        finally:
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()
            self._enter()

    def _enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._building += 1

    def _leave(self) -> None:
        with self._changed:
            self._building -= 1
            self._changed.notify_all()


class Builders:
    """Threads that compute tasks until a deadline."""

    def __init__(self, workers: int, deadline: float) -> None:
        self.deadline = deadline
        self._gate, self._tasks = Gate(), list[Future]()
        self._pool = ThreadPoolExecutor(workers)
        self._helpers = ThreadPoolExecutor(workers)  # for parts of a task, so that no task waits for another's place

    def submit(self, task: Callable[..., Any], *needs: Future) -> Future:
        """The task's future, which is given the results of others that were submitted before it.

        It ends in `OutOfTime` where the deadline has passed before the task is begun.
        """

        def run() -> Any:
            values = [need.result() for need in needs]  # before the gate: who waits here does not build
            with self._gate.building():
                if time.monotonic() > self.deadline:
                    raise OutOfTime
                return task(*values)

        self._tasks.append(self._pool.submit(run))
        return self._tasks[-1]

    def finish(self) -> None:
        """Waits for all tasks: afterwards nothing is built.

        Raises:
            OutOfTime: some that were begun before the deadline go on long after it.
        """
        if wait(self._tasks, timeout=max(self.deadline - time.monotonic(), 0.0) + GRACE).not_done:
            raise OutOfTime
        self._tasks.clear()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()
        self._helpers.shutdown()

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Within the context the device is asked for the fastest form of a product (`kernels.stored`) between builds.

        Its candidates are built side by side; a task in `of_form` does not ask.
        """
        choice, compared = stored.choice, profile.compared

        def choose(*arguments: Any) -> str:
            form = _form.get() or choice(*arguments)
            if (counted := _forms.get()) is not None:
                counted[form] += 1
            return form

        stored.choice, profile.compared = choose, self._compared  # type: ignore[assignment]
        try:
            yield
        finally:
            stored.choice, profile.compared = choice, compared

    def _compared(self, programs: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]]) -> dict[str, float]:
        """As `xla.profile.compared`, without a cache. Helpers compute: their threads are no part of a trace."""
        tasks = [self._helpers.submit(_ready, function, tuple(args)) for function, args in programs.values()]
        runs = [task.result() for task in tasks]
        usable = [run for run in runs if run is not None]
        with self._gate.timing():
            samples = iter(self._helpers.submit(timing.in_turns, usable, ROUNDS).result())
        times = [np.inf if run is None else float(np.median(next(samples))) for run in runs]
        return dict(zip(programs, times, strict=True))


def _ready(function: Callable[..., Any], arguments: tuple) -> Callable[[], Any] | None:
    try:
        run = timing.ready(function, arguments, executable.EXACT)
        run()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None
    return run


@contextlib.contextmanager
def of_form(form: str | None) -> Iterator[Counter[str]]:
    """Within the context this thread traces all weight-only products in one form, or in the fastest ones; yields their counts."""
    counted = Counter[str]()
    tokens = _form.set(form), _forms.set(counted)
    try:
        yield counted
    finally:
        _form.reset(tokens[0])
        _forms.reset(tokens[1])
