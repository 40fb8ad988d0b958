"""Compiler options: which sets are tried and in what order; an unknown one is left out and recorded."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.xla import executable

pytestmark = pytest.mark.optimised
cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the sets of a CPU")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@cpu_only
def test_the_likely_fastest_set_is_first():
    wide, narrow = executable.option_sets(narrow=False), executable.option_sets(narrow=True)
    names = ["no YNN, vectors of 512", "YNN, vectors of 512", "no YNN", "YNN"]
    assert [executable.name(options) for options in wide] == names
    assert [executable.name(options) for options in narrow] == [names[i] for i in (1, 0, 3, 2)]
    # roundings stay, whatever else is tried
    assert all(options["xla_allow_excess_precision"] is False for options in (*wide, *narrow))
    assert executable.EXACT in wide and executable.EXACT | executable.NO_YNN in wide
    assert executable.name({}) == executable.name({"xla_cpu_experimental_ynn_fusion_type": "DOT"}) == "YNN"
    assert executable.name(executable.NO_YNN | {"xla_cpu_prefer_vector_width": 256}) == "no YNN, vectors of 256"


def test_another_backend_gets_exactness_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for narrow in (False, True):
        assert executable.option_sets(narrow=narrow) == (executable.EXACT,)
    assert executable.name(executable.EXACT) == "default"


def test_every_set_builds_and_runs():
    for options in (*executable.option_sets(narrow=True), executable.PLAIN):
        program = executable.build(lambda a, b: {"sum": a + b, "dot": a @ b.T}, (X, X), options)
        assert {*program.options, *program.skipped} == set(options) and program.seconds > 0
        assert program.options.items() <= options.items()
        out = program(X, 2 * X)
        np.testing.assert_array_equal(out["sum"], 3 * X)
        np.testing.assert_allclose(out["dot"], 2 * X @ X.T, rtol=1e-6)
        chex.assert_trees_all_equal(program.compiled(X, 2 * X), out)
        assert "ENTRY" in program.compiled.as_text()


def test_unknown_options_are_left_out_and_recorded():
    wanted = {"xla_no_such_option": 1, "xla_allow_excess_precision": False, "xla_nor_this_one": "a"}
    program = executable.build(jnp.sin, (X,), wanted)
    assert program.options == {"xla_allow_excess_precision": False}
    assert sorted(program.skipped) == ["xla_no_such_option", "xla_nor_this_one"]
    np.testing.assert_allclose(program(X), np.sin(X), rtol=1e-5)
    assert len(wanted) == 3  # the caller's mapping is unchanged


def test_the_option_is_in_force():
    """float32 -> bfloat16 -> float32 stays under EXACT; XLA's default drops it."""
    x = np.float32([1 + 2**-10, 3.14159])
    rounded = executable.build(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), (x,), executable.EXACT)
    np.testing.assert_array_equal(rounded(x), np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32))
    assert not np.array_equal(rounded(x), x)
