"""Compiled programs: verified, honest about dtypes, exported and loaded; a wrong program is caught."""

import json
import zipfile
from contextlib import contextmanager
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax import apply, autotune, compiled, executable, hlo, lowering, models, profiling, timing, verification

pytestmark = [pytest.mark.optimised, pytest.mark.usefixtures("relaxed_promotion")]


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.relu(nn.Conv(16, (1, 1), name="pointwise")(x))
        return {"out": nn.Dense(3, name="head")(x.mean((1, 2))), "mean": x.mean((1, 2, 3))}


@pytest.fixture(scope="module")
def small():
    keys = jax.random.split(jax.random.key(0), 3)
    batches = [(jax.random.normal(key, (2, 16, 16, 3), jnp.float32),) for key in keys[1:]]
    model = models.from_linen(Small(), Small().init(keys[0], *batches[0]), *batches[0])
    return model, batches


@pytest.fixture(scope="module")
def mixed_program(small):
    model, batches = small
    return compiled.compile(apply.apply(model, {"pointwise": "bfloat16", "head": "float16"}), batches)


def test_a_float32_program_equals_the_model(small):
    model, batches = small
    program = compiled.compile(model, batches)
    found, expected = program(*batches[0]), model.call(model.params, *batches[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    assert program.verification.agrees and program.verification.limit == program.verification.noise < 1e-4
    assert set(program.assignment.values()) == {"float32"}
    assert {each.result for each in program.executed.values()} == {"float32"}


def test_a_mixed_program_is_near_its_definition(small, mixed_program):
    model, batches = small
    assert mixed_program.verification.agrees
    assert 0 < mixed_program.verification.distance < 0.05
    expected = model.call(model.params, *batches[0])["out"]
    assert not np.array_equal(mixed_program(*batches[0])["out"], expected)
    np.testing.assert_allclose(mixed_program(*batches[0])["out"], expected, atol=0.05)


def test_it_says_what_was_asked_for_and_what_runs(mixed_program):
    assert mixed_program.assignment == {"stem": "float32", "pointwise": "bfloat16", "head": "float16"}
    assert set(mixed_program.executed) == {"stem", "pointwise", "head"}
    known = {"float32", "bfloat16", "float16"}
    for name, each in mixed_program.executed.items():
        assert each.opcode != "unknown" and set(each.operands.split("+")) <= known, (name, each)
    assert mixed_program.executed["stem"].operands == "float32"
    bytes_float32 = 4 * (27 * 8 + 8 + 8 * 16 + 16 + 16 * 3 + 3)
    assert mixed_program.weight_bytes == bytes_float32 - 2 * (8 * 16 + 16 * 3)
    assert mixed_program.peak_bytes >= mixed_program.weight_bytes
    assert mixed_program.compile_seconds > 0


def test_export_and_load_round_trip(small, mixed_program, tmp_path):
    _, batches = small
    path = mixed_program.export(tmp_path / "mixed.mpjax")
    function = compiled.load(path)
    found, expected = function(*batches[1]), mixed_program(*batches[1])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [each.name for each in tmp_path.iterdir()] == ["mixed.mpjax"]
    assert isinstance(function, compiled.Loaded)
    assert function.assignment == mixed_program.assignment and function.lowering == mixed_program.lowering
    assert function.program.options == mixed_program.options == function.header["options"]
    assert [each.dtype for each in function.weights] == [each.dtype for each in mixed_program.weights]
    jax.tree.map(np.testing.assert_array_equal, function.weights, mixed_program.weights)
    with pytest.raises(ValueError, match="compile again"):
        function(batches[0][0][:1])


@pytest.mark.parametrize("lowering", ["xla", "rule", {"pointwise": "dot"}])
def test_lowering_by_word_or_by_layer(small, lowering):
    model, batches = small
    program = compiled.compile(model, batches, lowering=lowering)
    if isinstance(lowering, dict):
        assert program.lowering == {"stem": "xla", "pointwise": "dot", "head": "xla"}
    elif lowering == "rule":
        assert program.lowering["pointwise"] == "xla" and program.lowering["stem"] != "xla"
    else:
        assert program.lowering == dict.fromkeys(model.names, lowering)
    for batch in batches:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            program(*batch),
            model.call(model.params, *batch),
        )
    with pytest.raises(ValueError, match="lowering must be"):
        compiled.compile(model, batches, lowering="fast")
    with pytest.raises(KeyError, match="Unknown layer 'stam'"):
        compiled.compile(model, batches, lowering={"stam": "dot"})


def test_auto_of_the_model_or_of_the_call_tunes(small, monkeypatch):
    model, batches = small
    calls = []

    def tune(model, batches, **options):
        calls.append(options)
        ways = {"stem": "im2col", "pointwise": "dot", "head": "xla"}
        return autotune.Tuning(
            lowering=ways, activations="float32", options=executable.EXACT, candidates=(), seconds=0.0
        )

    monkeypatch.setattr(autotune, "tune", tune)
    by_model = compiled.compile(apply.apply(model, {"head": "bfloat16"}, lowering="auto"), batches, cache="kept")
    by_call = compiled.compile(model, batches, lowering="auto")
    assert [each["cache"] for each in calls] == ["kept", None]
    assert all(each["activations"] == ("float32",) for each in calls)
    for program in (by_model, by_call):
        assert program.lowering == {"stem": "im2col", "pointwise": "dot", "head": "xla"}
        assert program.options == executable.EXACT and program.verification.agrees
    assert by_model.assignment["head"] == "bfloat16"
    compiled.compile(model, batches)  # the model says "xla"
    assert len(calls) == 2


@pytest.mark.parametrize("mixed", [False, True])
def test_layers_that_the_kept_outputs_do_not_need_are_dropped(small, tmp_path, mixed):
    model, batches = small
    model = apply.apply(model, {"pointwise": "bfloat16", "head": "float16"}) if mixed else model
    whole = compiled.compile(model, batches)
    program = compiled.compile(model, batches, outputs=("mean",))
    assert program.dropped == ("head",) and whole.dropped == ()
    assert program.weight_bytes == whole.weight_bytes - (16 * 3 * (2 if mixed else 4) + 3 * 4)
    assert len(program.weights) < len(whole.weights)
    assert not any(each.shape == (16, 3) for each in program.weights)
    loaded = compiled.load(program.export(tmp_path / "mean.mpjax"))
    for batch in batches:
        assert set(program(*batch)) == {"mean"}
        scale = np.abs(whole(*batch)["mean"]).max()
        np.testing.assert_allclose(program(*batch)["mean"], whole(*batch)["mean"], atol=1e-3 * scale)
        np.testing.assert_array_equal(loaded(*batch)["mean"], program(*batch)["mean"])
    assert len(loaded.weights) == len(program.weights)
    rows = {row["layer"]: row for row in program.report().rows}
    assert rows["head"]["dropped"] and not rows["stem"]["dropped"]
    assert (rows["head"]["weight_bytes"], rows["head"]["flops"], rows["head"]["executed"]) == (0, 0, None)
    assert "dropped" in str(program.report())
    both = compiled.compile(model, batches, outputs=("mean", "out"))
    assert both.dropped == () and set(both(*batches[0])) == {"mean", "out"}


def test_outputs_that_cannot_be_kept_are_refused(small):
    model, batches = small
    with pytest.raises(KeyError, match=r"Unknown outputs nose\. Known: .*mean"):
        compiled.compile(model, batches, outputs=("nose",))
    with pytest.raises(ValueError, match="at least one output"):
        compiled.compile(model, batches, outputs=())
    with pytest.raises(ValueError, match="needs a model that returns a mapping"):
        compiled.compile(models.with_output(model, lambda out: out["out"]), batches, outputs=("out",))


@pytest.mark.parametrize("shares", [False, True])
def test_the_report_says_what_was_asked_for_and_what_runs(small, mixed_program, shares, monkeypatch):
    model, batches = small
    seconds = {"stem": 3e-3, "pointwise": 1e-3, profiling.OUTSIDE: 1e-3}
    monkeypatch.setattr(profiling, "layer_seconds", lambda run, text, layers: (run(), seconds)[1])
    report = mixed_program.report(*(batches[0] if shares else ()))
    assert [row["layer"] for row in report.rows] == list(model.names)
    assert [row["requested"] for row in report.rows] == ["float32", "bfloat16", "float16"]
    assert [row["weights"] for row in report.rows] == [each.weights for each in model.layers]
    assert [row["weight_bytes"] for row in report.rows] == [4 * 27 * 8, 2 * 8 * 16, 2 * 16 * 3]
    assert [row["flops"] for row in report.rows] == [2 * each.flops for each in model.layers]  # two examples
    for row in report.rows:
        executed = mixed_program.executed[row["layer"]]
        assert (row["executed"], row["result"]) == (executed.operands, executed.result)
        assert row["way"] == "xla" and row["opcode"] == executed.opcode and row["dropped"] is False
    assert [row["share"] for row in report.rows] == (pytest.approx([0.6, 0.2, 0.0]) if shares else [None] * 3)
    assert report.program["outside"] == (pytest.approx(0.2) if shares else None)
    assert report.program["flops"] == sum(row["flops"] for row in report.rows)
    assert report.program["weight_bytes"] == mixed_program.weight_bytes
    assert report.program["error"] == mixed_program.verification.error
    header, *lines = str(report).splitlines()
    assert header.split() == ["layer", "requested", "executed", "by", "way", "KiB", "MFLOP", "share", "weights"]
    assert [line.split()[0] for line in lines[:3]] == list(model.names)
    assert ("60.0%" in lines[0]) == shares and "%" not in lines[3]
    assert "limit" in lines[3] and executable.name(mixed_program.options) in lines[3] and len(lines) == 4
    json.dumps([*report.rows, report.program], allow_nan=False)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_refused(mixed_program, tmp_path, damage):
    path = mixed_program.export(tmp_path / "mixed.mpjax")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-300] ^= 0xFF  # in the archive's directory
        data[200] ^= 0xFF
    elif damage == "foreign":
        data = bytearray(b"not an archive")
    else:
        data = bytearray()
    path.write_bytes(bytes(data))
    with pytest.raises(compiled.ExportError, match="mixed.mpjax"):
        compiled.load(path)


