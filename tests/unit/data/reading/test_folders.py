"""Files of a folder, and links in it."""

import gzip
import os

import pytest

from dsv3_megatron.data.reading.inputs import expand_inputs
from tests.unit.data.reading.files import jsonl, texts_of


def test_folders(tmp_path, capsys):
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / ".hidden").mkdir()
    for name in ("b.py", "sub/a", ".hidden/x", ".x"):
        (tmp_path / "texts" / name).write_text(name)
    found = expand_inputs([str(tmp_path / "texts")])
    assert [(file.path.removeprefix(f"{tmp_path}/texts/"), file.format) for file in found] == [
        ("b.py", "text"),
        ("sub/a", "text"),
    ]
    (tmp_path / "texts" / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(["x"])))
    assert [file.format for file in expand_inputs([str(tmp_path / "texts")])] == ["jsonl"]
    assert "1 JSON lines files taken; left out: 2 (hidden), 2 (text)" in capsys.readouterr().err
    (tmp_path / "no").mkdir()
    with pytest.raises(ValueError, match="the folder holds no files"):
        expand_inputs([str(tmp_path / "no")])


def test_links_are_followed_once(tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.jsonl").write_bytes(jsonl(["outside"]))
    (outside / "back").symlink_to("../data")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_bytes(jsonl(["inside"]))
    (data / "link").symlink_to("../outside")
    (data / "z").symlink_to(".")
    assert texts_of(expand_inputs([str(data)]))[0] == ["inside", "outside"]
    assert "left out: 2 (a folder reached twice by links)" in capsys.readouterr().err
    # A glob meets the same files again by way of the links.
    assert sorted(texts_of(expand_inputs([f"{data}/*"]))[0]) == ["inside", "outside"]
    assert "(another name of a file that is read)" in capsys.readouterr().err
    # Two names that were given are two files.
    (data / "again.jsonl").symlink_to("a.jsonl")
    assert texts_of(expand_inputs([f"{data}/a.jsonl", f"{data}/again.jsonl"]))[0] == ["inside"] * 2


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"]))
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):  # as for another user than root
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        expand_inputs([str(tmp_path)])
