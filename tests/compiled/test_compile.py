"""Compiled programs: verified, honest about dtypes; a wrong program is caught; the fastest is chosen."""

from dataclasses import replace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from toys import linen

from mpjax import arithmetic, compiled
from mpjax.apply import apply, with_implementation
from mpjax.compiled import building, tuning
from mpjax.program import with_output
from mpjax.xla import executable, timing

pytestmark = [pytest.mark.optimised, pytest.mark.usefixtures("relaxed_promotion")]
FLOAT32_BYTES = 4 * (27 * 8 + 8 + 9 * 8 + 8 + 8 * 16 + 16 + 16 * 3 + 3)


def test_a_float32_program_equals_the_model(small, float32_program):
    model, batches = small
    chex.assert_trees_all_close(
        float32_program(*batches[0]), model.call(model.params, *batches[0]), rtol=1e-4, atol=1e-6
    )
    verification = float32_program.verification
    assert verification.agrees and verification.limit == verification.noise < 1e-4
    assert set(float32_program.assignment.values()) == {"float32"}
    assert {executed.result for executed in float32_program.executed.values()} == {"float32"}


def test_a_mixed_program_is_near_its_definition_and_names_what_runs(small, mixed_program):
    model, batches = small
    verification = mixed_program.verification
    assert verification.agrees and 0 < verification.distance < 0.05
    assert verification.program_distance > verification.distance / 2  # the roundings are there
    assert mixed_program.options["xla_allow_excess_precision"] is False
    out, expected = mixed_program(*batches[0])["out"], model.call(model.params, *batches[0])["out"]
    assert not np.array_equal(out, expected)
    np.testing.assert_allclose(out, expected, atol=0.05)
    assert dict(mixed_program.assignment) == {
        "stem": "float32",
        "depthwise": "float32",
        "pointwise": "bfloat16",
        "head": "float16",
    }
    assert list(mixed_program.executed) == list(model.names)
    for name, executed in mixed_program.executed.items():
        assert executed.opcode != "unknown", name
        assert set(executed.operands.split("+")) <= {"float32", "bfloat16", "float16"}, name
    assert mixed_program.executed["stem"].operands == "float32"
    assert mixed_program.weight_bytes == FLOAT32_BYTES - 2 * (8 * 16 + 16 * 3)
    assert mixed_program.peak_bytes >= mixed_program.weight_bytes and mixed_program.compile_seconds > 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the rule of a CPU")
def test_implementations_by_word_or_by_layer(small, cheap):
    model, batches = small
    rule = {"stem": "terms", "depthwise": "shift", "pointwise": "xla", "head": "xla"}
    by_layer = dict.fromkeys(model.names, "xla") | {"pointwise": "dot"}
    for implementation, expected in (("rule", rule), ({"pointwise": "dot"}, by_layer)):
        program = compiled.compile(model, batches, implementation=implementation)
        assert program.implementation == expected
        outputs, truth = program(*batches[1]), model.call(model.params, *batches[1])
        chex.assert_trees_all_close(outputs, truth, rtol=1e-4, atol=1e-5)


def test_auto_of_the_model_or_of_the_call_tunes(small, cheap, monkeypatch):
    model, batches = small
    chosen = {"stem": "im2col", "depthwise": "xla", "pointwise": "dot", "head": "xla"}
    calls = []

    def tune(model, batches, **options):
        calls.append(options)
        return tuning.Tuning(implementation=chosen, activations="float32", options=cheap[1])

    monkeypatch.setattr(tuning, "tune", tune)
    by_model = compiled.compile(apply(model, {"head": "bfloat16"}, implementation="auto"), batches, cache="kept")
    by_call = compiled.compile(model, batches, implementation="auto")
    assert [options["cache"] for options in calls] == ["kept", None]
    for program in (by_model, by_call):
        assert program.implementation == chosen
        assert executable.name(program.options) == executable.name(cheap[1]) and program.verification.agrees
    assert by_model.assignment["head"] == "bfloat16"
    compiled.compile(model, batches)  # the model says "xla"
    assert len(calls) == 2


def test_layers_that_the_kept_outputs_do_not_need_are_dropped(small, mixed_program, cheap, tmp_path):
    model, batches = small
    mixed = apply(model, {"pointwise": "bfloat16", "head": "float16"})
    program = compiled.compile(mixed, batches, outputs=("mean",))
    assert program.dropped == ("head",) and mixed_program.dropped == ()
    assert program.weight_bytes == mixed_program.weight_bytes - (16 * 3 * 2 + 3 * 4)
    assert not any(weight.shape == (16, 3) for weight in program.weights)
    loaded = compiled.load(program.export(tmp_path / "mean.mpjax"))
    assert len(loaded.weights) == len(program.weights) == len(mixed_program.weights) - 1
    for batch in batches:
        assert set(program(*batch)) == {"mean"}
        np.testing.assert_allclose(program(*batch)["mean"], mixed_program(*batch)["mean"], rtol=1e-2)
        chex.assert_trees_all_equal(loaded(*batch), program(*batch))
    rows = {row["layer"]: row for row in program.report().rows}
    assert rows["head"]["dropped"] and not rows["stem"]["dropped"]
    assert (rows["head"]["weight_bytes"], rows["head"]["flops"], rows["head"]["executed"]) == (0, 0, None)
    assert "dropped" in str(program.report())


