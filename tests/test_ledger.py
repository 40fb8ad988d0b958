import dataclasses

import pytest

from mpjax.ledger import Ledger


def test_ledgers_add_field_by_field() -> None:
    total = Ledger(forward=1, vjp=2, jvp=3, hvp=4, compilations=5, evaluations=6) + Ledger(vjp=10, evaluations=1)
    assert total == Ledger(forward=1, vjp=12, jvp=3, hvp=4, compilations=5, evaluations=7)


def test_as_dict_names_every_count_of_the_summary_contract() -> None:
    names = {"forward", "vjp", "jvp", "hvp", "compilations", "evaluations"}
    assert Ledger().as_dict() == dict.fromkeys(names, 0)


def test_a_ledger_is_immutable_and_adds_only_to_ledgers() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ledger().forward = 1
    with pytest.raises(TypeError):
        Ledger() + 1


def test_a_ledger_times_a_number() -> None:
    assert Ledger(forward=2, hvp=3) * 4 == Ledger(forward=8, hvp=12)
    assert Ledger(vjp=1) * 0 == Ledger()
