"""Choice by timing: what is taken, what is kept, what is refused. Times are made up where a choice depends on them."""

import json
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import linen

from mpjax import apply, autotune, compiled, executable, plan, search, timing

pytestmark = [
    pytest.mark.optimised,
    pytest.mark.usefixtures("relaxed_promotion"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the rule and the sets of options of a CPU"),
]

NAMES = ("stem", "depthwise", "pointwise", "head")
LOW = {"stem": "bfloat16", "pointwise": "bfloat16", "head": "bfloat16"}


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.relu(nn.Conv(16, (1, 1), name="pointwise")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def small():
    return linen(Small(), 2, 16, 16, 3)


@pytest.fixture
def instant(monkeypatch):
    """Every program takes 1 ms, the first of those timed together a little less; counts what is timed."""
    counts = {"timed": 0}

    def in_turns(runs, rounds, **_):
        counts["timed"] += len(runs)
        return [[1e-3 + 1e-6 * number] * rounds for number in range(len(runs))]

    monkeypatch.setattr(timing, "in_turns", in_turns)
    return counts


@pytest.mark.parametrize("assignment", [None, LOW])
def test_it_really_tunes(small, assignment):
    model, batches = small
    model = model if assignment is None else apply.apply(model, assignment)
    found = autotune.tune(model, batches, rounds=3)
    assert tuple(found.lowering) == NAMES and not found.reused and found.seconds > 0
    assert found.activations == "float32"
    rule = autotune.ways_of(apply.lowered(model, "rule"), *batches[0])
    verified = [each for each in found.candidates if each.verified]
    chosen = min(verified, key=lambda each: each.seconds)
    assert found.lowering == rule | chosen.changes and found.options == chosen.options
    sets = executable.option_sets(narrow=assignment is not None)
    flips = [{}, {"pointwise": "dot"}] if assignment is None else [{}]  # a 1x1 convolution in float32
    expected = [(options, flip) for options in sets for flip in flips]
    assert [(each.options, each.changes) for each in found.candidates[: len(expected)]] == expected
    assert all(each.seconds > 0 and each.spread >= 0 for each in found.candidates)
    assert all(str(each).startswith("rule") for each in found.candidates)
    program = compiled.compile(model, batches, lowering=found)
    assert program.lowering == found.lowering and program.options == found.options
    for batch in batches:
        expected = model.call(model.params, *batch)
        atol = 1e-5 if assignment is None else program.verification.distance
        np.testing.assert_allclose(program(*batch), expected, atol=float(atol * jnp.abs(expected).max()))


@pytest.mark.slow
def test_a_finished_choice_is_kept(small, instant, tmp_path):
    model, batches = small
    first = autotune.tune(model, batches, rounds=2, cache=tmp_path / "tuned")
    timed = instant["timed"]
    again = autotune.tune(model, batches, rounds=2, cache=tmp_path / "tuned")
    assert again.reused and not first.reused and replace(again, reused=False) == first
    assert instant["timed"] == timed
    other = [(2 * x,) for (x,) in batches]  # of equal shapes
    assert autotune.tune(model, other, rounds=2, cache=tmp_path / "tuned").reused
    for changed in (
        dict(model=apply.apply(model, LOW)),
        dict(rounds=3),
        dict(activations=("float32", "bfloat16")),
        dict(batches=[(x[:1],) for (x,) in batches]),
    ):
        settings = dict(model=model, batches=batches, rounds=2) | changed
        found = autotune.tune(settings.pop("model"), settings.pop("batches"), cache=tmp_path / "tuned", **settings)
        assert not found.reused, changed
    assert autotune.tune(model, batches, rounds=2, cache=tmp_path / "tuned").reused


@pytest.mark.slow
def test_a_damaged_choice_is_set_aside(small, instant, tmp_path):
    model, batches = small
    first = autotune.tune(model, batches, rounds=1, cache=tmp_path)
    (path,) = tmp_path.glob("tuning-*.npz")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="is damaged .* set aside"):
        again = autotune.tune(model, batches, rounds=1, cache=tmp_path)
    assert not again.reused and again.lowering == first.lowering
    assert path.with_name(path.name + ".damaged").exists()
    assert autotune.tune(model, batches, rounds=1, cache=tmp_path).reused


@pytest.mark.slow
def test_progress_and_notes(small, instant):
    model, batches = small
    model = apply.apply(model, {"stem": "float16_acc16"})  # is not timed alone
    seen = []
    found = autotune.tune(model, batches, rounds=1, progress=lambda *each: seen.append(each))
    layers = [each for each in seen if each[2].startswith("layer ")]
    assert [what for *_, what in layers] == [f"layer {name}" for name in NAMES]
    assert [done for done, *_ in layers] == [1, 2, 3, 4] and {of for _, of, _ in layers} == {4}
    programs = seen[len(layers) :]
    sets = executable.option_sets(narrow=False)
    count = 2 * len(sets)
    assert programs[:count] == [(n + 1, count, "whole programs") for n in range(count)]
    assert any(note.startswith("float16_acc16 was not timed") for note in found.notes)
    assert tuple(found.lowering) == NAMES


class Shared(nn.Module):
    few_first: bool

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name="shared")
        few, many = x, jnp.stack([x, x, x, x], axis=1)
        first, second = (few, many) if self.few_first else (many, few)
        return shared(first).sum() + shared(second).sum() + jnp.zeros(x.shape[0])


