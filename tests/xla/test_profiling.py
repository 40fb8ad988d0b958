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


def test_seconds_by_instruction(program):
    text, run = program
    seconds = profiling.instruction_seconds(run, text, repeats=5)
    if seconds is None:
        pytest.skip("this profiler names no instruction of the program")
    assert profiling.OUTSIDE in seconds and set(seconds) - {profiling.OUTSIDE} <= set(profiling.hlo.owners(text, ()))
    assert len(seconds) > 1 and min(seconds.values()) >= 0


def test_none_of_a_program_that_the_profiler_does_not_name(program):
    assert profiling.layer_seconds(program[1], "HloModule another", ("first",), repeats=1) is None


def test_programs_take_turns(program):
    text, run = program
    first, other = profiling.layer_seconds_in_turns(
        [(run, text), (run, "HloModule another")], ("first", "second"), rounds=2, repeats=2
    )
    assert other is None and (first is None or set(first) == {"first", "second", profiling.OUTSIDE})


def test_a_moment_counts_in_equal_parts_for_all_that_run():
    event = profiling.Event
    assert profiling.shares([event(0, 4, "a"), event(6, 7, "b")]) == {"a": 4, "b": 1}
    overlapping = [event(0, 10, "a"), event(2, 6, "b"), event(4, 12, "c"), event(20, 21, "a")]
    parts = profiling.shares(overlapping)
    assert parts == pytest.approx({"a": 2 + 1 + 2 / 3 + 2 + 1, "b": 1 + 2 / 3, "c": 2 / 3 + 2 + 2})
    assert sum(parts.values()) == pytest.approx(12 + 1)
    assert profiling.shares([]) == {}


def test_an_instruction_lasts_until_its_end_is_marked():
    event = profiling.Event
    events = [
        event(0, 1, "dot"),
        event(5, 5, "end: dot"),
        event(10, 11, "dot"),  # without a mark
        event(20, 21, "dot"),
        event(22, 22, "end: dot"),
        event(30, 40, "while.1"),
        event(31, 33, "unknown"),
    ]
    instructions = profiling._instructions(events, {"dot": "first", "while.1": None})
    assert sorted(instructions) == [event(0, 5, "dot"), event(10, 11, "dot"), event(20, 22, "dot")]
