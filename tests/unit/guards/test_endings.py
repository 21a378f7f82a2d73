"""What a run's end leaves: its exit code for the launcher, a guard's reason in the folder of checkpoints."""

import logging

import pytest

from dsv3_megatron.guards.endings import ENDED_FILE, EXIT_CODE_FILE, forget_ended, mark_ended, tell_launcher


def test_the_first_process_is_heard(tmp_path, monkeypatch):
    monkeypatch.setenv(EXIT_CODE_FILE, str(tmp_path / "code"))
    assert [tell_launcher(3), tell_launcher(4)] == [3, 4]
    assert (tmp_path / "code").read_text() == "3\n"


def test_without_a_launcher_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(EXIT_CODE_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert tell_launcher(3) == 3 and not list(tmp_path.iterdir())


def test_a_code_that_cannot_be_told_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(EXIT_CODE_FILE, str(tmp_path / "gone" / "code"))
    assert tell_launcher(3) == 3
    assert f"exit code 3 cannot be told to the launcher: {tmp_path}/gone/code: No such file" in caplog.text


def test_a_guards_reason_is_left_and_taken_away(tmp_path):
    folder = tmp_path / "saved"
    mark_ended(str(folder), "iteration 18: a spike")
    assert (folder / ENDED_FILE).read_text() == "iteration 18: a spike\n"
    forget_ended(str(folder))
    forget_ended(str(folder))
    assert not list(folder.iterdir())


@pytest.mark.parametrize("act", [lambda folder: mark_ended(folder, "why"), forget_ended])
def test_a_folder_that_is_a_file_is_only_said(tmp_path, caplog, act):
    (tmp_path / "saved").write_text("")
    with caplog.at_level(logging.WARNING):
        act(str(tmp_path / "saved"))
    assert ENDED_FILE in caplog.text and "cannot be" in caplog.text