@pytest.mark.parametrize("few_first", [True, False])
def test_a_shared_layer_has_its_first_runs_way(few_first):
    model, batches = linen(Shared(few_first=few_first), 2, 4)
    mixed = apply.apply(model, {"shared": "bfloat16"}, lowering="rule")
    assert autotune.ways_of(mixed, *batches[0]) == {"shared": "rows" if few_first else "xla"}
    assert autotune.ways_of(model, *batches[0]) == {"shared": "xla"}
    assert autotune.ways_of(apply.lowered(model, {"shared": "rows"}), *batches[0]) == {"shared": "rows"}


@pytest.fixture
def sabotage(monkeypatch):
    """Of the whole programs (their first argument is the weights) those whose number is in the set returned are wrong."""
    real, wrong, built = executable.build, set(), []

    def build(function, arguments, options):
        found = real(function, arguments, options)
        if not isinstance(arguments[0], tuple):
            return found
        built.append(options)
        if len(built) - 1 not in wrong:
            return found
        return replace(found, function=lambda *args: jax.tree.map(lambda leaf: leaf * 1.01, found.function(*args)))

    monkeypatch.setattr(executable, "build", build)
    return wrong


def test_a_wrong_program_is_not_chosen(small, instant, sabotage):
    model, batches = small
    sabotage.update((0, 1))  # the fastest, and with its 1x1 convolution as a matrix product
    found = autotune.tune(model, batches, rounds=1)
    sets = executable.option_sets(narrow=False)
    assert found.candidates[0].verified is found.candidates[1].verified is False and found.options == sets[1]
    note, _ = (note for note in found.notes if ": differs by" in note)
    assert note.startswith(f"rule, {executable.name(sets[0])}: differs by 0.01 (2-norm")
    (chosen,) = (each for each in found.candidates if each.verified)
    assert chosen.options == sets[1] and found.lowering.items() >= chosen.changes.items()


def test_no_right_program_is_an_error(small, instant, sabotage, tmp_path):
    model, batches = small
    sabotage.update(range(100))
    with pytest.raises(autotune.MiscompiledError, match="No program agrees .* differs by 0.01"):
        autotune.tune(model, batches, rounds=1, cache=tmp_path)
    assert not list(tmp_path.glob("tuning-*"))


def test_what_does_not_compile_is_left_out_with_a_note(small, instant, monkeypatch):
    model, batches = small
    real, sets = executable.build, executable.option_sets(narrow=False)

    def build(function, arguments, options):
        if options == sets[1]:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel\nand more")
        return real(function, arguments, options)

    monkeypatch.setattr(executable, "build", build)
    found = autotune.tune(model, batches, rounds=1)
    assert f"rule, {executable.name(sets[1])}: does not compile or run (INTERNAL: no such kernel)" in found.notes
    assert sets[1] not in [each.options for each in found.candidates] and found.options == sets[0]


