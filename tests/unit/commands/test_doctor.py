"""The command `dsv3 doctor`: its marks, its exit status, its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.commands.doctor import EXIT_WRONG, main
from dsv3_megatron.rehearsal import device_library
from dsv3_megatron.reports import installation
from dsv3_megatron.reports.installation import PACKAGES, TOPICS, SetupFinding, State


def test_a_machine_that_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "a run can start here"
    assert [line for line in lines if line in TOPICS] == list(TOPICS), "every topic once, in order"


def test_what_must_be_mended_is_marked_counted_and_said_by_the_exit_status(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(folder: Path) -> list[SetupFinding]:
        return [SetupFinding(PACKAGES, "torch", "2.1, and >=2.11 is needed", State.WRONG, remedy="make setup")]

    monkeypatch.setattr(installation, "examine", examine)
    assert main([]) == EXIT_WRONG
    text = capsys.readouterr().out
    assert "  !! torch" in text and "do: make setup" in text
    assert text.splitlines()[-1] == "1 to mend before a run: torch"
    assert main(["--json"]) == EXIT_WRONG
    content = json.loads(capsys.readouterr().out)
    assert content["is_ready"] is False and content["findings"][0]["state"] == "wrong"


def test_a_missing_compiler_is_said_with_the_package(capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_library, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CC", raising=False)
    assert main(["--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["C compiler"]["state"] == "absent" and "apt-get install gcc" in findings["C compiler"]["found"]
