"""What commands print and write: JSON for any reader, readers that go, full disks, odd encodings, places for files."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.output import json_text, require_output_file

ROOT = Path(__file__).resolve().parents[3]
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


# -- JSON ----------------------------------------------------------------------------------------------------------


@given(VALUES)
def test_json_has_no_number_that_json_does_not_know(value: object) -> None:
    def expected(part: object) -> object:
        if isinstance(part, dict):
            return {key: expected(item) for key, item in part.items()}
        if isinstance(part, list):
            return [expected(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    assert json.loads(json_text(value), parse_constant=refuse) == expected(value)


def calls_of_json(path: Path) -> list[str]:
    return [f"{path.name}:{node.lineno}" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps")]


def test_json_is_written_by_one_function(tmp_path: Path) -> None:
    files = [*(ROOT / "dsv3_megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    found = {place for path in files if path.name != "output.py" for place in calls_of_json(path)}
    assert found == set(), "use config.output.json_text"
    (tmp_path / "planted.py").write_text("import json\nprint(json.dumps(1))\n")
    assert calls_of_json(tmp_path / "planted.py") == ["planted.py:2"]


# -- streams ---------------------------------------------------------------------------------------------------------


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_file_s_place_is_looked_at_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "to-nowhere.png").symlink_to(tmp_path / "none" / "a.png")
    before = sorted(tmp_path.iterdir())
    for path in (None, "", tmp_path / "new.png", tmp_path / "old.png", "/dev/null"):
        require_output_file("--png", path)
    for path, message in (
            (tmp_path / "none" / "a.png", "--png=.*: the folder .*none does not exist; make it first"),
            (tmp_path / "to-nowhere.png", "the folder .*none does not exist"),
            (tmp_path, "is a folder; name a file in it"),
            (tmp_path / "old.png" / "a.png", "is a file, not a folder; give another place"),
            (tmp_path / ("a" * 300 + ".png"), "(too long)"),
            ("/proc/a.png", "it cannot be written"),
            ("a\0.png", "is not a name that a file can have")):
        with pytest.raises(ConfigError, match=message):
            require_output_file("--png", path)
    with pytest.raises(ConfigError, match="must end with .png"):
        require_output_file("--png", tmp_path / "a.pdf", ending=".png")
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "old.png").read_bytes() == b"old"
