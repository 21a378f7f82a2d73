"""Unpickling by a list: what is on it is made, everything else is refused before it is looked up."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.process.unpickling import UnpicklingError, load_listed, load_own, load_tensors


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def read(content: bytes, *allowed: tuple[str, str]) -> Any:
    return load_listed(io.BytesIO(content), lambda *names: names in allowed, "list of fractions")


def test_what_is_listed_is_made() -> None:
    assert read(pickle.dumps([Fraction(1, 3), {"a": 1.5}]), ("fractions", "Fraction")) == [Fraction(1, 3), {"a": 1.5}]


def test_what_is_not_listed_is_refused(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps([Fraction(1, 3), Payload(tmp_path / "made")], protocol)
        with pytest.raises(UnpicklingError, match="it names .*, which no list of fractions has"):
            read(content, ("fractions", "Fraction"))
    with pytest.raises(UnpicklingError, match="collections.OrderedDict"):
        read(pickle.dumps(OrderedDict()))
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists(), "the payload works"


def test_a_name_leads_nowhere_else() -> None:
    """Protocol 4 takes a name with dots apart: fractions.Fraction.from_float is not what is listed."""
    content = b"\x80\x04\x8c\x09fractions\x8c\x13Fraction.from_float\x93."
    assert pickle.loads(content) == Fraction.from_float
    with pytest.raises(UnpicklingError, match="names fractions.Fraction.from_float, which"):
        read(content, ("fractions", "Fraction.from_float"), ("fractions", "Fraction"))


def test_tensors(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(3), "b": [1, "x"]}, stream)
    stream.seek(0)
    loaded = load_tensors(stream)
    assert loaded["a"].tolist() == [0, 1, 2] and loaded["b"] == [1, "x"]
    for content in (pickle.dumps(Payload(tmp_path / "made")), _saved(Payload(tmp_path / "made"))):
        with pytest.raises((UnpicklingError, RuntimeError)):
            load_tensors(io.BytesIO(content))
    assert not (tmp_path / "made").exists()


def test_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps(Fraction(1, 3)))
    assert load_own(tmp_path / "a") == Fraction(1, 3)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
