"""Seconds by layer inside a compiled program; whose work a fusion is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mpjax import compiled
from mpjax.program import from_linen
from mpjax.xla import hlo, profiling

pytestmark = [pytest.mark.optimised, pytest.mark.usefixtures("relaxed_promotion")]


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        return nn.Dense(8, name="head")(nn.relu(nn.Conv(32, (1, 1), name="pointwise")(x)).mean((1, 2)))


@pytest.fixture(scope="module")
def program():
    keys = jax.random.split(jax.random.key(0), 3)
    batches = [(jax.random.normal(key, (2, 32, 32, 3), jnp.float32),) for key in keys[1:]]
    model = from_linen(Small(), Small().init(keys[0], *batches[0]), *batches[0])
    return compiled.compile(model, batches), batches[0]


def test_seconds_by_layer(program):
    run, inputs = program
    names = tuple(layer.name for layer in run.layers)
    text = run.executable.compiled.as_text()
    seconds = profiling.layer_seconds(lambda: run(*inputs), text, names, repeats=5)
    if seconds is None:
        pytest.skip("this profiler names no instruction of the program")
    assert set(seconds) <= {*names, profiling.OUTSIDE} and set(seconds) & set(names)
    assert all(0 <= each < 1 for each in seconds.values()) and any(
        seconds[name] > 0 for name in names if name in seconds
    )


def test_none_of_a_program_that_the_profiler_does_not_name(program):
    run, inputs = program
    assert profiling.layer_seconds(lambda: run(*inputs), "HloModule another", ("stem",), repeats=1) is None


def test_shares_of_the_report_add_up(program):
    run, inputs = program
    report = run.report(*inputs)
    shares = [row["share"] for row in report.rows]
    if None in shares:
        pytest.skip("this profiler names no instruction of the program")
    assert sum(shares) + report.program["outside"] == pytest.approx(1) and max(shares) > 0


HLO = """
HloModule jit_function, is_scheduled=true, entry_computation_layout={(f32[2,4]{1,0})->f32[2,4]{1,0}}

%fused_computation (p0: f32[2,4], p1: f32[2,4]) -> f32[2,4] {
  %p0 = f32[2,4]{1,0} parameter(0)
  %p1 = f32[2,4]{1,0} parameter(1)
  %multiply.1 = f32[2,4]{1,0} multiply(%p0, %p1), metadata={op_name="jit(function)/block/depthwise/mul"}
  %multiply.2 = f32[2,4]{1,0} multiply(%multiply.1, %p1), metadata={op_name="jit(function)/block/depthwise/mul"}
  %add.3 = f32[2,4]{1,0} add(%multiply.1, %multiply.2), metadata={op_name="jit(function)/next/add"}
  %add.4 = f32[2,4]{1,0} add(%add.3, %p0), metadata={op_name="jit(function)/next/add"}
  %add.5 = f32[2,4]{1,0} add(%add.4, %p0), metadata={op_name="jit(function)/next/add"}
  ROOT %maximum.6 = f32[2,4]{1,0} maximum(%add.5, %p0), metadata={op_name="jit(function)/relu/max"}
}

%fused_computation.1 (p2: f32[2,4]) -> f32[2,4] {
  %p2 = f32[2,4]{1,0} parameter(0)
  %add.7 = f32[2,4]{1,0} add(%p2, %p2), metadata={op_name="jit(function)/next/add"}
  ROOT %maximum.8 = f32[2,4]{1,0} maximum(%add.7, %p2), metadata={op_name="jit(function)/relu/max"}
}

%fused_computation.2 (p3: f32[2,4]) -> f32[2,4] {
  %p3 = f32[2,4]{1,0} parameter(0)
  ROOT %tanh.9 = f32[2,4]{1,0} tanh(%p3), metadata={op_name="jit(function)/tanh"}
}

ENTRY %main.10 (x: f32[2,4], w: f32[2,4]) -> f32[2,4] {
  %x = f32[2,4]{1,0} parameter(0)
  %w = f32[2,4]{1,0} parameter(1)
  %one = f32[2,4]{1,0} fusion(%x, %w), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(function)/relu/max"}
  %two = f32[2,4]{1,0} fusion(%one), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(function)/relu/max"}
  %three = f32[2,4]{1,0} fusion(%two), kind=kLoop, calls=%fused_computation.2, metadata={op_name="jit(function)/tanh"}
  ROOT %dot.11 = f32[2,4]{1,0} dot(%three, %w), metadata={op_name="jit(function)/next/dot_general"}
}
"""


def test_a_fusion_works_for_the_layer_of_its_multiplications():
    found = hlo.owners(HLO, ("block/depthwise", "next"))
    assert (
        found["one"] == "block/depthwise"
    )  # two multiplications against three additions, and a root outside of layers
    assert found["two"] == "next"  # no multiplication: most of its instructions
    assert found["three"] is None
    assert found["dot.11"] == "next" and found["multiply.1"] == "block/depthwise" and found["maximum.6"] is None
    assert found["x"] is None
