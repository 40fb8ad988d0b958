"""Mixes of weight-only formats: bytes, the numbers that a program computes, and what fits into a number of bytes."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import linen

from experiments import sentence_encoder, storage, storage_report, text_data
from mpjax import apply, compiled, sensitivity
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
    program = compiled.compile(apply.apply(store.model, assignment), batches)
    assert store.bytes_of(assignment) == program.weight_bytes
    for found, batch in zip(store.outputs(assignment, batches), batches, strict=True):
        np.testing.assert_allclose(found, program(*batch), atol=1e-6)
    assert store.bytes_of({}) == 4 * sum(leaf.size for leaf in jax.tree.leaves(store.model.params))
    with pytest.raises(ValueError, match="weight-only formats, found bfloat16"):
        storage.Store(store.model, ("int8_w", "bfloat16"), *batches[0])


def test_a_mix_by_scores_is_the_best_that_fits(subject):
    store, batches = subject
    scores = sensitivity.local_rounding(num_probes=None)(store.model, batches, storage.FORMATS, jax.random.key(0))
    options = ("float32", *storage.FORMATS)
    everything = [
        Assignment(dict(zip(store.model.names, each, strict=True))) for each in itertools.product(options, repeat=3)
    ]

    def loss(assignment):
        return sum(0.0 if f == "float32" else scores.column(f)[i] for i, f in enumerate(assignment.values()))

    for most in (store.bytes_of(Assignment.uniform(store.model.names, "int4_w")), 4500, 6000, 9000):
        found = store.by_scores(scores.value, most)
        best = min((each for each in everything if store.bytes_of(each) <= most), key=loss)
        assert store.bytes_of(found) <= most and loss(found) == pytest.approx(loss(best))


def test_mixes_without_scores_fill_the_bytes(subject):
    store, _ = subject
    names = store.model.names
    sizes = {
        fmt: store.bytes_of(Assignment.uniform(names, fmt)) for fmt in ("int4_w", "int8_w", "bfloat16_w", "float32")
    }
    between = (sizes["int4_w"] + sizes["int8_w"]) // 2
    found = store.by_depth(between)
    assert set(found.values()) <= {"int4_w", "int8_w"} and store.bytes_of(found) <= between
    low = [name for name in names if found[name] == "int4_w"]
    assert low == list(names[-len(low) :])  # the last ones
    assert store.by_depth(sizes["int8_w"]) == Assignment.uniform(names, "int8_w")
    assert store.by_depth(10 * sizes["float32"]) == Assignment.uniform(names)
    assert set(store.at_random(0, sizes["int8_w"] + 600).values()) <= {"int8_w", "bfloat16_w"}
    assert len({store.at_random(seed, between) for seed in range(8)}) > 1
    with pytest.raises(ValueError, match="No mix of int4_w"):
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
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (a, b))
    np.testing.assert_allclose(sentence_encoder.drift(a, b), 1 - (a * b).sum(1))


def test_a_report_of_rows(tmp_path):
    rows = [
        {
            **dict.fromkeys(storage_report.ROW_FIELDS),
            "model": "minilm",
            "method": method,
            "formats": formats,
            "bytes": size,
            "cosine": 1 - error,
        }
        for method, formats, size, error in (
            ("reference", "float32", 400, 0.0),
            ("uniform", "int4_w", 50, 1e-2),
            ("uniform", "int8_w", 100, 1e-4),
            ("mixed", "int4_w+int8_w", 80, 5e-5),
            ("random", "int4_w+int8_w", 80, 5e-3),
            ("depth", "int4_w+int8_w", 80, 6e-3),
        )
    ]
    scores = [
        {
            "layer": f"blocks/{b}/{kind}",
            "kind": kind,
            "format": fmt,
            "score": 1e-3 * (b + 1),
            "stderr": 0.0,
            "status": "ok",
        }
        for b in range(2)
        for kind in ("query", "up")
        for fmt in ("int4_w", "int8_w")
    ]
    speed = [
        {
            **{column.key: None for column in storage_report.SPEED_TABLE},
            **{"batch": 1, "variant": name, "ms_median": ms, "ms_low": ms, "ms_high": ms, "vs_fp32": ms / 2.0},
        }
        for name, ms in (("fp32", 2.0), ("mixed", 1.0))
    ]
    summary = {
        "environment": {name: "x" for name in ("device", "cores", "python", "jax", "flax", "date")},
        "command": "python -m experiments.sentence_encoder",
        "seconds": 1.0,
        "commit": "abc",
        "reused_pieces": [],
        "peak_rss_mb": 100.0,
        "facts": {"topics_sha256": "0" * 64},
        "rows": rows,
        "scores": scores,
        "speed": speed,
        "targets": [],
        "assignments": [
            {"layer": f"blocks/{b}/{kind}", "kind": kind, "as_int4": "int4_w", "as_int8": "int8_w"}
            for b in range(2)
            for kind in ("query", "up")
        ],
    }
    page = storage_report.write(tmp_path, summary, sentence_encoder.TEXTS).read_text()
    assert "a mix as near takes 0.80 of its bytes" in page and "query 50%, up 50%" in page
    assert {each.stem for each in tmp_path.glob("*.png")} == {
        "error_against_bytes",
        "sensitivity_by_kind",
        "chosen_formats",
        "times",
    }
