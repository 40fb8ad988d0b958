"""Programs that take turns, and the cache of their times. No speed is asserted."""

import numpy as np
import pytest

from mpjax.xla import timing

X = np.ones(3, np.float32)


def programs(*names):
    """Programs that differ by a constant; of every other one also the product without its cast."""
    return {
        name: timing.Programs(
            name=name,
            whole=(lambda x, number=number: x + number, (X,)),
            product=(lambda x, number=number: x - number, (X,)) if number % 2 else None,
        )
        for number, name in enumerate(names)
    }


def measure(folder, *names, rounds=2, options=None):
    return timing.Timings(folder, rounds=rounds, options=options or {}).measure(programs(*names))


def test_entries_are_cached_by_program_options_and_rounds(instant, tmp_path):
    folder = tmp_path / "made" / "here"
    first = measure(folder, "a", "b")
    assert instant["timed"] == 3 and first["a"].seconds == (1e-3, 2e-3) and first["b"].product_seconds == (3e-3, 4e-3)
    assert measure(folder, "a", "b") == first and instant["timed"] == 3
    assert measure(folder, "renamed", "b", rounds=1)["renamed"] == first["a"] and instant["timed"] == 3
    assert measure(folder, "a", "b", "c")["c"].seconds == (1e-3, 2e-3) and instant["timed"] == 4
    measure(folder, "a", "b", rounds=3)  # more rounds than are in the cache
    assert instant["timed"] == 7
    measure(folder, "a", "b", options={"xla_allow_excess_precision": True})
    assert instant["timed"] == 10
    measure(None, "a")
    assert instant["timed"] == 11


def test_a_damaged_entry_is_set_aside(instant, tmp_path):
    first = measure(tmp_path, "a")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.warns(UserWarning, match="is damaged .* set aside"):
        assert measure(tmp_path, "a") == first
    assert instant["timed"] == 2 and path.with_name(path.name + ".damaged").exists()
    assert measure(tmp_path, "a") == first and instant["timed"] == 2


def test_a_cache_that_cannot_be_written_warns_once(instant, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="timings are not kept") as warnings:
        assert len(measure(tmp_path / "file", "a", "b")) == 2
    assert len(warnings) == 1


def test_a_program_that_does_not_compile_is_a_text(instant, monkeypatch, tmp_path):
    def refuse(function, arguments, options):
        raise NotImplementedError("no such product\nat all")

    monkeypatch.setattr(timing, "ready", refuse)
    assert measure(tmp_path, "a") == {"a": "it does not compile here (no such product)"}
    assert not list(tmp_path.iterdir())


def test_medians_spread_and_casts():
    entry = timing.Entry(seconds=(3.0, 5.0, 4.0), product_seconds=(2.0, 4.5, 3.0))
    assert (entry.median, entry.spread, entry.cast) == (4.0, 1.0, 1.0)
    assert timing.Entry(seconds=(1.0,), product_seconds=(2.0,)).cast == 0.0  # never below 0
    assert timing.Entry(seconds=(1.0,), product_seconds=()).cast == 0.0


def test_it_really_times(tmp_path):
    entry = timing.Timings(tmp_path, rounds=3, options={}).measure({"start": timing.start_only()})["start"]
    assert len(entry.seconds) == 3 and min(entry.seconds) > 0


def test_programs_take_turns_and_short_ones_are_repeated(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 4e-4 * next(clock))  # any number of runs "takes" 0.4 ms …
    order = []
    samples = timing.in_turns([lambda: order.append("a"), lambda: order.append("b")], 3, shortest=3e-4)
    np.testing.assert_allclose(samples, np.full((2, 3), 4e-4))
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"  # … so one run is enough
    slow = iter([0.0, 1e-4, 0.0, 1.0, 0.0, 1.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(slow))
    order.clear()
    ((seconds,),) = timing.in_turns([lambda: order.append("a")], 1, shortest=3e-4)
    assert len(order) == 1 + 1 + 3 + 1 + 3 and seconds == pytest.approx(1 / 3)
