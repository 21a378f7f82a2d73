"""The command that writes the papers' figures beside this library's."""

from __future__ import annotations

import json

from dsv3_megatron.commands.report import main


def test_json_has_every_row_once(capsys) -> None:
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [row for section in found["sections"] for row in section["rows"]]
    assert sum(found["count"].values()) == len(rows) > 150
    assert {row["verdict"] for row in rows} == {"equal", "apart", "not checkable here", "not computed"}


def test_the_page_is_written_where_it_was_asked_for(tmp_path, capsys) -> None:
    assert main(["--output", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out == ""
    assert "| all parameters | report, 4.2 | 671B | 671.03B | equal | A |" in (tmp_path / "page.md").read_text()


def test_a_place_that_cannot_be_written_is_told_first(tmp_path, capsys) -> None:
    assert main(["--output", str(tmp_path / "missing" / "page.md")]) == 2
    assert "--output" in capsys.readouterr().err
