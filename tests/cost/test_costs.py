"""Costs: bytes and FLOPs against arithmetic by hand, what is timed and what comes from the cache. No speed is asserted."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from toys import SmallConv, linen

from mpjax import cost
from mpjax.cost import measuring
from mpjax.formats import FLOAT32
from mpjax.program import calls, edges
from mpjax.xla import timing

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

NAMES = ("stem", "depthwise", "first", "second", "head")


@functools.cache
def small():
    model, batches = linen(SmallConv(), 2, 8, 8, 3)
    return model, *batches[0]


def static(*formats):
    model, x = small()
    return cost.static(model, formats, x)


def measure(*formats, rounds=1, **options):
    model, x = small()
    return cost.measure(model, formats, x, rounds=rounds, **options)


def test_bytes_and_flops_by_hand():
    costs = static("bfloat16", "float8_e4m3fn", "float16_acc16")
    assert costs.layers == NAMES == small()[0].names
    assert costs.formats == ("float32", "bfloat16", "float8_e4m3fn", "float16_acc16")
    assert costs.examples == 2
    weights = np.array([3 * 3 * 3 * 8, 3 * 3 * 8, 64, 64, 40])
    read = np.array([8 * 8 * 3, 4 * 4 * 8, 8, 8, 8])
    written = np.array([4 * 4 * 8, 4 * 4 * 8, 8, 8, 5])
    np.testing.assert_array_equal(costs.weight_bytes, np.outer(weights, [4, 2, 1, 2]))
    np.testing.assert_array_equal(costs.activation_bytes, np.outer(read, [4, 2, 1, 2]) + 4 * written[:, None])
    np.testing.assert_array_equal(costs.flops, 2 * np.array([4 * 4 * 8 * 27, 4 * 4 * 8 * 9, 64, 64, 40]))
    np.testing.assert_array_equal(costs.flops, [layer.flops for layer in small()[0].layers])
    np.testing.assert_array_equal(costs.runs, 1)
    assert costs.seconds is None and costs.spread is None and costs.cast_seconds is None and costs.overhead is None
    with pytest.raises(ValueError, match=r"call cost\.measure"):
        _ = costs.product_seconds


def test_scanned_and_shared_layers_count_every_run(instant):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(4, name="dense")(x)), None

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="body")
            shared = nn.Dense(4, name="shared")
            x = shared(body(x)[0])
            return shared(jnp.stack([x, x, x, x], axis=1))

    model, ((x,), _) = linen(Whole(), 2, 4)
    costs = cost.measure(model, ("float32",), x, rounds=2)
    assert costs.layers == ("body/dense", "shared") and costs.formats == ("float32",)
    np.testing.assert_array_equal(costs.weight_bytes, [[4 * 3 * 16], [4 * 16]])
    np.testing.assert_array_equal(costs.runs, [3, 2])
    np.testing.assert_array_equal(costs.flops, [3 * 2 * 16, 5 * 2 * 16])
    np.testing.assert_array_equal(costs.activation_bytes, [[3 * 2 * 16], [5 * 2 * 16]])
    np.testing.assert_allclose(costs.seconds, [[3 * 1.5e-3], [2 * 1.5e-3]])
    # starting a program, one (2, 4) product that both layers share, one (2, 4, 4) product
    assert instant == {"compiled": 3, "timed": 3}
    # "shared" has two rows of narrow operands and eight: the rule picks "rows" for the first, "xla" or "flat" for the second
    by_rule = cost.measure(model, ("bfloat16",), x, rounds=1, implementation="rule")
    assert by_rule.implementations[1].tolist() == ["xla", "rows"] and by_rule.notes == ()


def test_medians_spread_and_casts_of_equal_layers_timed_once(instant):
    steps = []
    costs = measure("bfloat16", rounds=4, progress=lambda *step: steps.append(step))
    assert steps == [(1, 4, "stem"), (2, 4, "depthwise"), (3, 4, "first"), (4, 4, "head")]
    assert instant == {"compiled": 1 + 4 * 3, "timed": 1 + 4 * 3}
    # by turns: float32 (1, 2, 3, 4 ms), bfloat16 (2, 3, 4, 5 ms), bfloat16 without its cast (3, 4, 5, 6 ms)
    np.testing.assert_allclose(costs.seconds, np.tile([2.5e-3, 3.5e-3], (5, 1)))
    np.testing.assert_allclose(costs.spread, 1.5e-3)
    np.testing.assert_array_equal(costs.cast_seconds, 0)  # never below 0
    assert costs.overhead == pytest.approx(2.5e-3)
    at_edges = edges(*small())
    assert costs.boundary(at_edges).shape == (4, 2, 2)
    assert cost.predicted(costs, dict.fromkeys(NAMES, "bfloat16"), edges=at_edges) > 0


def test_timings_are_saved_after_each_product_and_used_by_other_format_sets(instant, tmp_path):
    def stop(number, total, layer):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure("bfloat16", cache=tmp_path, progress=stop)
    assert len(list(tmp_path.iterdir())) == 1 + 2 * 2
    before = dict(instant)
    first = measure("bfloat16", cache=tmp_path)
    assert instant == {name: count + 2 * 3 for name, count in before.items()}
    again = measure("float16", "bfloat16", cache=tmp_path)  # float16 alone is timed, with and without its cast
    assert instant == {name: count + 2 * 3 + 4 * 2 for name, count in before.items()}
    np.testing.assert_array_equal(again.seconds[:, [0, 2]], first.seconds)
    assert again.overhead == first.overhead


def test_what_cannot_be_timed_is_noted(instant, monkeypatch):
    """float16_acc16 has bytes but no seconds; what does not compile has none, either."""
    costs = measure("float16_acc16")
    assert np.isfinite(costs.seconds[:, 0]).all() and np.isnan(costs.seconds[:, 1]).all()
    assert np.isnan(costs.spread[:, 1]).all() and np.isnan(costs.cast_seconds[:, 1]).all()
    assert (costs.weight_bytes[:, 1] * 2 == costs.weight_bytes[:, 0]).all() and (costs.flops > 0).all()
    (note,) = costs.notes
    assert note.startswith("float16_acc16 was not timed: XLA runs an emulation")
    with pytest.raises(ValueError, match="'stem' was not timed in float16_acc16"):
        cost.predicted(costs, {"stem": "float16_acc16"})
    assert cost.predicted(costs, {}) > 0
    ready = timing.ready

    def refusing(function, arguments, options):
        if arguments[0].dtype == jnp.float16 and arguments[0].ndim == 4:
            raise NotImplementedError("no float16 convolution\nat all")
        return ready(function, arguments, options)

    monkeypatch.setattr(timing, "ready", refusing)
    costs = measure("float16")
    np.testing.assert_array_equal(np.isnan(costs.seconds), [[False, name in NAMES[:2]] for name in NAMES])
    assert costs.notes[0] == "stem in float16 was not timed: it does not compile here (no float16 convolution)"
    assert len(costs.notes) == 2


def test_it_really_times_every_format(tmp_path):
    formats = ("bfloat16", "float16", "float8_e4m3fn")
    costs = measure(*formats, rounds=2, cache=tmp_path)
    assert costs.notes == ()
    assert (costs.seconds > 0).all() and costs.overhead > 0
    assert (costs.cast_seconds >= 0).all() and (costs.cast_seconds <= costs.seconds).all()
    assert (costs.cast_seconds[:, 0] == 0).all()
    np.testing.assert_allclose(costs.product_seconds + costs.cast_seconds, costs.seconds)
    np.testing.assert_array_equal(measure(*formats, rounds=2, cache=tmp_path).seconds, costs.seconds)


# a -> b, a -> c, b -> c, in four formats, of which two share their operand dtype
KNOWN = cost.Costs(
    layers=("a", "b", "c"),
    formats=("float32", "bfloat16", "float16", "float16_acc16"),
    examples=1,
    weight_bytes=np.ones((3, 4), np.int64),
    activation_bytes=np.ones((3, 4), np.int64),
    flops=np.ones(3, np.int64),
    runs=np.array([1, 1, 2]),
    seconds=np.array([[10.0, 6.0, 7.0, np.nan], [20.0, 12.0, 13.0, 14.0], [30.0, 20.0, 21.0, 22.0]]),
    spread=np.zeros((3, 4)),
    cast_seconds=np.array([[0.0, 1.0, 2.0, np.nan], [0.0, 3.0, 4.0, 5.0], [0.0, 6.0, 8.0, 9.0]]),
    overhead=0.5,
)
EDGES = (("a", "b"), ("a", "c"), ("b", "c"))


def test_casts_at_boundaries():
    casts = KNOWN.boundary(EDGES)
    assert casts.shape == (3, 4, 4)
    np.testing.assert_array_equal(casts[0], [[0, 3, 4, 5], [0, 0, 4, 5], [0, 3, 0, 0], [0, 3, 0, 0]])
    np.testing.assert_array_equal(casts[1], casts[2])  # c reads two layers, and casts their sum once
    np.testing.assert_array_equal(casts[1][0], [0, 3, 4, 4.5])
    assert KNOWN.boundary(()).shape == (0, 4, 4)
    with pytest.raises(KeyError, match="Unknown layer 'd'"):
        KNOWN.boundary([("a", "d")])


def test_predicted_totals():
    start = 0.5 * 3
    assert cost.predicted(KNOWN, {}) == cost.predicted(KNOWN, {}, edges=EDGES) == 60 - start
    mixed = {"a": "bfloat16", "b": "float16"}
    assert cost.predicted(KNOWN, mixed) == 6 + 13 + 30 - start
    assert cost.predicted(KNOWN, mixed, edges=EDGES) == 6 + 13 + 30 - start  # formats meet everywhere: nothing is saved
    same = dict.fromkeys("abc", "bfloat16")
    assert cost.predicted(KNOWN, same) == 38 - start
    assert cost.predicted(KNOWN, same, edges=EDGES) == 38 - 3 - 6 - start  # only the model's input is cast
    with pytest.raises(KeyError, match="Unknown layer 'z'"):
        cost.predicted(KNOWN, {"z": "bfloat16"})
    with pytest.raises(ValueError, match="No costs for float8_e5m2; these are for float32, bfloat16"):
        cost.predicted(KNOWN, {"a": "float8_e5m2"})


def test_table():
    rows = cost.table(KNOWN)
    assert len(rows) == 12
    counts = dict.fromkeys(("weight_bytes", "activation_bytes", "flops", "runs"), 1)
    times = {"seconds": 6.0, "spread": 0.0, "cast_seconds": 1.0, "product_seconds": 5.0, "vs_float32": 0.6}
    assert rows[1] == {"layer": "a", "format": "bfloat16", **counts, **times}
    assert rows[3]["seconds"] is None and rows[3]["vs_float32"] is None
    counted = cost.table(static("bfloat16"))
    assert counted[0]["seconds"] is None and counted[0]["flops"] == small()[0].layers[0].flops
    json.dumps(rows + counted, allow_nan=False)


@pytest.mark.parametrize("function", [cost.static, cost.measure])
def test_misuse_is_refused_before_anything_runs(instant, function):
    model, x = small()
    refused(
        ("Did you mean 'bfloat16'", function, model, ("bfloat",), x),
        ("more than once: float16", function, model, ("float16", "float16"), x),
        ("found none: pass one batch", function, model, ("float16",)),
        ("leading axis", function, model, ("float16",), x, x[:1]),
        ("shape", function, model, ("float16",), x[..., :2]),
        kind=Exception,
    )
    refused(
        ("at least one round, found rounds=0", lambda: measure("float16", rounds=0)),
        ("must be one of xla, rule, auto; found 'fast'", lambda: measure("float16", implementation="fast")),
    )
    assert instant == {"compiled": 0, "timed": 0}


@pytest.fixture
def made_up(monkeypatch):
    """Seconds by the program's name: of the first entry (start, end) that fits, else 2 ms. Returns (entries, names seen)."""
    seconds, seen = {}, []

    def entry(name):
        seen.append(name)
        fits = (s for (start, end), s in seconds.items() if name.startswith(start) and name.endswith(end))
        return timing.Entry(seconds=(next(fits, 0.002),), product_seconds=())

    monkeypatch.setattr(
        timing.Timings, "measure", lambda self, wanted: {key: entry(p.name) for key, p in wanted.items()}
    )
    return seconds, seen


