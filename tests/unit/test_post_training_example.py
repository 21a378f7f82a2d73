"""examples/post_train_dsv3.sh says first what it needs, its commands have its flags, and its sums are right."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dsv3_megatron.commands import preprocess
from dsv3_megatron.config.load import build_parser
from dsv3_megatron.data.chat.conversation import read_conversation
from examples.make_sums import main as make_sums

SCRIPT = Path(__file__).resolve().parents[2] / "examples/post_train_dsv3.sh"


def test_without_the_quickstart_nothing_starts(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env={**os.environ, "RUN_DIR": str(tmp_path)}, capture_output=True,
                          text=True, timeout=30)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == (f"error: {tmp_path} has no checkpoint of the quickstart; run bash examples/pretrain_dsv3.sh "
                           "first, or set RUN_DIR\n")


def test_its_commands_have_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    text = SCRIPT.read_text().replace("\\\n", " ")
    found = {match[1]: [word for word in shlex.split(match[2]) if word.startswith("--")]
             for match in re.finditer(r'"\$python" -m dsv3_megatron (\S+) (.*)', text)}
    assert found.keys() == {"preprocess", "sft"}
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert not set(found["sft"]) - known - {"--epochs"}
    with pytest.raises(SystemExit, match="0"):
        preprocess.main(["--help"])
    shown = capsys.readouterr().out
    assert [flag for flag in found["preprocess"] if flag not in shown] == []


def test_sums_are_right_and_the_same_again(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, ("1", "1", "2"), strict=True):
        assert make_sums(["--number", "50", "--seed", seed, "--output", str(file)]) == 0
    lines = files[0].read_text().splitlines()
    assert files[0].read_text() == files[1].read_text() != files[2].read_text() and len(lines) == 50
    for line in lines:
        question, answer = read_conversation(line).messages
        assert sum(map(int, re.findall(r"\d", question["content"]))) == int(answer["content"])
