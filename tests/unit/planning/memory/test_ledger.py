"""A ledger of tensors: levels, peaks, references, what is made again, turns."""

from __future__ import annotations

import pytest

from dsv3_megatron.planning.memory.ledger import MemoryLedger, Turn, run_turns


def test_a_tensor_lives_as_long_as_it_has_references() -> None:
    ledger = MemoryLedger()
    first = ledger.make("first", 10)
    ledger.keep(first)
    second = ledger.make("second", 5)
    ledger.drop(second)
    assert (ledger.level, ledger.peak) == (10, 15)
    ledger.drop(first)
    assert ledger.level == 10 and ledger.by_name() == {"first": 10}
    ledger.drop(first)
    assert ledger.level == 0 and ledger.by_name() == {}
    with pytest.raises(KeyError):  # one reference too few
        first.references = 1
        ledger.drop(first)


def test_what_is_made_again_is_not_kept_and_comes_back_once() -> None:
    ledger = MemoryLedger()
    a, b = ledger.make("a", 4), ledger.make("b", 6)
    ledger.make_again(a, b, work=100)
    ledger.keep(a)  # two operations would keep a, none b
    ledger.keep(a)
    ledger.drop(a, b)
    assert ledger.level == 0
    ledger.take_turns()
    ledger.need(a)
    assert ledger.level == 4 and ledger.peak == 104
    ledger.need(a)
    ledger.drop(a)
    assert ledger.level == 4
    ledger.drop(a)
    assert ledger.level == 0


def test_turns_begin_where_the_one_before_ends() -> None:
    ledger = MemoryLedger()
    kept = ledger.make("kept", 8)
    ledger.pulse(20)
    ledger.pause()
    ledger.make("more", 2)
    ledger.drop(kept)
    turns = ledger.take_turns()
    assert turns == (Turn(28, 8), Turn(2, -6))
    assert run_turns(turns) == Turn(28, 2)
    assert run_turns(turns, level=5) == Turn(33, 7)
    assert ledger.take_turns() == (Turn(0, 0),)
