"""What low precision pays, on a small stack of products."""

import json

import pytest

from experiments.what_pays import __main__ as what_pays
from experiments.what_pays.__main__ import Config, decoder
from mpjax.program import from_function

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def test_a_small_stack_from_end_to_end(tmp_path, monkeypatch):
    import jax

    def load(name):
        function, params, width = decoder(1, 32)
        tokens = jax.random.normal(jax.random.key(0), (2, 4, width), "float32")
        return from_function(function, params, tokens[0]), [(part,) for part in tokens]

    monkeypatch.setattr(what_pays, "load", load)
    what_pays.main(Config(models=("decode, 1 token",), rounds=3, results=tmp_path))
    summary = json.loads((tmp_path / "what_pays" / "summary.json").read_text())
    rows = {row["format"]: row for row in summary["rows"]}
    assert set(rows) == {"float32, jit", "float32, rule", *what_pays.TEXT}
    assert 1 in (rows["float32, jit"]["vs_float32"], rows["float32, rule"]["vs_float32"])
    assert rows["int4_w"]["stored_mb"] < rows["int8_w"]["stored_mb"] < rows["bfloat16"]["stored_mb"]
    assert rows["int8_w"]["error"] < rows["int4_w"]["error"] and len(summary["overview"]) == 1


def test_wrong_options_are_refused():
    for wrong in ({"rounds": 2}, {"models": ("iris",)}):
        with pytest.raises(SystemExit):
            Config(**wrong)