@pytest.mark.parametrize("member", ["header.json", "program.bin", "weights.bin"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\x00\xff garbage" * 9])
def test_a_whole_archive_with_a_wrong_member_is_refused(mixed_program, tmp_path, member, content):
    path = mixed_program.export(tmp_path / "mixed.mpjax")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, each in (members | {member: content}).items():
            archive.writestr(name, each)
    with pytest.raises(compiled.ExportError, match="mixed.mpjax"):
        compiled.load(path)


def test_a_file_for_another_platform_is_refused(mixed_program, tmp_path, monkeypatch):
    path = mixed_program.export(tmp_path / "mixed.mpjax")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(compiled.ExportError, match="exported for cpu; this process runs on tpu.*JAX_PLATFORMS=cpu"):
        compiled.load(path)


def test_a_file_from_another_device_or_jaxlib_warns(small, mixed_program, tmp_path, monkeypatch):
    path = mixed_program.export(tmp_path / "mixed.mpjax")
    monkeypatch.setattr(timing, "device_name", lambda: "Another CPU")
    with pytest.warns(UserWarning, match="was verified on .*this is Another CPU jaxlib"):
        assert compiled.load(path)(*small[1][0]) is not None


def test_a_program_is_never_compiled_a_second_time_by_calling_it(small, mixed_program):
    _, batches = small
    expected = mixed_program(*batches[0])
    jax.tree.map(np.testing.assert_array_equal, mixed_program(*map(np.asarray, batches[0])), expected)
    compilations = []
    with monitoring(compilations):
        with jax.default_matmul_precision("float32"):
            jax.tree.map(np.testing.assert_array_equal, mixed_program(*batches[0]), expected)
        jax.clear_caches()
        jax.tree.map(np.testing.assert_array_equal, mixed_program(*batches[0]), expected)
    assert compilations == []
    for transform in (jax.jit, jax.vmap):
        with pytest.raises(TypeError, match="cannot be called under jit, vmap or grad"):
            transform(lambda x: mixed_program(x))(batches[0][0][None] if transform is jax.vmap else batches[0][0])


@contextmanager
def monitoring(compilations):
    """Appends an item for each program that XLA compiles meanwhile."""

    def listen(event, _, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_options_under_which_it_does_not_compile_are_passed_over(small, monkeypatch):
    model, batches = small
    real = executable.build

    def build(function, arguments, options):
        if options == {}:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")
        return real(function, arguments, options)

    monkeypatch.setattr(executable, "build", build)
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: ({}, executable.EXACT))
    assert compiled.compile(model, batches).options == executable.EXACT
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: ({},))
    with pytest.raises(compiled.MiscompiledError, match="does not compile or run .INTERNAL: no such thing"):
        compiled.compile(model, batches)


@pytest.mark.parametrize("low", [False, True])
def test_a_way_that_computes_something_else_is_refused(small, monkeypatch, low):
    model, batches = small
    real = lowering._CONVOLUTIONS["im2col"]
    monkeypatch.setitem(lowering._CONVOLUTIONS, "im2col", lambda *arguments: 2 * real(*arguments))
    model = apply.apply(model, dict.fromkeys(model.names, "bfloat16")) if low else model
    with pytest.raises(compiled.MiscompiledError, match="differs by"):
        compiled.compile(model, batches, lowering={"stem": "im2col"})
    assert compiled.compile(model, batches).verification.agrees


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.mpjax"):
        compiled.load(tmp_path / "nothing.mpjax")


def test_a_wrong_program_is_caught_and_compiled_with_other_options(small, monkeypatch):
    """The program of the first set of options is sabotaged; the verification must see it and take the next set."""
    model, batches = small
    real, built = executable.build, []

    def sabotaged(function, arguments, options):
        found = real(function, arguments, options)
        if options == executable.PLAIN:  # the reference
            return found
        built.append(dict(options))
        if options != sets[0]:
            return found
        return replace(found, function=lambda *args: jax.tree.map(lambda leaf: leaf * 1.01, found.function(*args)))

    sets = ({}, {"xla_allow_excess_precision": False})
    monkeypatch.setattr(executable, "build", sabotaged)
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: sets)
    program = compiled.compile(model, batches)
    assert built == list(sets)
    assert program.options == sets[1] and program.verification.agrees
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: sets[:1])
    with pytest.raises(
        compiled.MiscompiledError, match="No compiled program agrees with its definition. YNN: differs by"
    ):
        compiled.compile(model, batches)


