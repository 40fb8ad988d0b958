"""Both transformer experiments from end to end, on small random models."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_minilm import SHAPE, tensors, tokenizer
from test_smollm2 import write

from experiments.language_model import __main__ as language_model
from experiments.lib.storage import store as storage
from experiments.models.minilm import load_minilm
from experiments.problems import text_data
from experiments.sentence_encoder import __main__ as sentence_encoder
from experiments.sentence_encoder import steps

pytestmark = [pytest.mark.usefixtures("relaxed_promotion"), pytest.mark.slow]
_ = tokenizer  # a fixture

LENGTH = 8


def texts(alphabet, count, words):
    """Two parts of so many random texts of letters."""
    rng = np.random.default_rng(0)
    parts = [tuple(" ".join(rng.choice(list(alphabet), words)) for _ in range(count)) for _ in range(2)]
    return tuple(text_data.Prose(text=part, topic=("letters",) * count) for part in parts)


def summary_of(folder, name):
    summary = json.loads((folder / name / "summary.json").read_text())
    methods = {row["method"] for row in summary["rows"]}
    assert methods == {"reference", "plain_bfloat16", "uniform", "mixed", "random", "depth"}
    return summary


def test_a_language_model(tmp_path, monkeypatch):
    path = tmp_path / "small.gguf"
    write(path)
    monkeypatch.setattr(language_model.steps.assets, "fetch", lambda name: path)
    monkeypatch.setattr(text_data, "prose", lambda: texts("abcdefgh", 8, 40))
    monkeypatch.setattr(language_model, "PROMPT", "ab a")
    for name, value in {"WINDOW": LENGTH, "CONTEXT": 12, "ROUNDS": 2}.items():
        monkeypatch.setattr(language_model.steps, name, value)
    language_model.main(language_model.Config(quick=True, results=tmp_path, tolerance=0.05))
    summary = summary_of(tmp_path, "language_model")
    layers = 1 + 7 * 2
    assert len(summary["scores"]) == layers * len(storage.FORMATS) and len(summary["assignments"]) == layers
    by_formats = {row["formats"]: row for row in summary["rows"] if row["method"] == "uniform"}
    assert by_formats["bfloat16_w"]["kl"] < by_formats["int8_w"]["kl"] < by_formats["int4_w"]["kl"]
    assert by_formats["int4_w"]["bytes"] < by_formats["int8_w"]["bytes"] < by_formats["bfloat16_w"]["bytes"]
    (reference,) = (row for row in summary["rows"] if row["method"] == "reference")
    assert reference["kl"] == 0 and reference["top1_agreement"] == 1 and reference["vs_fp32"] == 1
    (plain,) = (row for row in summary["rows"] if row["method"] == "plain_bfloat16")
    assert plain["kl"] > 0 and plain["decode_ms"] > 0
    within, _ = summary["searches"]
    assert within["error_calibration"] <= 0.05 and within["bytes"] < reference["bytes"]
    assert {row["variant"] for row in summary["speed"]} == {"jit", "plain", "fp32", "int8_w"}
    (small,) = (row for row in summary["speed"] if row["variant"] == "int8_w")
    assert small["full_copies"].startswith("0 of") and small["weight_bytes"] == by_formats["int8_w"]["bytes"]
    assert len(summary["facts"]["completion"]) > 0
    # a second run finds the scores
    language_model.main(language_model.Config(quick=True, results=tmp_path, tolerance=0.05))
    again = summary_of(tmp_path, "language_model")
    assert again["reused_pieces"] == ["scores"] and again["scores"] == summary["scores"]
    assert [row["kl"] for row in again["rows"]] == [row["kl"] for row in summary["rows"]]


def test_a_sentence_encoder(tmp_path, monkeypatch, tokenizer):
    path = tmp_path / "small.safetensors"
    save_file(tensors(), path)
    paths = {"minilm": path, "minilm_tokenizer": tokenizer}
    monkeypatch.setattr(steps.assets, "fetch", paths.__getitem__)
    monkeypatch.setattr(steps, "load_minilm", lambda path: load_minilm(path, shape=SHAPE))
    monkeypatch.setattr(text_data, "prose", lambda: texts("abcdefg", 16, 5))
    for name, value in {"LENGTH": LENGTH, "ROUNDS": 2}.items():
        monkeypatch.setattr(steps, name, value)
    sentence_encoder.main(sentence_encoder.Config(quick=True, results=tmp_path))
    summary = summary_of(tmp_path, "sentence_encoder")
    by_formats = {row["formats"]: row for row in summary["rows"] if row["method"] == "uniform"}
    assert by_formats["bfloat16_w"]["cosine"] > by_formats["int8_w"]["cosine"] > by_formats["int4_w"]["cosine"]
    assert summary["searches"][0]["error_calibration"] <= 0.0005
    timed = {row["method"] for row in summary["rows"] if row["vs_fp32"] is not None}
    assert timed == {"reference", "plain_bfloat16", "uniform", "mixed"}  # nobody timed the mixes without scores
    assert {row["batch"] for row in summary["speed"]} == {"batch 1", "batch 8"}


def test_an_interval_holds_the_mean_and_pairs_cancel():
    rng = np.random.default_rng(0)
    easy = rng.gamma(2.0, 1.0, 16)
    alone, paired = storage.measured(easy + 0.1), storage.measured(easy + 0.1, easy)
    assert alone.low < alone.value < alone.high and alone.value == paired.value == pytest.approx(easy.mean() + 0.1)
    assert paired.low == paired.high == pytest.approx(easy.mean() + 0.1)
    misses = 0
    for seed in range(300):  # the upper end is below the truth once in twenty times
        drawn = np.random.default_rng(seed).gamma(2.0, 1.0, 16)
        misses += storage.measured(drawn).high < 2.0
    assert 3 <= misses <= 30
