"""Mixes of weight-only formats: bytes, the numbers that a program computes, and what fits into a number of bytes."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from toys import linen

from experiments.lib.storage import store as storage
from experiments.lib.storage import study
from experiments.lib.storage.rows import Row, comparison
from experiments.problems import text_data
from experiments.sentence_encoder import steps as sentence_encoder
from mpjax import compiled, sensitivity
from mpjax.apply import apply
from mpjax.search import Assignment

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

NET = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(32), nn.relu, nn.Dense(32, use_bias=False)])


@pytest.fixture(scope="module")
def subject():
    model, batches = linen(NET, 4, 32)
    return storage.Store(model, storage.FORMATS, *batches[0]), batches


def test_bytes_and_numbers_are_those_of_the_compiled_program(subject):
    store, batches = subject
    assignment = Assignment(dict(zip(store.model.names, ("int4_w", "float8_e4m3fn_w", "bfloat16_w"), strict=True)))
    program = compiled.compile(apply(store.model, assignment), batches)
    assert store.bytes_of(assignment) == program.stored_bytes
    for outputs, batch in zip(store.outputs(assignment, batches), batches, strict=True):
        np.testing.assert_allclose(outputs, program(*batch), atol=1e-6)
    assert store.bytes_of({}) == 4 * sum(leaf.size for leaf in jax.tree.leaves(store.model.params))
    with pytest.raises(ValueError, match="weight-only formats, found bfloat16"):
        storage.Store(store.model, ("int8_w", "bfloat16"), *batches[0])


def test_a_mix_by_scores_is_the_best_that_fits(subject):
    store, batches = subject
    scores = sensitivity.local_rounding(num_probes=None)(store.model, batches, storage.FORMATS, jax.random.key(0))
    options = ("float32", *storage.FORMATS)
    everything = [
        Assignment(dict(zip(store.model.names, formats, strict=True)))
        for formats in itertools.product(options, repeat=3)
    ]

    def loss(assignment):
        return sum(0.0 if f == "float32" else scores.column(f)[i] for i, f in enumerate(assignment.values()))

    for most in (store.bytes_of(Assignment.uniform(store.model.names, "int4_w")), 4500, 6000, 9000):
        mix = store.by_scores(scores.value, most)
        best = min((other for other in everything if store.bytes_of(other) <= most), key=loss)
        assert store.bytes_of(mix) <= most and loss(mix) == pytest.approx(loss(best))


def test_mixes_without_scores_fill_the_bytes(subject):
    store, _ = subject
    names = store.model.names
    formats = ("int4_w", "int8_w", "bfloat16_w", "float32")
    sizes = {fmt: store.bytes_of(Assignment.uniform(names, fmt)) for fmt in formats}
    for most in range(sizes["int4_w"], sizes["int8_w"], 97):
        first, last = store.by_depth(most)
        for mix in (first, last, *(store.at_random(seed, most) for seed in range(3))):
            assert set(mix.values()) <= {"int4_w", "int8_w"} and store.bytes_of(mix) <= most
            left = [layer for layer in names if mix[layer] == "int4_w"]
            assert all(store.bytes_of(mix.replace({layer: "int8_w"})) > most for layer in left)  # nothing more fits
    first, last = store.by_depth(sizes["int4_w"] + 1300)
    assert first[names[0]] == "int8_w" and last[names[-1]] == "int8_w" and first != last
    assert store.by_depth(sizes["int8_w"]) == (Assignment.uniform(names, "int8_w"),) * 2
    assert store.by_depth(10 * sizes["float32"]) == (Assignment.uniform(names),) * 2
    assert len({store.at_random(seed, (sizes["int4_w"] + sizes["int8_w"]) // 2) for seed in range(8)}) > 1
    with pytest.raises(ValueError, match="No mix of int4_w.*the smallest takes"):
        store.by_depth(sizes["int4_w"] - 1)


def test_prose_is_prose_and_topics_are_split():
    calibration, heldout = text_data.prose()
    assert min(len(calibration.text), len(heldout.text)) > 200 and not set(calibration.topic) & set(heldout.topic)
    assert not set(calibration.text) & set(heldout.text) and len(set(heldout.text)) == len(heldout.text)
    for text in (*calibration.text, *heldout.text):
        assert len(text) >= 120 and ">>>" not in text and "\n" not in text and text[-1] in ".:"
    assert text_data.digest() == text_data.digest() != text_data.digest({"a": "b"})


def test_drift_of_unit_vectors_is_one_minus_cosine():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 8))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(sentence_encoder.drift(a, b), 1 - (a * b).sum(1))


MIXES = [
    ("uniform", "int4_w", 50, None, 1e-2),
    ("uniform", "int8_w", 100, None, 1e-4),
    ("mixed", "int4_w+int8_w", 62, 1.25, 2e-3),
    ("random", "int4_w+int8_w", 60, 1.25, 5e-3),
    ("random", "int4_w+int8_w", 61, 1.25, 7e-3),
    ("depth", "int4_w+int8_w", 62, 1.25, 6e-3),
    ("depth", "int4_w+int8_w", 62, 1.25, 4e-3),
]


def test_mixes_are_compared_at_their_bytes():
    names = ("method", "formats", "bytes", "share", "error")
    (row,) = comparison([Row(model="m", variant="", **dict(zip(names, values, strict=True))) for values in MIXES])
    assert (row.mixed, row.depth, row.random, row.random_low, row.bytes) == (2e-3, 4e-3, 6e-3, 5e-3, 62)
    assert row.vs_best == pytest.approx(0.5)


def test_calls_are_timed_in_turns(subject):
    store, batches = subject
    model = store.model
    plain = jax.jit(model.call)
    calls = dict.fromkeys(("jit", "plain"), lambda *inputs: plain(model.params, *inputs))
    programs = {"fp32": model, "int8_w": apply(model, dict.fromkeys(model.names, "int8_w"))}
    rows = study.timed("batch 4", calls, programs, batches, store.bytes_of({}), 3)
    assert [row.variant for row in rows] == ["jit", "plain", "fp32", "int8_w"]
    assert all(0 < row.ms_q1 <= row.ms <= row.ms_q3 for row in rows) and rows[0].vs_fp32 == 1.0
    float32, uniform = store.bytes_of({}), store.bytes_of(Assignment.uniform(model.names, "int8_w"))
    assert [row.weight_bytes for row in rows] == [float32, float32, float32, uniform]
    assert rows[3].full_copies.endswith(" of 3") and rows[2].full_copies is None
