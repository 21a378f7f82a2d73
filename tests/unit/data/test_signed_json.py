"""JSON that carries the checksum of its own content."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.signed_json import with_signature, without_signature

CONTENT = {"name": "d", "count": 7, "inner": {"rate": 0.1, "ids": [1, 2]}}


def test_what_is_signed_is_read() -> None:
    signed = with_signature({**CONTENT, "inner": {"rate": 0.1, "ids": (1, 2)}}, "mark")
    assert list(signed)[-1] == "mark" and without_signature(json.loads(json.dumps(signed, indent=3)), "mark") == CONTENT
    assert with_signature(signed, "mark") == signed


@given(st.data())
def test_no_changed_character_passes(data: st.DataObject) -> None:
    text = json.dumps(with_signature(CONTENT, "mark"))
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="ascii"))
    changed = text[:place] + other + text[place + 1:]
    try:
        content = json.loads(changed)
        found = without_signature(content, "mark")
    except (ValueError, AttributeError):
        return
    assert found == CONTENT


def test_a_signature_that_is_missing_or_unknown() -> None:
    with pytest.raises(ValueError, match="it has no mark; it is damaged, or was edited"):
        without_signature(CONTENT, "mark")
    with pytest.raises(ValueError, match="its checksum is by 'md5', which is unknown here"):
        without_signature({**CONTENT, "mark": "md5:00"}, "mark")
