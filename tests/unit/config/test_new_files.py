"""Files that get their name all at once, and links that somebody put in their way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.new_files import open_new, replace_text, replacing, require_own_folder


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file that nothing may write to."""
    file = tmp_path / "precious"
    file.write_text("of another matter")
    return file


def test_a_planted_link_is_replaced_and_not_followed(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "made.partial").symlink_to(precious)
    replace_text(tmp_path / "made", "ours")
    assert precious.read_text() == "of another matter"
    assert (tmp_path / "made").read_text() == "ours" and not (tmp_path / "made").is_symlink()
    (tmp_path / "made").unlink()
    (tmp_path / "made").symlink_to(precious)  # the final name is replaced too, not written through
    replace_text(tmp_path / "made", "ours again", is_shared=True, is_durable=True)
    assert precious.read_text() == "of another matter" and (tmp_path / "made").read_text() == "ours again"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "precious"]


def test_whoever_is_quicker_is_not_followed_either(tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    (tmp_path / "made").symlink_to(precious)
    monkeypatch.setattr(os, "unlink", lambda path: None)  # the link is there again before the file is made
    with pytest.raises(FileExistsError):
        open_new(tmp_path / "made")
    assert precious.read_text() == "of another matter"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    replace_text(tmp_path / "made", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "made", "w") as stream:
        stream.write("half")
        raise KeyboardInterrupt
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "made", "\udc00")
    assert [file.name for file in tmp_path.iterdir()] == ["made"] and (tmp_path / "made").read_text() == "old"


def test_writers_at_once_have_names_of_their_own(tmp_path: Path) -> None:
    with replacing(tmp_path / "made", "w", is_shared=True) as stream:
        assert Path(stream.name).name == f"made.{os.uname().nodename}.{os.getpid()}.partial"
        stream.write("first")
        replace_text(tmp_path / "made", "of another writer")
    assert (tmp_path / "made").read_text() == "first"


def test_unfinished_work_of_others_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    require_own_folder(own)
    (tmp_path / "link").symlink_to(own)
    with pytest.raises(ConfigError, match=r"link is a link, where a folder of this user's would be: remove it, or"):
        require_own_folder(tmp_path / "link")
    with pytest.raises(ConfigError, match="is no folder, where a folder of this user's would be"):
        require_own_folder(tmp_path / "nowhere")
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    message = rf"own was made by another user \(uid {uid}, this one is {uid + 1}\): have that user"
    with pytest.raises(ConfigError, match=message):
        require_own_folder(own)