# Alone, each of these ways takes half of the rule's time (stem: terms; depthwise: shift; pointwise: xla).
ALONE = {"stem": "im2col", "depthwise": "xla", "pointwise": "dot"}
SHAPES = {"2x16x16x3 * 3x3x3x8": "stem", "2x8x8x8 * 3x3x1x8": "depthwise", "2x8x8x8 * 1x1x8x16": "pointwise"}


@pytest.fixture
def made_up(monkeypatch):
    """Whole programs take what the mapping returned says, by the layers whose way is changed; also all that were timed."""
    seconds, timed, current = {}, [], []

    def of(self, wanted):
        found = {}
        for key, each in wanted.items():
            layer = next((name for shape, name in SHAPES.items() if shape in each.name), None)
            way = each.name.rpartition(" as ")[2] if " as " in each.name else "xla"
            fast = layer is not None and way == ALONE[layer]
            found[key] = timing.Entry(seconds=(1e-3 if fast else 2e-3,), product_seconds=())
        return found

    real = autotune._Trials.of

    def trials(self, wanted):
        current[:] = wanted
        timed.extend(wanted)
        return real(self, wanted)

    def in_turns(runs, rounds, **_):
        assert len(runs) == len(current)
        return [
            [seconds[frozenset(changes)] + (0 if options == executable.EXACT else 1)] * rounds
            for changes, _, options in current
        ]

    monkeypatch.setattr(timing.Timings, "of", of)
    monkeypatch.setattr(autotune, "_pointwise", lambda *_: {})
    monkeypatch.setattr(autotune._Trials, "of", trials)
    monkeypatch.setattr(timing, "in_turns", in_turns)
    return seconds, timed


def whole(none, stem, depthwise, pointwise, together):
    singles = {frozenset([name]): each for name, each in zip(ALONE, (stem, depthwise, pointwise), strict=True)}
    return {frozenset(): none, **singles, frozenset(["stem", "pointwise"]): together}


