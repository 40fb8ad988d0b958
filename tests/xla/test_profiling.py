"""Seconds by layer inside a compiled program."""

import jax
import numpy as np
import pytest

from mpjax.xla import executable, profiling


@pytest.fixture(scope="module")
def program():
    def function(x):
        for name in ("first", "second"):
            with jax.named_scope(name):
                x = x @ x
        return jax.numpy.tanh(x)

    x = np.ones((200, 200), np.float32)
    built = executable.build(function, (x,), executable.EXACT)
    return built.compiled.as_text(), lambda: built(x)


def test_seconds_by_layer(program):
    text, run = program
    seconds = profiling.layer_seconds(run, text, ("first", "second"), repeats=5)
    if seconds is None:
        pytest.skip("this profiler names no instruction of the program")
    assert set(seconds) <= {"first", "second", profiling.OUTSIDE}
    assert all(0 <= value < 1 for value in seconds.values()) and seconds["first"] > 0 and seconds["second"] > 0


def test_none_of_a_program_that_the_profiler_does_not_name(program):
    assert profiling.layer_seconds(program[1], "HloModule another", ("first",), repeats=1) is None