def test_outputs_that_are_not_finite_must_agree_too(small, monkeypatch):
    """An overflowing program is compiled if it overflows in the same places, and refused if it does not."""
    model, batches = small
    loud = replace(
        model, params=model.params | {"head/kernel": model.params["head/kernel"].at[:, 0].set(jnp.float32(3e38))}
    )
    program = compiled.compile(apply.apply(loud, {"pointwise": "bfloat16"}), batches)
    assert not np.isfinite(program(*batches[0])["out"]).all() and np.isfinite(program.verification.error)
    assert verification.errors([np.array([1.0, np.nan])], [np.array([1.0, np.inf])]) == (np.inf, np.inf)
    assert verification.errors([np.array([np.nan, 1.0])], [np.array([1.0, 1.0])]) == (np.inf, np.inf)
    infinite = dict.fromkeys(("error", "limit", "worst", "worst_limit", "distance", "own_distance"), np.inf)
    assert not compiled.Verification(**infinite, noise=0.0, inputs=2).agrees


def test_an_unknown_compiler_option_is_skipped_and_recorded(small, monkeypatch):
    model, batches = small
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: ({"xla_no_such_option": "1"}, {}))
    program = compiled.compile(model, batches)
    assert program.skipped == ("xla_no_such_option",) and program.options == {}


