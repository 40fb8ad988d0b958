"""Mixes of weight-only formats: bytes, the numbers that a program computes, and what fits into a number of bytes."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from toys import linen

from experiments.problems import text_data
from experiments.sentence_encoder import __main__ as sentence_encoder
from experiments.storage import report as storage_report
from experiments.storage import store as storage
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
    formats = ("int4_w", "int8_w", "bfloat16_w", "float32")
    sizes = {fmt: store.bytes_of(Assignment.uniform(names, fmt)) for fmt in formats}
    for most in range(sizes["int4_w"], sizes["int8_w"], 97):
        first, last = store.by_depth(most)
        for found in (first, last, *(store.at_random(seed, most) for seed in range(3))):
            assert set(found.values()) <= {"int4_w", "int8_w"} and store.bytes_of(found) <= most
            left = [each for each in names if found[each] == "int4_w"]
            assert all(store.bytes_of(found.replace({each: "int8_w"})) > most for each in left)  # nothing more fits
    first, last = store.by_depth(sizes["int4_w"] + 1300)
    assert first[names[0]] == "int8_w" and last[names[-1]] == "int8_w" and first != last
    assert store.by_depth(sizes["int8_w"]) == (Assignment.uniform(names, "int8_w"),) * 2
    assert store.by_depth(10 * sizes["float32"]) == (Assignment.uniform(names),) * 2
    assert len({store.at_random(seed, (sizes["int4_w"] + sizes["int8_w"]) // 2) for seed in range(8)}) > 1
    with pytest.raises(ValueError, match="No mix of int4_w.*the smallest takes"):
        store.by_depth(sizes["int4_w"] - 1)


def test_candidates_take_the_bytes_that_they_are_compared_at(subject):
    store, batches = subject
    scores = sensitivity.local_rounding(num_probes=None)(store.model, batches, storage.FORMATS, jax.random.key(0))
    found = storage.candidates(store, scores.value, (1.0, 1.25), mixes=2)
    assert [each.method for each in found] == ["uniform"] * 4 + ["mixed"] * 2 + ["random"] * 2 + ["depth"] * 2
    least = store.bytes_of(Assignment.uniform(store.model.names, "int4_w"))
    assert all(store.bytes_of(each.assignment) <= each.share * least for each in found if each.share)


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


MIXES = [
    ("uniform", "int4_w", 50, None, 1e-2),
    ("uniform", "int8_w", 100, None, 1e-4),
    ("mixed", "int4_w+int8_w", 62, 1.25, 2e-3),
    ("random", "int4_w+int8_w", 60, 1.25, 5e-3),
    ("random", "int4_w+int8_w", 61, 1.25, 7e-3),
    ("depth", "int4_w+int8_w", 62, 1.25, 6e-3),
    ("depth", "int4_w+int8_w", 62, 1.25, 4e-3),
]
SEARCH = {
    "purpose": "no worse than uniform int8_w",
    "formats": "int4_w+int8_w",
    "bytes": 90,
    "layers_low": 3,
    "error_calibration": 8e-5,
    "tolerance_value": 1e-4,
    "error_heldout": 9e-5,
    "within_tolerance": True,
    "evaluations": 5,
}


def mixes():
    return [dict(zip(("method", "formats", "bytes", "share", "error"), each, strict=True)) for each in MIXES]


def test_mixes_are_compared_at_their_bytes():
    (row,) = storage_report.comparison(mixes())
    assert (row["mixed"], row["depth"], row["random"], row["random_low"]) == (2e-3, 4e-3, 6e-3, 5e-3)
    assert row["vs_best"] == pytest.approx(0.5)
    found = storage_report.storage_targets({"mixes": mixes()}, 1.25, SEARCH)
    assert [value for _, value, _, _ in found] == pytest.approx([5.0, 0.9, 0.9]) and all(met for *_, met in found)
    over = {**SEARCH, "error_heldout": 2e-4}
    assert [met for *_, met in storage_report.storage_targets({"mixes": mixes()}, 1.25, over)] == [True, False, False]


def test_a_report_of_rows(tmp_path):
    rows = [
        {
            **dict.fromkeys(storage_report.ROW_FIELDS),
            "model": "minilm",
            "method": row["method"],
            "formats": row["formats"],
            "bytes": row["bytes"],
            "cosine": 1 - row["error"],
        }
        for row in mixes()
    ]
    kinds = {f"blocks/{b}/{kind}": kind for b in range(2) for kind in ("query", "up")} | {"words": "words"}
    scores = [
        {"layer": layer, "kind": kind, "format": fmt, "score": 1e-3, "stderr": 0.0, "status": "ok"}
        for layer, kind in kinds.items()
        for fmt in ("int4_w", "int8_w")
    ]
    speed = [
        {
            **{column.key: None for column in storage_report.SPEED_TABLE},
            **{"batch": "batch 1", "variant": name, "ms_median": ms, "ms_low": ms, "ms_high": ms, "vs_fp32": ms / 2.0},
        }
        for name, ms in (("jit", 2.0), ("mixed", 1.0))
    ]
    summary = {
        "environment": {name: "x" for name in ("device", "cores", "python", "jax", "flax", "date")},
        "command": "python -m experiments.sentence_encoder",
        "seconds": 1.0,
        "commit": "abc",
        "reused_pieces": [],
        "peak_rss_mb": 100.0,
        "facts": {"topics_sha256": "0" * 64, "source_bytes": 55},
        "rows": rows,
        "mixes": mixes(),
        "searches": [SEARCH],
        "scores": scores,
        "speed": speed,
        "targets": [],
        "assignments": [
            {"layer": layer, "kind": kind, "as_int4": "int4_w", "as_int8": "int8_w"} for layer, kind in kinds.items()
        ],
    }
    page = storage_report.write(tmp_path, summary, sentence_encoder.TEXTS).read_text()
    assert "by scores 0.50 of the best without" in page and "query 40%, up 40%, words 20%" in page
    assert "90 bytes, 9e-05 on held-out text, within its limit" in page and "stores them in 55 bytes" in page
    assert {each.stem for each in tmp_path.glob("*.png")} == {
        "error_against_bytes",
        "sensitivity_by_kind",
        "chosen_formats",
        "times",
    }


def test_calls_are_timed_in_turns(subject):
    store, batches = subject
    model = store.model
    plain = jax.jit(model.call)
    calls = dict.fromkeys(("jit", "plain"), lambda *each: plain(model.params, *each))
    programs = {"fp32": model, "int8_w": apply(model, dict.fromkeys(model.names, "int8_w"))}
    rows = storage_report.timed("batch 4", calls, programs, batches, store.bytes_of({}), 3)
    assert [row["variant"] for row in rows] == ["jit", "plain", "fp32", "int8_w"]
    assert all(0 < row["ms_low"] <= row["ms_median"] <= row["ms_high"] for row in rows) and rows[0]["vs_fp32"] == 1.0
    uniform = Assignment.uniform(model.names, "int8_w")
    assert [row["weight_bytes"] for row in rows[1:]] == [
        store.bytes_of({}),
        store.bytes_of({}),
        store.bytes_of(uniform),
    ]
    assert rows[3]["full_copies"].endswith(" of 3") and rows[2]["full_copies"] is None