@pytest.mark.parametrize(
    ("seconds", "changed"),
    [
        (whole(10, 8, 12, 9, 7), ["stem", "pointwise"]),  # two win in the program, and together more
        (whole(10, 8, 12, 9, 8.5), ["stem"]),  # two win, together less than one of them
        (whole(10, 11, 12, 9, None), ["pointwise"]),  # one wins in the program; nothing to combine
        (whole(10, 11, 12, 13, None), []),  # all win alone, none in the program
    ],
)
def test_ways_are_taken_for_what_they_do_in_the_program(small, made_up, seconds, changed):
    model, batches = small
    made, timed = made_up
    made |= seconds
    found = autotune.tune(model, batches, rounds=1)
    rule = autotune.ways_of(apply.lowered(model, "rule"), *batches[0])
    assert rule == {"stem": "terms", "depthwise": "shift", "pointwise": "xla", "head": rule["head"]}
    assert found.lowering == rule | {name: ALONE[name] for name in changed}
    assert found.options == executable.EXACT  # the fastest set here
    assert all(options == executable.EXACT for changes, _, options in timed if changes)
    assert {frozenset(changes) for changes, *_ in timed} == {each for each, s in seconds.items() if s is not None}
    (chosen,) = (each for each in found.candidates if each.verified)
    assert dict(chosen.changes) == {name: ALONE[name] for name in changed}
    assert chosen.seconds == min(each.seconds for each in found.candidates)
    assert all(f"{name} {ALONE[name]}" in str(chosen) for name in changed)
    program = compiled.compile(model, batches, lowering=found)
    assert program.lowering == found.lowering and program.options == executable.EXACT
    expected = model.call(model.params, *batches[1])
    np.testing.assert_allclose(program(*batches[1]), expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_one_by_one_convolutions_are_tried_both_ways_together(small, monkeypatch):
    model, batches = small
    real, current = autotune._Trials.of, []

    def trials(self, wanted):
        current[:] = wanted
        return real(self, wanted)

    monkeypatch.setattr(autotune._Trials, "of", trials)
    monkeypatch.setattr(
        timing, "in_turns", lambda runs, rounds, **_: [[1.0 if "pointwise" in each[0] else 2.0] for each in current[: len(runs)]]
        if len(runs) == len(current) else [[1.0]] * len(runs)
    )  # fmt: skip
    found = autotune.tune(model, batches, rounds=1)
    assert found.lowering["pointwise"] == "dot"
    assert autotune._pointwise(model, autotune.ways_of(apply.lowered(model, "rule"), *batches[0]), batches[0]) == {
        "pointwise": "dot"
    }


@pytest.mark.slow
def test_narrow_activations_are_tried_and_said(small, instant):
    model, batches = small
    mixed = apply.apply(model, LOW)
    found = autotune.tune(mixed, batches, rounds=1, activations=("bfloat16", "float32"))
    assert {each.activations for each in found.candidates} == {"bfloat16", "float32"}
    assert found.activations == "bfloat16"  # first, so the fastest here
    assert compiled.compile(mixed, batches, lowering=found).activations == "bfloat16"


def test_misuse_is_refused(small):
    model, batches = small
    with pytest.raises(ValueError, match="activations="):
        autotune.tune(model, batches, activations=())
    with pytest.raises(ValueError, match="activations must be"):
        autotune.tune(model, batches, activations=("float64",))


def test_fewer_than_two_inputs_are_refused(small, instant):
    model, batches = small
    with pytest.raises(ValueError, match="at least two"):
        autotune.tune(model, batches[:1], rounds=1)


def test_a_choice_is_plain_json(small, instant):
    model, batches = small
    found = autotune.tune(model, batches, rounds=1)
    fields = vars(found) | {"candidates": [vars(each) for each in found.candidates]}
    assert replace(autotune._from_json(json.loads(json.dumps(fields))), reused=False) == found


class Vectors(nn.Module):
    biases: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, use_bias=self.biases > 0, name="first")(x))
        x = nn.relu(nn.Dense(8, use_bias=self.biases > 1, name="second")(x))
        return nn.Dense(8, use_bias=self.biases > 2, name="third")(x)


@pytest.mark.parametrize("biases", [0, 1, 2, 3])
def test_weights_and_vectors_reach_their_places(biases):
    module = Vectors(biases=biases)
    model, batches = linen(module, 4, 8)
    keys = iter(jax.random.split(jax.random.key(5), 100))
    params = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), model.params)
    model = replace(model, params=params)
    function, arguments = autotune.as_function(model, batches[0])
    np.testing.assert_array_equal(function(*arguments), model.call(params, *batches[0]))


def test_a_choice_goes_into_a_plan_and_back(tmp_path):
    plain = plan.Plan(assignment=search.Assignment({"a": "bfloat16"}))
    with pytest.raises(ValueError, match="nothing was tuned"):
        autotune.from_plan(plain)
    choice = autotune.Tuning(lowering={"a": "rows"}, activations="bfloat16", options=executable.EXACT)
    plan.save(autotune.into_plan(plain, choice), tmp_path / "plan.json")
    assert autotune.from_plan(plan.load(tmp_path / "plan.json")) == choice


@pytest.mark.slow
def test_a_choice_that_cannot_be_kept_is_given_all_the_same(small, instant, tmp_path):
    model, batches = small
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert autotune.tune(model, batches, rounds=1, cache=tmp_path / "file").lowering


def test_no_program_that_compiles_says_why(small, instant, monkeypatch):
    model, batches = small

    def refuse(function, arguments, options):
        raise jax.errors.JaxRuntimeError("INTERNAL: not today")

    monkeypatch.setattr(executable, "build", refuse)
    with pytest.raises(autotune.MiscompiledError, match="No program compiles here.*not today"):
        autotune.tune(model, batches, rounds=1)