def test_auto_times_every_implementation_and_leaves_the_rule_only_for_a_clearly_faster_one(made_up):
    """Rule: terms for the stem, shift for the depthwise convolution."""
    seconds, seen = made_up
    stem = "conv 2x8x8x3 * 3x3x3x8"
    seconds |= {(f"float32: {stem}", " as im2col"): 0.00185, (f"bfloat16: {stem}", " as im2col"): 0.001}
    costs = measure("bfloat16", implementation="auto")
    np.testing.assert_array_equal(costs.implementations[:2], [["terms", "im2col"], ["shift", "shift"]])
    np.testing.assert_allclose(costs.seconds[:2], [[0.002, 0.001], [0.002, 0.002]])
    assert costs.gain["stem", "float32"] == pytest.approx(0.00015)  # faster, but not clearly
    assert costs.gain["stem", "bfloat16"] == pytest.approx(0.001)
    assert costs.gain["depthwise", "float32"] == 0
    assert set(costs.gain) == {(name, fmt) for name in NAMES for fmt in ("float32", "bfloat16")}
    chosen = costs.implementation({"stem": "bfloat16"})
    assert (chosen["stem"], chosen["depthwise"]) == ("im2col", "shift")
    assert set(costs.implementations[2:].ravel()) <= {"xla", "rows"}  # all alike: as the rule says
    assert any(name.endswith("as im2col") for name in seen) and not any(name.endswith("as dot") for name in seen)


def test_each_choice_is_timed_as_it_says(made_up):
    _, seen = made_up
    plain = measure("bfloat16")  # "xla" by default
    assert (plain.implementations == "xla").all() and not any(" as " in name for name in seen)
    assert plain.implementation({"stem": "bfloat16"}) == dict.fromkeys(NAMES, "xla")
    by_rule = measure("bfloat16", implementation="rule")
    assert by_rule.implementations[0, 0] == "terms" and by_rule.implementations[1, 0] == "shift"
    with pytest.raises(ValueError, match=r"static ones: call cost\.measure"):
        static("bfloat16").implementation({})


def test_an_implementation_is_what_is_timed():
    """Really compiled: the program of each implementation differs."""
    (stem,) = (call for call in calls(*small()) if call.layer == "stem")
    texts = {}
    for implementation in ("xla", "im2col", "terms"):
        function, arguments = measuring._programs(FLOAT32, stem, implementation, False).whole
        texts[implementation] = jax.jit(function).lower(*arguments).as_text()
    assert "convolution" in texts["xla"] and "dot_general" in texts["im2col"] and len(set(texts.values())) == 3
    assert "convolution" not in texts["terms"] and "dot_general" not in texts["terms"]
