"""Seconds of layers inside whole programs: what adds up to what. No speed is asserted."""

import functools

import jax
import numpy as np
import pytest
from toys import SmallConv, linen

from mpjax import cost, search
from mpjax.apply import apply
from mpjax.cost import attribution
from mpjax.xla import profiling

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

NAMES = ("stem", "depthwise", "first", "second", "head")
LOW = dict.fromkeys(NAMES, "bfloat16")


@functools.cache
def small():
    model, batches = linen(SmallConv(), 2, 8, 8, 3)
    return model, *batches[0]


def attributed(*formats, **options):
    model, x = small()
    return cost.attributed(model, formats, x, rounds=1, **options)


@pytest.fixture
def made_up(monkeypatch):
    """Program n takes n + 1 seconds; its layers have 1, 2, … twentieths of it, a quarter is outside."""
    built = []

    def whole(model, *inputs, narrow):
        built.append((narrow, model.assignment["stem"]))
        return attribution.Whole(run=lambda: None, text="")

    def profiles(programs, layers, **_):
        shares = dict(zip(layers, np.arange(1, len(layers) + 1) / 20, strict=True))
        return [{**shares, profiling.OUTSIDE: 0.25} for _ in programs]

    monkeypatch.setattr(attribution, "whole", whole)
    monkeypatch.setattr(
        attribution.timing, "in_turns", lambda runs, rounds, **_: [[n + 1.0] * rounds for n in range(len(runs))]
    )
    monkeypatch.setattr(attribution.profiling, "layer_seconds_in_turns", profiles)
    return built


def test_a_mix_is_the_sum_of_its_layers_and_of_what_is_outside(made_up):
    steps = []
    costs = attributed("bfloat16", "float16", progress=lambda *step: steps.append(step[:2]))
    assert costs.layers == NAMES and costs.formats == ("float32", "bfloat16", "float16")
    both = [(narrow, fmt) for narrow in (True, False) for fmt in costs.formats]
    assert made_up == (both if costs.kernels == (True, False) else both[:3])
    assert steps == [(n + 1, len(made_up)) for n in range(len(made_up))]
    assert costs.seconds.shape == (len(costs.kernels), 5, 3) and costs.outside.shape == (len(costs.kernels), 3)
    np.testing.assert_allclose(costs.programs.ravel(), np.arange(len(made_up)) + 1)
    np.testing.assert_allclose([table.sum(axis=0) for table in costs.tables], costs.programs)
    np.testing.assert_allclose(costs.seconds[0, :, 1], 2 * np.array([1, 2, 3.5, 3.5, 5]) / 20)  # two are equal
    np.testing.assert_allclose(costs.outside[0], [0.25, 0.5, 0.75])
    np.testing.assert_array_equal(costs.spread, 0)
    assert costs.predicted({}) == pytest.approx(costs.programs[-1, 0])  # without narrow layers: the last set of kernels
    assert costs.predicted(LOW) == pytest.approx(2)
    mixed = {**LOW, "head": "float32"}
    assert costs.predicted(mixed) == pytest.approx(
        2 - (5 / 20 + 0.25 / 5)
    )  # the head's part of float32 is half as long


def test_which_kernels_a_mix_runs_with(made_up):
    costs = attributed("bfloat16")
    if costs.kernels != (True, False):
        pytest.skip("one set of kernels here")
    assert costs.predicted({"head": "bfloat16"}) == pytest.approx(3 * 14 / 20 + 4 * 6 / 20)  # few FLOPs
    assert costs.predicted({"stem": "bfloat16"}) == pytest.approx(1 + (2 * 1 / 20 + 0.5 / 5) - (1 / 20 + 0.25 / 5))


def test_a_search_takes_its_tables(made_up):
    costs = attributed("bfloat16")
    scores = type(
        "Scores",
        (),
        {"layers": NAMES, "formats": ("bfloat16",), "value": np.ones((5, 1)), "kind": "loss"},
    )()
    for table in costs.tables:
        problem = search.Problem.from_scores(scores, cost=table, objective="cost_min")
        assert problem.cost_of(problem.index(problem.baseline)) == pytest.approx(table[:, 0].sum())


def test_what_cannot_be_timed_is_noted(made_up, monkeypatch):
    costs = attributed("float16_acc16")
    assert np.isnan(costs.seconds[:, :, 1]).all() and np.isfinite(costs.seconds[:, :, 0]).all()
    assert costs.notes[0].startswith("float16_acc16 was not timed: XLA runs an emulation")
    with pytest.raises(ValueError, match="float16_acc16 was not timed"):
        costs.predicted({"stem": "float16_acc16"})
    whole = attribution.whole

    def refusing(model, *inputs, narrow):
        if model.assignment["stem"] == "float16":
            raise NotImplementedError("no float16\nat all")
        return whole(model, *inputs, narrow=narrow)

    monkeypatch.setattr(attribution, "whole", refusing)
    assert "float16 was not timed: it does not compile here (no float16)" in attributed("float16").notes
    monkeypatch.setattr(attribution.profiling, "layer_seconds_in_turns", lambda programs, *_: [None] * len(programs))
    with pytest.raises(RuntimeError, match="without the float32 program"):
        attributed("bfloat16")


def test_it_really_attributes():
    costs = attributed("bfloat16")
    assert costs.notes == () and (costs.programs > 0).all() and (costs.seconds >= 0).all()
    np.testing.assert_allclose([table.sum(axis=0) for table in costs.tables], costs.programs)
    assert costs.predicted({}) == pytest.approx(costs.programs[-1, 0])
    assert costs.predicted(LOW) == pytest.approx(costs.programs[0, 1])
    assert (costs.seconds[:, 0] > 0).all()  # the stem is seen in each program


def test_programs_of_either_set_of_kernels_compute_the_same():
    model, x = small()
    mixed = apply(model, LOW, implementation="rule")
    outputs = [attribution.whole(mixed, x, narrow=narrow)() for narrow in (None, True, False)]
    for other in outputs[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-2), outputs[0], other)


def test_misuse_is_refused_before_anything_compiles(made_up):
    model, x = small()
    for formats, inputs, options, match in (
        (("bfloat",), (x,), {}, "Did you mean 'bfloat16'"),
        (("float16", "float16"), (x,), {}, "more than once: float16"),
        (("float16",), (), {}, "found none: pass one batch"),
        (("float16",), (x, x[:1]), {}, "leading axis"),
        (("float16",), (x,), {"rounds": 0}, "at least one round, found rounds=0"),
        (("float16",), (x,), {"implementation": "auto"}, '"rule" or "xla"; found \'auto\''),
    ):
        with pytest.raises(ValueError, match=match):
            cost.attributed(model, formats, *inputs, **options)
    assert made_up == []
    costs = attributed("bfloat16")
    with pytest.raises(KeyError, match="Unknown layer 'body'"):
        costs.predicted({"body": "bfloat16"})
    with pytest.raises(ValueError, match="No costs for float16; these are for float32, bfloat16"):
        costs.predicted({"stem": "float16"})
