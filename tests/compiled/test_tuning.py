"""Choice by timing: what is chosen, cached, refused. Times are made up where a choice depends on them."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from mpjax import compiled, plan, search
from mpjax.apply import apply, with_implementation
from mpjax.compiled import building, tuning
from mpjax.xla import executable, timing

pytestmark = [
    pytest.mark.optimised,
    pytest.mark.usefixtures("relaxed_promotion"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the rule and the sets of options of a CPU"),
]

RULE = {"stem": "terms", "depthwise": "shift", "pointwise": "xla", "head": "xla"}
LOW = {"stem": "bfloat16", "pointwise": "bfloat16", "head": "bfloat16"}
# Alone, each of these implementations takes half of the rule's time.
ALONE = {"stem": "im2col", "depthwise": "xla", "pointwise": "dot"}
SHAPES = {"2x8x8x3 * 3x3x3x8": "stem", "2x4x4x8 * 3x3x1x8": "depthwise", "2x4x4x8 * 1x1x8x16": "pointwise"}


@pytest.fixture
def made_up(monkeypatch, cheap):
    """Whole programs take what the mapping `seconds` gives by the layers changed, and more under the second set of options.

    Also all trials that were timed. Layers alone take what ALONE says; nothing of these is compiled.
    """
    seconds, timed = {frozenset(): 10}, []

    def measure(self, wanted):
        def entry(described):
            layer = next((name for shape, name in SHAPES.items() if shape in described), None)
            implementation = described.rpartition(" as ")[2] if " as " in described else "xla"
            fast = layer is not None and implementation == ALONE[layer]
            return timing.Entry(seconds=(1e-3 if fast else 2e-3,), product_seconds=())

        return {key: entry(programs.name) for key, programs in wanted.items()}

    def in_turns(trials, rounds, **_):
        timed.extend(trials)
        return [[seconds.get(frozenset(trial.changes), 99) + (trial.options != cheap[0])] * rounds for trial in trials]

    monkeypatch.setattr(timing.Timings, "measure", measure)
    monkeypatch.setattr(timing, "in_turns", in_turns)
    return seconds, timed


@pytest.fixture
def sabotage(monkeypatch):
    """Of the whole programs (their first argument is the weights) those whose number is in the set returned are wrong."""
    real, wrong, built = executable.build, set(), []

    def build(function, arguments, options):
        program = real(function, arguments, options)
        if not isinstance(arguments[0], tuple):
            return program
        built.append(options)
        if len(built) - 1 not in wrong:
            return program
        return replace(program, function=lambda *args: jax.tree.map(lambda leaf: leaf * 1.01, program.function(*args)))

    monkeypatch.setattr(executable, "build", build)
    return wrong


@pytest.mark.parametrize("low", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_really_tunes(small, low):
    model, batches = small
    model = apply(model, LOW) if low else model
    result = tuning.tune(model, batches, rounds=2)
    assert tuple(result.implementation) == model.names and not result.reused and result.seconds > 0
    rule = building.implementations_of(with_implementation(model, "rule"), *batches[0])
    chosen = min((c for c in result.candidates if c.verified), key=lambda candidate: candidate.seconds)
    assert result.implementation == rule | chosen.changes and result.options == chosen.options
    flips = [{}] if low else [{}, {"pointwise": "dot"}]  # a 1x1 convolution in float32
    expected = [(options, flip) for options in executable.option_sets(narrow=low) for flip in flips]
    assert [(c.options, c.changes) for c in result.candidates[: len(expected)]] == expected
    assert all(c.seconds > 0 and c.spread >= 0 and str(c).startswith("rule") for c in result.candidates)
    program = compiled.compile(model, batches, implementation=result)
    assert program.implementation == result.implementation and program.options == result.options
    expected = model.call(model.params, *batches[1])["out"]
    atol = (program.verification.distance if low else 1e-5) * np.abs(expected).max()
    np.testing.assert_allclose(program(*batches[1])["out"], expected, atol=atol)


def whole(none, stem, depthwise, pointwise, together):
    singles = {frozenset([name]): time for name, time in zip(ALONE, (stem, depthwise, pointwise), strict=True)}
    return {frozenset(): none, **singles, frozenset(["stem", "pointwise"]): together}


@pytest.mark.parametrize(
    ("times", "changed"),
    [
        (whole(10, 8, 12, 9, 7), ["stem", "pointwise"]),  # two win in the program, and together more
        (whole(10, 8, 12, 9, 8.5), ["stem"]),  # two win, together less than one of them
        (whole(10, 11, 12, 9, None), ["pointwise"]),  # one wins in the program; nothing to combine
        (whole(10, 11, 12, 13, None), []),  # all win alone, none in the program
    ],
)
def test_implementations_are_chosen_by_what_they_do_in_the_program(small, made_up, cheap, monkeypatch, times, changed):
    model, batches = small
    seconds, timed = made_up
    seconds |= times
    monkeypatch.setattr(tuning, "_pointwise", lambda *_: {})
    result = tuning.tune(model, batches, rounds=1)
    assert result.implementation == RULE | {name: ALONE[name] for name in changed}
    assert result.options == cheap[0]  # the fastest set here
    assert all(trial.options == cheap[0] for trial in timed if trial.changes)
    assert {frozenset(trial.changes) for trial in timed} == {key for key, time in times.items() if time is not None}
    (chosen,) = (candidate for candidate in result.candidates if candidate.verified)
    assert dict(chosen.changes) == {name: ALONE[name] for name in changed}
    assert chosen.seconds == min(candidate.seconds for candidate in result.candidates)
    assert all(f"{name} {ALONE[name]}" in str(chosen) for name in changed)


def test_one_by_one_convolutions_are_tried_both_ways_together(small, made_up):
    model, batches = small
    made_up[0][frozenset(["pointwise"])] = 5
    result = tuning.tune(model, batches, rounds=1)
    assert result.implementation["pointwise"] == "dot"
    assert [dict(c.changes) for c in result.candidates[:4]] == [{}, {"pointwise": "dot"}] * 2
    assert tuning.from_json(json.loads(json.dumps(vars(result), default=vars))) == replace(result, reused=True)


def test_a_finished_choice_is_cached(small, made_up, tmp_path):
    model, batches = small
    _, timed = made_up
    cache = tmp_path / "tuned"
    first = tuning.tune(model, batches, rounds=2, cache=cache)
    count = len(timed)
    other = [(2 * x,) for (x,) in batches]  # of equal shapes
    for inputs in (batches, other):
        again = tuning.tune(model, inputs, rounds=2, cache=cache)
        assert again.reused and not first.reused and replace(again, reused=False) == first
    assert len(timed) == count
    for changed in (
        dict(model=apply(model, {"head": "bfloat16"})),
        dict(rounds=3),
        dict(model=apply(model, {}, activations="bfloat16")),
        dict(batches=[(x[:1],) for (x,) in batches]),
    ):
        assert not tuning.tune(**dict(model=model, batches=batches, rounds=2) | changed, cache=cache).reused, changed
    path = max(cache.glob("tuning-*.npz"), key=lambda path: path.stat().st_mtime)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="is damaged .* set aside"):
        assert not tuning.tune(model, [(x[:1],) for (x,) in batches], rounds=2, cache=cache).reused
    assert path.with_name(path.name + ".damaged").exists()


def test_a_choice_that_cannot_be_cached_is_returned_all_the_same(small, made_up, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert tuning.tune(*small, rounds=1, cache=tmp_path / "file").implementation


def test_progress_notes_and_activations(small, made_up):
    model, batches = small
    model = apply(model, {"stem": "float16_acc16"}, activations="bfloat16")  # is not timed alone
    seen = []
    result = tuning.tune(model, batches, rounds=1, progress=lambda *event: seen.append(event))
    assert seen[:4] == [(number, 4, f"layer {name}") for number, name in enumerate(model.names, start=1)]
    assert seen[4:8] == [(number, 4, "whole programs") for number in range(1, 5)]
    assert any(note.startswith("float16_acc16 was not timed") for note in result.notes)
    assert tuple(result.implementation) == model.names and result.activations == "bfloat16"
    assert compiled.compile(model.original, batches, implementation=result).activations == "bfloat16"


def test_a_wrong_program_is_not_chosen(small, made_up, cheap, sabotage, tmp_path):
    sabotage.update((0, 1))  # the fastest, and with its 1x1 convolution as a matrix product
    made_up[0][frozenset(["pointwise"])] = 10
    result = tuning.tune(*small, rounds=1)
    assert result.candidates[0].verified is result.candidates[1].verified is False and result.options == cheap[1]
    note, _ = (note for note in result.notes if ": differs by" in note)
    assert note.startswith(f"rule, {executable.name(cheap[0])}: differs by 0.01 (2-norm")
    (chosen,) = (candidate for candidate in result.candidates if candidate.verified)
    assert chosen.options == cheap[1] and result.implementation.items() >= chosen.changes.items()
    sabotage.update(range(100))
    with pytest.raises(compiled.MiscompiledError, match="No program agrees .* differs by 0.01"):
        tuning.tune(*small, rounds=1, cache=tmp_path)
    assert not list(tmp_path.glob("tuning-*"))


def test_a_program_that_does_not_compile_is_left_out_with_a_note(small, made_up, cheap, monkeypatch):
    real, refused = executable.build, [cheap[1]]

    def build(function, arguments, options):
        if options in refused:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel\nand more")
        return real(function, arguments, options)

    monkeypatch.setattr(executable, "build", build)
    result = tuning.tune(*small, rounds=1)
    assert f"rule, {executable.name(cheap[1])}: does not compile or run (INTERNAL: no such kernel)" in result.notes
    assert {str(candidate.options) for candidate in result.candidates} == {str(cheap[0])}
    refused.append(cheap[0])
    with pytest.raises(compiled.MiscompiledError, match="No program compiles here.*no such kernel"):
        tuning.tune(*small, rounds=1)


def test_a_choice_goes_into_a_plan_and_back(tmp_path):
    plain = plan.Plan(assignment=search.Assignment({"a": "bfloat16"}))
    with pytest.raises(ValueError, match="nothing was tuned"):
        tuning.from_plan(plain)
    choice = tuning.Tuning(implementation={"a": "rows"}, activations="bfloat16", options=executable.EXACT)
    plan.save(tuning.into_plan(plain, choice), tmp_path / "plan.json")
    assert tuning.from_plan(plan.load(tmp_path / "plan.json")) == choice
