"""Datasets say how their texts begin and end, and must agree in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.data.blend import check_data
from dsv3_megatron.data.indexed import dataset_paths
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.text_form import TextForm, common_form, form_of_dataset


def write(prefix: Path, **options: Any) -> str:
    with DatasetWriter(str(prefix), vocab_size=10, options=options) as writer:
        writer.add_documents(np.arange(6), np.array([6]))
    return str(prefix)


def test_forms(tmp_path: Path) -> None:
    begins = write(tmp_path / "begins", begin_ids=[0], end_ids=[1, 2])
    before, bare = write(tmp_path / "before"), write(tmp_path / "bare")
    Path(dataset_paths(bare)[2]).unlink()
    assert form_of_dataset(begins) == TextForm((0,), (1, 2)) and str(form_of_dataset(begins)) == (
        "begin with 0 and end with 1, 2")
    assert form_of_dataset(before) == TextForm() and str(TextForm()) == "have no ids around them"
    assert form_of_dataset(bare) is None
    assert common_form([bare, begins]) == TextForm((0,), (1, 2)) and common_form([bare]) is None


def test_a_blend_of_two_forms_is_refused(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", begin_ids=[0], end_ids=[]), write(tmp_path / "other", begin_ids=[], end_ids=[])
    check_data([one], vocab_size=10)
    with pytest.raises(ValueError, match="of .*one begin with 0; those of .*other have no ids around them; prepro"):
        check_data([one, other], vocab_size=10)