def test_the_roundings_that_were_asked_for_are_there(small):
    """XLA's default removes float32 -> bfloat16 -> float32; a compiled program must not."""
    model, batches = small
    mixed = apply.apply(model, {"stem": "bfloat16"})
    with jax.disable_jit():
        stepwise = mixed.call(mixed.params, *batches[0])["out"]
    program = compiled.compile(mixed, batches)
    assert program.options["xla_allow_excess_precision"] is False
    distance = np.abs(np.asarray(stepwise - model.call(model.params, *batches[0])["out"])).max()
    assert np.abs(np.asarray(program(*batches[0])["out"] - stepwise)).max() < 0.1 * distance


def test_clear_errors(small, mixed_program):
    model, batches = small
    with pytest.raises(ValueError, match="at least two"):
        compiled.compile(model, batches[:1])
    with pytest.raises(ValueError, match="two different inputs"):
        compiled.compile(model, [batches[0], batches[0]])
    with pytest.raises(ValueError, match="compile again"):
        mixed_program(jnp.ones((1, 16, 16, 3), jnp.float32))


HLO = """
HloModule jit_function, entry_computation_layout={(f32[2,4]{1,0})->f32[2,3]{1,0}}

%fused (p0: f32[2,4], p1: bf16[4,3]) -> f32[2,3] {
  %p0 = f32[2,4]{1,0} parameter(0)
  %p1 = bf16[4,3]{1,0} parameter(1)
  %convert.1 = bf16[2,4]{1,0} convert(%p0), metadata={op_name="jit(function)/a/b/convert"}
  ROOT %dot.2 = f32[2,3]{1,0} dot(%convert.1, %p1), metadata={op_name="jit(function)/a/b/dot_general"}
}

ENTRY %main (x: f32[2,4], w: bf16[4,3]) -> f32[2,3] {
  %x = f32[2,4]{1,0} parameter(0)
  %w = bf16[4,3]{1,0} parameter(1)
  %multiply.9 = f32[2,4]{1,0} multiply(%x, %x), metadata={op_name="jit(function)/b/mul"}
  ROOT %fusion = f32[2,3]{1,0} fusion(%multiply.9, %w), kind=kLoop, calls=%fused
}
"""


