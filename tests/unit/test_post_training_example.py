"""examples/post_train_dsv3.sh says first what it needs, its commands have its flags, and its sums are right."""

from __future__ import annotations

import json
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
    assert found.keys() == {"preprocess", "sft", "grpo"}
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert not set(found["sft"]) - known - {"--epochs"}
    assert not set(found["grpo"]) - known
    with pytest.raises(SystemExit, match="0"):
        preprocess.main(["--help"])
    shown = capsys.readouterr().out
    assert [flag for flag in found["preprocess"] if flag not in shown] == []


def test_sums_are_right_and_the_same_again(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, ("1", "1", "2"), strict=True):
        assert make_sums(["--number", "50", "--seed", seed, "--boxed", "0.5", "--output", str(file)]) == 0
    lines = files[0].read_text().splitlines()
    assert files[0].read_text() == files[1].read_text() != files[2].read_text() and len(lines) == 50
    num_boxed = 0
    for line in lines:
        question, answer = read_conversation(line).messages
        said = re.fullmatch(r"(\d+)|\\boxed\{(\d+)\}", answer["content"])
        assert said and sum(map(int, re.findall(r"\d", question["content"]))) == int(said[1] or said[2])
        num_boxed += said[2] is not None
    assert 15 <= num_boxed <= 35
    assert make_sums(["--number", "200", "--output", str(tmp_path / "quarter")]) == 0
    assert 30 <= (tmp_path / "quarter").read_text().count("boxed") <= 70


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan", "half"])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_sums([f"--boxed={share}", "--output", str(tmp_path / "sums")])
    assert "--boxed" in capsys.readouterr().err and not (tmp_path / "sums").exists()


def read_prompts(file: Path, *flags: str) -> list[tuple[str, str]]:
    assert make_sums(["--prompts", *flags, "--output", str(file)]) == 0
    return [(record["prompt"], record["answer"]) for record in map(json.loads, file.read_text().splitlines())]


def test_prompts_and_questions_that_are_held_out_share_none(tmp_path: Path) -> None:
    """Every question is in one of the two; no conversation has one that is held out, and its answer is the sum."""
    held_out = read_prompts(tmp_path / "held.jsonl", "--held-out", "--number", "160")
    assert len(set(held_out)) == len(held_out) == 160  # of the 800 questions
    assert len(read_prompts(tmp_path / "all.jsonl", "--held-out", "--number", "999")) == 160
    shown = read_prompts(tmp_path / "prompts.jsonl", "--number", "9000", "--seed", "2")
    assert len(shown) == 9000 and len(set(shown)) == 640 and not set(shown) & set(held_out)
    assert all(sum(map(int, re.findall(r"\d", question))) == int(answer) for question, answer in [*shown, *held_out])
    assert make_sums(["--number", "9000", "--output", str(tmp_path / "sums.jsonl")]) == 0
    asked = {read_conversation(line).messages[0]["content"] for line in
             (tmp_path / "sums.jsonl").read_text().splitlines()}
    assert len(asked) == 640 and not asked & {question for question, _ in held_out}


def test_what_is_done_is_not_done_again_and_a_stopped_run_ends_the_script(tmp_path: Path) -> None:
    """With a Python that writes down what it is asked, and is stopped in the fine-tuning once."""
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(f"""#!/usr/bin/env bash
set -u
case "$*" in *setup*|-c*) exit 0 ;; esac
echo "$*" | grep -o 'make_sums.py\\|dsv3_megatron [a-z]*\\|^- ' >>{said}
case "$*" in *' sft '*) [ -e {tmp_path}/stopped ] || {{ touch {tmp_path}/stopped; exit "$DSV3_STOPPED_CODE"; }} ;; esac
""")
    python.chmod(0o755)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "run/tokenizer").mkdir()
    (tmp_path / "run/tokenizer/tokenizer.json").write_text("{}")
    environment = {**os.environ, "RUN_DIR": str(tmp_path / "run"), "PYTHON": str(python)}
    codes = [subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, timeout=60).returncode
             for _ in range(3)]
    assert codes == [130, 0, 0]
    made = ["make_sums.py"] * 3
    assert said.read_text().splitlines() == [*made, "dsv3_megatron preprocess", "dsv3_megatron sft",
                                             "dsv3_megatron sft", "dsv3_megatron grpo", "- ", "- "]