def test_other_options_are_tried_where_a_program_fails_or_is_wrong(small, monkeypatch):
    """The first set does not compile, the program of the second is sabotaged; of the third one option is unknown."""
    model, batches = small
    sets = ({}, executable.EXACT, executable.PLAIN | {"xla_no_such_option": "1"})
    real, built = executable.build, []

    def build(function, arguments, options):
        if options == executable.PLAIN:  # the reference
            return real(function, arguments, options)
        built.append(options)
        if options == {}:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")
        program = real(function, arguments, executable.PLAIN if options == executable.EXACT else options)
        if options != executable.EXACT:
            return program
        wrong = lambda *args: jax.tree.map(lambda leaf: leaf * 1.01, program.function(*args))  # noqa: E731
        return replace(program, function=wrong, options=options)

    monkeypatch.setattr(executable, "build", build)
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: sets)
    program = compiled.compile(model, batches)
    assert built == list(sets) and program.verification.agrees
    assert "xla_no_such_option" in program.skipped and program.options.items() <= executable.PLAIN.items()
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: sets[:2])
    reasons = "YNN: does not compile or run .INTERNAL: no such thing.; YNN: differs by 0.01"
    with pytest.raises(compiled.MiscompiledError, match=f"No compiled program agrees with its definition. {reasons}"):
        compiled.compile(model, batches)


def test_an_implementation_that_computes_something_else_is_refused(small, cheap, monkeypatch):
    model, batches = small
    real = arithmetic.executed

    def executed(*arguments, implementation, **more):
        return real(*arguments, implementation=implementation, **more) * (2 if implementation == "im2col" else 1)

    monkeypatch.setattr(arithmetic, "executed", executed)
    model = apply(model, dict.fromkeys(model.names, "bfloat16"))
    with pytest.raises(compiled.MiscompiledError, match="differs by"):
        compiled.compile(model, batches, implementation={"stem": "im2col"})
    assert compiled.compile(model, batches).verification.agrees


@pytest.mark.parametrize(("times", "chosen"), [(0.5, "mixed"), (0.995, "float32"), (1.5, "float32")])
def test_the_fastest_is_float32_unless_another_is_clearly_faster(
    small, float32_program, mixed_program, monkeypatch, times, chosen
):
    reference = [1.0, 2.0, 1.0, 1.0, 4.0]
    mixed = [times * seconds + 0.1 * (seconds == 4) for seconds in reference]
    monkeypatch.setattr(timing, "in_turns", lambda runs, rounds, shortest: [reference, mixed])
    programs = {"float32": float32_program, "mixed": mixed_program}
    result = compiled.fastest(programs, *small[1][0])
    assert result.name == chosen and result.program is programs[chosen]
    assert result.seconds == {"float32": 1.0, "mixed": times} and result.spread == {"float32": 1.0, "mixed": times}
    assert result.ratio == {"float32": 1.0, "mixed": times}
    assert result.ratio_spread["float32"] == 0 and result.ratio_spread["mixed"] < 1e-6


class Shared(nn.Module):
    few_first: bool

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name="shared")
        few, many = x, jnp.stack([x, x, x, x], axis=1)
        first, second = (few, many) if self.few_first else (many, few)
        return shared(first).sum() + shared(second).sum() + jnp.zeros(x.shape[0])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the rule of a CPU")
@pytest.mark.parametrize("few_first", [True, False])
def test_a_shared_layer_has_its_first_runs_implementation(few_first):
    model, (inputs, _) = linen(Shared(few_first=few_first), 2, 4)
    mixed = apply(model, {"shared": "bfloat16"}, implementation="rule")
    by_layer = with_implementation(model, {"shared": "rows"})  # covers products of few rows only
    for variant in (mixed, by_layer):
        assert building.implementations_of(variant, *inputs) == {"shared": "rows" if few_first else "xla"}
    assert building.implementations_of(model, *inputs) == {"shared": "xla"}


@pytest.mark.parametrize("biases", [0, 1, 3])
def test_weights_and_vectors_reach_their_places(biases):
    model, (inputs, _) = linen(nn.Sequential([nn.Dense(8, use_bias=biases > n) for n in range(3)]), 4, 8)
    function, arguments = building.as_function(model, inputs)
    assert len(arguments[0]) == (3, 4, None, 4)[biases]
    np.testing.assert_array_equal(function(*arguments), model.call(model.params, *inputs))


def test_a_program_is_never_compiled_a_second_time_by_calling_it(small, mixed_program):
    (x,) = small[1][0]
    expected = mixed_program(x)
    events = []
    listen = lambda event, *_, **more: events.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        chex.assert_trees_all_equal(mixed_program(np.asarray(x)), expected)
        with jax.default_matmul_precision("float32"):
            chex.assert_trees_all_equal(mixed_program(x), expected)
        jax.clear_caches()
        chex.assert_trees_all_equal(mixed_program(x), expected)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert "/jax/core/compile/backend_compile_duration" not in events


def test_wrong_calls_are_refused(small, mixed_program):
    model, batches = small
    (x,) = batches[0]

    def compile(batches=batches, **options):
        return lambda: compiled.compile(model, batches, **options)

    one_output = with_output(model, lambda out: out["out"])
    refused(
        ("at least two", compile(batches[:1])),
        ("implementation must be", compile(implementation="fast")),
        ("at least one output", compile(outputs=())),
        ("needs a model that returns a mapping", lambda: compiled.compile(one_output, batches, outputs=("out",))),
        ("fixed shapes", mixed_program, x[:1]),
        ("at least one program", compiled.fastest, {}, x),
        ("a program is compiled for fixed shapes", compiled.fastest, {"mixed": mixed_program}, x[:, 1:]),
    )
    refused(
        ("Unknown layer 'stam'", compile(implementation={"stam": "dot"})),
        (r"Unknown outputs nose\. Known: .*mean", compile(outputs=("nose",))),
        kind=KeyError,
    )
    called = lambda x: mixed_program(x)  # noqa: E731
    for transformed, argument in ((jax.jit(called), x), (jax.vmap(called), x[None])):
        refused(("cannot be called under jit, vmap or grad", transformed, argument), kind=TypeError)
