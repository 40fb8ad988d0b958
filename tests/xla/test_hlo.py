"""Optimised programs, read: what a layer runs in, what is copied, whose work a fusion is."""

import re

from mpjax.xla import hlo

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
  %convert.8 = bf16[2,4]{1,0} convert(%p3), metadata={op_name="jit(function)/next/depthwise/multiplied_out/convert"}
  ROOT %tanh.9 = f32[2,4]{1,0} tanh(%p3), metadata={op_name="jit(function)/tanh"}
}

ENTRY %main.10 (x: f32[2,4], w: s8[4,4], i: s32[]) -> f32[2,4] {
  %x = f32[2,4]{1,0} parameter(0)
  %w = s8[4,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = f32[2,4]{1,0} fusion(%x, %x), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(function)/relu/max"}
  %two = f32[2,4]{1,0} fusion(%one), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(function)/relu/max"}
  %three = f32[2,4]{1,0} fusion(%two), kind=kLoop, calls=%fused_computation.2, metadata={op_name="jit(function)/tanh"}
  %copy.10 = bf16[4,4]{1,0} convert(%w), metadata={op_name="jit(function)/next/multiplied_out/convert"}
  %rows.12 = bf16[1,4]{1,0} gather(%copy.10, %i), offset_dims={1}, metadata={op_name="jit(function)/words/gather"}
  ROOT %dot.11 = f32[2,4]{1,0} dot(%three, %copy.10), metadata={op_name="jit(function)/next/dot_general"}
}
"""
LAYERS = ("block/depthwise", "depthwise", "next", "words", "other")


def test_what_a_layer_runs_in():
    executed = hlo.executed_dtypes(HLO, LAYERS)
    assert {name: (layer.opcode, layer.operands, layer.result) for name, layer in executed.items()} == {
        "block/depthwise": ("multiply", "float32", "float32"),
        "depthwise": ("unknown", "unknown", "unknown"),  # the longest name is the layer
        "next": ("dot", "bfloat16+float32", "float32"),
        "words": ("gather", "bfloat16", "bfloat16"),  # row numbers are no operands
        "other": ("unknown", "unknown", "unknown"),
    }


def test_instructions_have_their_place_and_size():
    instructions = {instruction.name: instruction for instruction in hlo.instructions(HLO)}
    assert len(instructions) == len(re.findall("^.* = ", HLO, re.MULTILINE))
    assert instructions["one"].calls == instructions["add.3"].computation == "fused_computation"
    assert instructions["copy.10"].operand_dtypes == ("int8",) and instructions["copy.10"].size == 16
    assert instructions["i"].size == 1 and instructions["dot.11"].computation == "main.10"


def test_copies_are_what_is_large_and_kept_in_memory():
    assert hlo.copied(HLO, {"next": 16, "words": 1}, "multiplied_out") == {"next"}
    assert hlo.copied(HLO, {"next": 17}, "multiplied_out") == set()
    assert hlo.copied(HLO, {"depthwise": 1}, "multiplied_out") == set()  # inside a fusion


def test_a_fusion_works_for_the_layer_of_its_multiplications():
    owners = hlo.owners(HLO, ("block/depthwise", "next"))
    # two multiplications against three additions, and a root outside of layers
    assert owners["one"] == "block/depthwise"
    assert owners["two"] == "next"  # no multiplication: most of its instructions
    assert owners["three"] == "next" and owners["tanh.9"] is None
    assert owners["dot.11"] == "next" and owners["multiply.1"] == "block/depthwise" and owners["maximum.6"] is None
    assert owners["x"] is None