def test_hlo_is_read_in_fusions_and_by_the_longest_name():
    found = hlo.executed_dtypes(HLO, ("a/b", "b", "c"))
    assert (found["a/b"].opcode, found["a/b"].operands, found["a/b"].result) == ("dot", "bfloat16", "float32")
    assert (found["b"].opcode, found["b"].operands) == ("multiply", "float32")
    assert found["c"].opcode == "unknown"


@pytest.mark.parametrize(("mixed_seconds", "chosen"), [(0.5, "mixed"), (0.995, "float32"), (1.5, "float32")])
def test_the_fastest_is_float32_unless_another_is_clearly_faster(small, monkeypatch, mixed_seconds, chosen):
    model, batches = small
    monkeypatch.setattr(timing, "in_turns", lambda runs, rounds, shortest: [[1.0] * rounds, [mixed_seconds] * rounds])
    models = {"float32": model, "mixed": apply.apply(model, {"head": "bfloat16"})}
    programs = {name: compiled.compile(each, batches, lowering="rule") for name, each in models.items()}
    found = compiled.fastest(programs, *batches[0], rounds=3)
    assert found.name == chosen and found.program is programs[chosen]
    assert found.seconds == {"float32": 1.0, "mixed": mixed_seconds} and set(found.spread.values()) == {0.0}


def test_the_fastest_of_none_or_of_other_shapes_says_so(small):
    model, batches = small
    with pytest.raises(ValueError, match="at least one program"):
        compiled.fastest({}, *batches[0])
    with pytest.raises(ValueError, match="compile again for other shapes"):
        compiled.fastest({"float32": compiled.compile(model, batches)}, batches[0][0][:, 1:], rounds=1)
