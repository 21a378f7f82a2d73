"""Files of every kind that is read."""

import pytest

from dsv3_megatron.data.reading.inputs import expand_inputs
from tests.unit.data.reading.files import COMPRESSORS, jsonl, write_parquet


@pytest.fixture
def mixed(tmp_path):
    """One file of every kind and the texts in them, in order."""
    groups = [[f"{name} {number} é中\n" * (number % 4 + 1) for number in range(9)] for name in "abcdefg"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(groups[0]))
    for letter, kind, texts in zip("bcde", COMPRESSORS, groups[1:5], strict=True):
        (tmp_path / f"{letter}.jsonl.{kind}").write_bytes(COMPRESSORS[kind](jsonl(texts)))
    write_parquet(tmp_path / "f.parquet", groups[5], row_group_size=4)
    (tmp_path / "g").mkdir()
    for number, text in enumerate(groups[6]):
        (tmp_path / "g" / f"{number}.txt").write_text(text, encoding="utf-8")
    patterns = [str(tmp_path / "*.jsonl*"), str(tmp_path / "f.parquet"), str(tmp_path / "g")]
    return expand_inputs(patterns), [text for group in groups for text in group]
