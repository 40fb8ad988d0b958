"""experiments/referee on a toy: methods of files of one's own, regret, and that a second run computes nothing again."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.referee import __main__ as referee
from experiments.referee import entrants, judge, subjects
from experiments.referee.judge import Choice
from mpjax import losses
from mpjax.program import from_linen

ESTIMATOR = """
import numpy as np
from experiments.referee.entrants import Estimator
from mpjax.sensitivity.scores import Scores
from mpjax.sensitivity.task import exactly, scorer_of


def backwards():
    def estimate(task):
        return task.scores("backwards", exactly(np.arange(len(task.names))[::-1] + 1.0), kind="loss")

    return scorer_of(estimate, None, weights_only=False)


ESTIMATORS = {"backwards": Estimator(make=lambda subject: backwards())}
"""
FORMAT = """
from mpjax.formats import Format, register

register(Format(name="toy_w", storage="int8", group=16))
FORMATS = {"toy": (("toy_w", "bfloat16_w"), (1.5,))}
"""


@pytest.fixture
def toy(monkeypatch):
    def load(quick):
        module = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32), nn.relu, nn.Dense(4)])
        x = jax.random.normal(jax.random.key(0), (4, 8, 16), jnp.float32)
        model = from_linen(module, module.init(jax.random.key(1), x[0]), x[0])
        return subjects.Subject(
            name="toy",
            model=model,
            loss=losses.OUTPUT,
            scored=[(x[0],), (x[1],)],
            heldout=[(x[2],), (x[3],)],
            blocks=np.repeat(np.arange(8), 2),
            error=jax.jit(losses.OUTPUT.value),
        )

    monkeypatch.setattr(subjects, "LOADERS", {"toy": load})
    monkeypatch.setattr(entrants, "known", _few)


def _few():
    crossed = _KNOWN()
    crossed.formats = {"int": (("int4_w", "int8_w"), (1.1, 1.6))}
    crossed.estimators = {
        name: crossed.estimators[name] for name in ("local_rounding", "interactions", "depth", "random")
    }
    return crossed


_KNOWN = entrants.known


def test_ones_own_estimator_and_format_take_part(toy, tmp_path):
    files = []
    for name, text in {"estimator": ESTIMATOR, "format": FORMAT}.items():
        files.append(tmp_path / f"{name}.py")
        files[-1].write_text(text)
    config = referee.Config(models=("toy",), method=tuple(files), seeds=2, results=tmp_path)
    referee.main(config)
    summary = json.loads((tmp_path / "referee" / "summary.json").read_text())
    cells = {(row["formats"], row["estimator"], row["allocator"]): row for row in summary["rows"]}
    assert {"toy", "int"} == {formats for formats, *_ in cells} and ("toy", "backwards", "ilp") in cells
    assert ("int", "interactions", "iqp") in cells and ("int", "depth", "ilp") not in cells  # only ranks
    assert all(row["regret"] >= 1 - 1e-9 for row in summary["rows"])
    methods = {(row["estimator"], row["allocator"]): row for row in summary["methods"]}
    assert methods["local_rounding", "ilp"]["regret"] <= methods["backwards", "ilp"]["regret"]
    referee.main(config)
    again = json.loads((tmp_path / "referee" / "summary.json").read_text())
    assert again["rows"] == summary["rows"] and again["ledger"] == summary["ledger"]
    assert len(again["reused_pieces"]) > len(again["scores"])


def test_a_method_file_without_methods_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(SystemExit, match="ESTIMATORS, ALLOCATORS and FORMATS"):
        entrants.joined_by(entrants.Entrants(), tmp_path / "empty.py")
    with pytest.raises(SystemExit, match="expected a Python file"):
        entrants.joined_by(entrants.Entrants(), tmp_path / "missing.py")


def test_regret_is_the_error_over_the_least_known():
    blocks = np.repeat(np.arange(10), 3)
    rng = np.random.default_rng(0)
    best = rng.uniform(1, 2, 30)
    options = [best, 2 * best, 3 * best]
    known = {("m", "f", 4.0): options}
    choices = [
        Choice(
            model="m", formats="f", share=4.0, estimator=f"e{i}", allocator="a", errors=[errors], blocks=blocks, bytes=1
        )
        for i, errors in enumerate(options)
    ]
    cells = judge.cells(choices, known)
    np.testing.assert_allclose([cell.regret for cell in cells], [1, 2, 3])
    for cell in cells:  # blocks are resampled together, so that a fixed ratio has no spread
        np.testing.assert_allclose([cell.regret_low, cell.regret_high], cell.regret)
    methods = judge.methods(choices, known, {f"e{i}": (1.0, 1.0) for i in range(3)})
    assert [row.estimator for row in methods] == ["e0", "e1", "e2"] and [row.wins for row in methods] == [1, 0, 0]
