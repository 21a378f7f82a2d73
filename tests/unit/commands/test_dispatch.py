"""`dsv3`: its table is that of the room, it answers without torch, and each way to a command leads to the same code."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.commands.dispatch import COMMANDS, main, usage

ROOT = Path(__file__).resolve().parents[3]
NAMES = [command.name for command in COMMANDS]


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, cwd=ROOT, **options)


def test_the_table_has_every_module_of_the_room() -> None:
    modules = {path.stem.replace("_", "-") for path in (ROOT / "dsv3_megatron/commands").glob("*.py")}
    assert set(NAMES) == modules - {"--init--", "dispatch"}
    assert [line.split()[0] for line in re.findall(r"^  (\S+ .+)$", usage(), re.MULTILINE)] == NAMES


def test_help_answers_within_half_a_second_without_torch() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = run("-X", "importtime", "-m", "dsv3_megatron", "--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and "usage: dsv3 COMMAND" in done.stdout
        assert not re.search(r"\| +(torch|numpy|megatron)\b", done.stderr)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_help_and_refuses_a_wrong_flag(name: str) -> None:
    done = run("-m", "dsv3_megatron", name, "--help")
    assert done.returncode == 0 and "usage: " in done.stdout and not done.stderr, done.stderr
    if name != "train":
        assert f"usage: dsv3 {name}" in done.stdout
    done = run("-m", "dsv3_megatron", name, "--no-such-flag")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout, done.stderr


def test_a_script_of_tools_is_the_command() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["--schedule", "1f1b", "--pipeline-model-parallel-size", "4", "--num-microbatches", "8"]
    by_script = run("tools/simulate_pipeline.py", *words, env=env)
    assert by_script.returncode == 0 and by_script.stdout
    assert by_script.stdout == run("-m", "dsv3_megatron", "simulate", *words, env=env).stdout


def test_every_script_of_a_command_names_it() -> None:
    named = {match[1] for path in (ROOT / "tools").glob("*.py")
             if (match := re.search(r'run_named\("(.+)"\)', path.read_text()))}
    assert named == set(NAMES) - {"train"}  # whose script is examples/pretrain_dsv3.sh


def test_no_file_patches_the_path_of_imports() -> None:
    found = [path.relative_to(ROOT) for top in ("dsv3_megatron", "tools", "kernels", "examples")
             for path in (ROOT / top).rglob("*.py") if re.search(r"sys\.path\b(?! is)", path.read_text())]
    assert not found


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "dsv3 has no command 'trian'; there are train, sft, grpo, sweep, preprocess" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage: dsv3 COMMAND" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert re.fullmatch(r"dsv3_megatron \d+\..*\n", capsys.readouterr().out)


def test_every_script_can_be_run_as_a_program() -> None:
    scripts = [path for path in (ROOT / "tools").glob("*.py") if path.read_text().startswith("#!")]
    assert len(scripts) == len(NAMES) - 1
    assert [path.name for path in scripts if not os.access(path, os.X_OK)] == []
