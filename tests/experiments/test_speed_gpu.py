"""experiments/speed_gpu without a GPU: tasks side by side, its rows and sentences; all of it in a dry run."""

import json
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from experiments.lib import assets
from experiments.speed_gpu import __main__ as speed
from experiments.speed_gpu import building, figures, models
from experiments.speed_gpu.models import DECODE, ENCODER, POSE
from experiments.speed_gpu.rows import Row
from mpjax.kernels import stored
from mpjax.xla import profile


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """In all threads, which a context of jax does not reach."""
    names = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    stored._timed.cache_clear()  # of times that were really taken


@pytest.fixture
def builders():
    made = building.Builders(4, time.monotonic() + 60)
    yield made
    made.close()


def test_nothing_is_built_while_a_task_times(builders):
    """Four tasks build at once; each then times alone."""
    together, busy, most = threading.Barrier(4, timeout=30), [], []

    def task():
        together.wait()
        with builders._gate.timing():
            busy.append(1)
            most.append((len(busy), builders._gate._building))
            time.sleep(0.01)
            busy.pop()
        return True

    tasks = [builders.submit(task) for _ in range(4)]
    builders.finish()
    assert all(done.result() for done in tasks) and most == [(1, 0)] * 4


def test_tasks_are_given_what_they_need_and_an_error_ends_those_that_need_it(builders):
    first, second = builders.submit(lambda: 2), builders.submit(lambda: 1 / 0)
    assert builders.submit(lambda n: n + 1, first).result() == 3
    with pytest.raises(ZeroDivisionError):
        builders.submit(lambda n: n, second).result()
    builders.deadline = 0.0
    with pytest.raises(building.OutOfTime):
        builders.submit(lambda: 1).result()


def test_a_task_that_does_not_end_keeps_nobody(builders, monkeypatch):
    monkeypatch.setattr(building, "GRACE", 0.05)
    end = threading.Event()
    builders.submit(end.wait)
    builders.deadline = 0.0
    with pytest.raises(building.OutOfTime):
        builders.finish()
    end.set()
    builders.finish()


def test_the_device_is_asked_unless_a_form_is_given(builders, as_users_run):
    case = models.load(DECODE, 1, quick=True, seed=0)
    low = models.mixed(case, "int8_w", "float32")
    choice, compared = stored.choice, profile.compared
    stored._timed.cache_clear()

    def traced(form):
        with building.of_form(form) as forms:
            jax.eval_shape(lambda *arguments: low.call(*arguments), low.params, *case.batches[0])  # traced anew
        return dict(forms)

    with builders.asked():
        assert builders.submit(traced, builders.submit(lambda: "reduce")).result() == {"reduce": 6}
        assert not stored._timed.cache_info().currsize
        forms = builders.submit(traced, builders.submit(lambda: None)).result()
        assert sum(forms.values()) == 6 and set(forms) <= {"digits", stored.MULTIPLIED_OUT}
        assert stored._timed.cache_info().currsize == 3  # square, up, down
    assert (stored.choice, profile.compared) == (choice, compared)


def row(variant, ms, *, model=POSE, batch=1, **more):
    return Row(model=model, batch=batch, variant=variant, ms=ms, ms_q1=ms, ms_q3=ms, **more)


ROWS = [
    row("fp32", 2.0, vs_fp32=1.0, vs_tf32=1.25, error=0.0),
    row("tf32", 1.6, vs_fp32=0.8, vs_tf32=1.0, error=1e-4),
    row("fp16", 1.2, vs_fp32=0.6, vs_tf32=0.75, error=1e-3, verified=True),
    row("bf16", 1.7, vs_fp32=0.85, vs_tf32=1.06, error=1e-2, verified=False),
    row("jax_bf16", 1.0, model=DECODE, vs_tf32=0.6, vs_bf16=1.0),
    row("int8_w", 0.8, model=DECODE, vs_tf32=0.5, vs_bf16=0.8),
    row("int8_w parts", 9.0, model=DECODE, vs_tf32=9.0, vs_bf16=9.0),
    Row(model=ENCODER, batch=32, variant="fp32", note="left out"),
]


