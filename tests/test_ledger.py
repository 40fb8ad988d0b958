import dataclasses

import pytest

from mpjax.ledger import Ledger


def test_ledgers_add_field_by_field_and_multiply() -> None:
    total = Ledger(forward=1, vjp=2, jvp=3, hvp=4, compilations=5, evaluations=6) + Ledger(vjp=10, evaluations=1)
    assert total == Ledger(forward=1, vjp=12, jvp=3, hvp=4, compilations=5, evaluations=7)
    assert Ledger(forward=2, hvp=3) * 4 == Ledger(forward=8, hvp=12)
    names = {"forward", "vjp", "jvp", "hvp", "compilations", "evaluations"}  # of the summary contract
    assert (total * 0).as_dict() == dict.fromkeys(names, 0)


def test_a_ledger_is_immutable_and_adds_only_to_ledgers() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ledger().forward = 1
    with pytest.raises(TypeError):
        Ledger() + 1
