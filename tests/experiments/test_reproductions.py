"""Published results against ours."""

import json

from experiments.reproductions import hawq
from experiments.reproductions.__main__ import Config, main


def test_hawq_published_17_of_18_optimal_choices(tmp_path) -> None:
    main(Config(only=("hawq",), results=tmp_path))
    rows = json.loads((tmp_path / "reproductions" / "summary.json").read_text())["rows"]
    assert len(rows) == 18 and sum(row["agreement"] == 1 for row in rows) == 17
    (other,) = [row for row in rows if row["agreement"] < 1]
    assert other["quantity"] == "resnet50, modelsize 0.25"
    assert (round(other["published"], 5), round(other["ours"], 5)) == (-0.82323, -0.83139)
    assert "17 of 18" in hawq.finding(hawq.rows())
