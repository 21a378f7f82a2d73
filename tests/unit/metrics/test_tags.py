"""The table of tags: in the README as it is here, one line a tag."""

from __future__ import annotations

import re

import pytest

from dsv3_megatron.metrics.tags import CONDITIONS, README, TAGS, table, with_table


def test_the_readme_has_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run python -m dsv3_megatron.metrics.tags"


def test_a_changed_table_is_found() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text.replace("| `lm loss` |", "| `loss` |")) == text
    with pytest.raises(ValueError, match="no place for the table"):
        with_table("# What a run writes")


def test_every_tag_has_a_line_and_a_meaning() -> None:
    assert len({tag.name for tag in TAGS}) == len(TAGS)
    for tag in TAGS:
        assert tag.kind in ("scalar", "histogram", "image", "text") and tag.meaning and tag.when in CONDITIONS
        assert set(re.findall(r"{(.*?)}", tag.name)) <= {
            "layer", "depth", "group", "component", "phase", "rule", "set"}
    assert table().count("\n") == len(TAGS) + 1
    assert {tag.when for tag in TAGS} == set(CONDITIONS)