def test_findings_say_which_targets_are_met_and_what_is_slower():
    sentences = speed.findings(ROWS)
    assert [text.rpartition(": ")[2] for text in sentences[:3]] == ["met.", "met.", "not met."]
    assert "int4_w was not measured" in sentences[3]
    assert sentences[4].startswith(f"Slower than TF32: {POSE}, batch 1, bf16 (1.06) of 3 programs")
    assert sentences[5] == f"Of 2 programs that were verified at batch 1, refused: {POSE}, bf16."
    assert sentences[6:] == [
        f"{POSE}, batch 1: fp16 is fastest, 1.200 ms, 0.75 of TF32's time.",
        f"{DECODE}, batch 1: int8_w is fastest, 0.800 ms, 0.50 of TF32's time.",
        f"{ENCODER}, batch 32: not timed.",
    ]
    assert [line.variant for line in speed.overview(ROWS)] == ["tf32", "fp16", "jax_bf16", "int8_w"]


def test_the_figure_has_a_panel_for_each_model_and_batch():
    axes = [axis for axis in figures.bars(ROWS).axes if axis.get_visible()]
    assert [len(axis.patches) for axis in axes] == [4, 3, 0]


def test_crops_come_from_the_cache_and_are_random_without(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path)
    models._crops.cache_clear()
    images, note = models._crops(0, models.SIZE)
    assert images.shape[1:] == (256, 256, 3) and note == "inputs are random images"
    (tmp_path / "crops").mkdir()
    pixels = np.full((2, 256, 256, 3), 255, np.uint8)
    arrays = {f"array/{split}_pixels": pixels for split in ("calibration", "evaluation")}
    np.savez(tmp_path / "crops" / "crops-0.npz", **arrays)
    models._crops.cache_clear()
    images, note = models._crops(0, models.SIZE)
    assert images.shape == (4, 256, 256, 3) and images.max() == 1 and note is None
    models._crops.cache_clear()


def test_misuse_is_refused():
    for wrong in (dict(rounds=0), dict(workers=0), dict(minutes=0.0), dict(seed=-1)):
        with pytest.raises(SystemExit, match=next(iter(wrong))):
            speed.Config(**wrong)
    if jax.default_backend() != "gpu":
        with pytest.raises(SystemExit, match="No GPU found"):
            speed.check_device(speed.Config())


def test_what_there_is_no_time_for_is_a_note_and_measured_by_the_next_call(tmp_path, as_users_run):
    config = speed.Config(cpu=True, quick=True, minutes=1e-9, results=tmp_path)
    speed.main(config)
    summary = json.loads((tmp_path / "speed_gpu/summary.json").read_text())
    assert len(summary["rows"]) == 2 * 4 + 14 + 7 + 2 * 7
    assert all(line["ms"] is None and "minutes were over" in line["note"] for line in summary["rows"])
    assert not (tmp_path / "speed_gpu/pieces").exists()


@pytest.mark.slow
def test_a_dry_run(tmp_path, as_users_run, monkeypatch):
    """All jobs; a model that cannot be loaded has notes, and the others their numbers. A second call measures it alone."""
    load = models.load

    def failing(name, batch, **options):
        if (name, batch) == (ENCODER, 32):
            raise assets.AssetError("it is not there")
        return load(name, batch, **options)

    monkeypatch.setattr(models, "load", failing)
    config = speed.Config(cpu=True, quick=True, minutes=30, results=tmp_path)
    speed.main(config)
    summary = json.loads((tmp_path / "speed_gpu/summary.json").read_text())
    rows = [Row(**line) for line in summary["rows"]]
    assert {line.note for line in rows if line.ms is None} == {"it is not there"}
    done = [line for line in rows if line.ms is not None]
    assert len(done) == len(rows) - 7 and all(np.isfinite(line.error) and line.error < 0.05 for line in done)
    low = [line for line in done if line.model == DECODE and line.definition_error is not None]
    assert len(low) == 4 + 7 + 4 and all(line.definition_error < 1e-4 for line in low)
    assert [line.variant for line in done if line.verified] == ["fp16", "bf16", "bf16", "fp16", "fp16_act", "bf16_x3"]
    assert (tmp_path / "speed_gpu/docs.md").read_text().count("\n| ") == 2 + 10
    monkeypatch.setattr(models, "load", load)
    speed.main(config)
    again = json.loads((tmp_path / "speed_gpu/summary.json").read_text())
    assert len(again["reused_pieces"]) == 5 + 6 and all(line["ms"] is not None for line in again["rows"])
