"""experiments/speed_gpu without a GPU: its rows and sentences; all of it in a dry run."""

import json
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.lib import assets
from experiments.speed_gpu import __main__ as speed
from experiments.speed_gpu import figures, models
from experiments.speed_gpu.models import DECODE, ENCODER, POSE
from experiments.speed_gpu.rows import Row
from mpjax.kernels import stored


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """In all threads, which a context of jax does not reach."""
    names = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    before = {name: getattr(jax.config, name) for name in (*names, "jax_compilation_cache_dir")}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    stored._timed.cache_clear()  # of times that were really taken


def test_the_device_is_asked_unless_a_form_is_given(monkeypatch):
    variants = {part.name: part for part in models.variants(DECODE, 1)}
    case, choice = models.load(DECODE, 1, quick=True), lambda *_: stored.MULTIPLIED_OUT
    monkeypatch.setattr(stored, "choice", choice)
    assert models.build(case, variants["int8_w reduce"]).note == "products: 6 reduce"
    assert models.build(case, variants["int8_w"]).note == "products: 6 multiplied out"
    assert stored.choice is choice and len(case.lowered) == 1


def row(variant, ms, *, model=POSE, batch=1, **more):
    return Row(model=model, batch=batch, variant=variant, ms=ms, ms_q1=ms, ms_q3=ms, **more)


ROWS = [
    row("fp32", 2.0, vs_fp32=1.0, vs_tf32=1.25, error=0.0),
    row("tf32", 1.6, vs_fp32=0.8, vs_tf32=1.0, error=1e-4),
    row("fp16", 1.2, vs_fp32=0.6, vs_tf32=0.75, error=1e-3, verified=True),
    row("bf16", 1.7, vs_fp32=0.85, vs_tf32=1.06, error=1e-2, verified=False),
    row("jax_bf16", 1.0, model=DECODE, vs_tf32=0.6, vs_bf16=1.0),
    row("int8_w", 0.8, model=DECODE, vs_tf32=0.5, vs_bf16=0.8),
    row("int8_w reduce", 9.0, model=DECODE, vs_tf32=9.0, vs_bf16=9.0),
    Row(model=ENCODER, batch=32, variant="fp32", note="left out"),
]


def test_findings_say_which_targets_are_met_and_what_is_slower():
    sentences = speed.findings(ROWS)
    assert [text.rpartition(": ")[2] for text in sentences[:3]] == ["met.", "met.", "not met."]
    assert sentences[3].endswith("it was not measured.")
    assert sentences[4].startswith(f"Slower than TF32: {POSE}, batch 1, bf16 (1.06) of 3 programs")
    assert sentences[5:] == [f"Of 2 programs that were verified, refused: {POSE}, bf16."]
    assert [line.variant for line in speed.overview(ROWS)] == ["tf32", "fp16", "jax_bf16", "int8_w"]


def test_the_figure_has_a_panel_for_each_model_and_batch():
    axes = [axis for axis in figures.bars(ROWS).axes if axis.get_visible()]
    assert [len(axis.patches) for axis in axes] == [4, 3, 0]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="has a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(SystemExit, match="No GPU found"):
        speed.check_device(speed.Config())


@pytest.mark.slow
def test_a_dry_run(tmp_path, as_users_run, monkeypatch):
    """The deadline passes while decoding is built; the encoder then cannot be loaded at batch 32; a third call has all."""
    load, build, summary = models.load, models.build, tmp_path / "speed_gpu/summary.json"

    def rows_after(minutes):
        speed.main(speed.Config(cpu=True, quick=True, minutes=minutes, results=tmp_path))
        return [Row(**line) for line in json.loads(summary.read_text())["rows"]]

    def late(case, variant):
        built = build(case, variant)
        if variant.name == "int8_w":
            clock.setattr(time, "monotonic", lambda: 1e12)
        return built

    with monkeypatch.context() as clock:
        clock.setattr(models, "build", late)
        rows = rows_after(30)
    done = [(line.model, line.variant) for line in rows if line.ms is not None]
    assert done[:6] == [(POSE, name) for name in ("fp32", "tf32", "fp16", "tf32_rule", "bf16", "fp16 cuDNN")]
    assert done[6:] == [(DECODE, name) for name in ("fp32", "tf32", "jax_bf16", "int8_w")]
    assert len(rows) == 6 + 10 + 7 + 7 + 5 + 7
    assert all("minutes were over" in line.note for line in rows if line.ms is None or line.verified is not None)

    def failing(name, batch, **options):
        if (name, batch) == (ENCODER, 32):
            raise assets.AssetError("it is not there")
        return load(name, batch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(models, "load", failing)
        rows = rows_after(30)
    assert {line.note for line in rows if line.ms is None} == {"it is not there"}
    done = [line for line in rows if line.ms is not None]
    assert len(done) == len(rows) - 7 and all(np.isfinite(line.error) and line.error < 0.05 for line in done)
    low = [line for line in done if line.model == DECODE and line.definition_error is not None]
    assert len(low) == 4 + 3 + 4 and all(line.definition_error < 1e-4 for line in low)
    assert [line.variant for line in done if line.verified] == ["fp16", "bf16"]
    assert (tmp_path / "speed_gpu/docs.md").read_text().count("\n| ") == 2 + 10

    assert all(line.ms is not None for line in rows_after(30))
    assert len(json.loads(summary.read_text())["reused_pieces"]) == 5 + 2
