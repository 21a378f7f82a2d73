"""`dsv3 completion`: what a shell offers is what the parsers take."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.commands.completion import SHELLS, flags_of_command
from dsv3_megatron.commands.dispatch import COMMANDS, main

ROOT = Path(__file__).resolve().parents[3]
NAMES = [command.name for command in COMMANDS]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    found = {}
    for shell in SHELLS:
        done = subprocess.run([sys.executable, "-m", "dsv3_megatron", "completion", shell], capture_output=True,
                              text=True, cwd=ROOT, timeout=60, check=True)
        assert not done.stderr
        found[shell] = folder / f"dsv3.{shell}"
        found[shell].write_text(done.stdout)
    return found


def test_it_is_made_without_torch_and_fast() -> None:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "dsv3_megatron", "completion", "bash"],
                          capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert time.perf_counter() - start < 10
    assert not re.search(r"\| +(torch|megatron|transformers|matplotlib)\b", done.stderr)


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_of_a_commands_help_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse's own help is the second source."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = set(re.findall(r"^  +(?:-h, )?(--[a-z0-9][\w-]*)", capsys.readouterr().out, re.MULTILINE))
    flags = {spelling for flag in flags_of_command(name)[name] for spelling in flag.names}
    assert shown and shown <= flags, shown - flags
    if name in ("plan", "rehearse", "certify"):
        assert {"--num-layers", "--preset", "--pipeline-model-parallel-size"} <= flags, "a run's flags are theirs too"
        assert len([flag for flag in flags_of_command(name)[name] if "--world-size" in flag.names]) <= 1


def bash(script: Path, *words: str) -> list[str]:
    """What bash would offer for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(["bash", "--norc", "-c", f". {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
                           "_dsv3; printf '%s\\n' \"${COMPREPLY[@]}\""], capture_output=True, text=True, timeout=20,
                          check=True)
    assert not done.stderr, done.stderr
    return [word for word in done.stdout.split("\n") if word]


def test_bash_offers_commands_flags_and_values(scripts: dict[str, Path]) -> None:
    script = scripts["bash"]
    assert bash(script, "dsv3", "") == NAMES
    assert bash(script, "dsv3", "re") == [name for name in NAMES if name.startswith("re")]
    assert bash(script, "dsv3", "train", "--preset", "t") == ["tiny"]
    assert bash(script, "dsv3", "train", "--exp-avg-d") == ["--exp-avg-dtype"]
    assert bash(script, "dsv3", "train", "--lr", "1e-3", "--exp-avg-dtype", "") == ["fp32", "bf16"]
    assert set(bash(script, "dsv3", "train", "--no-async")) == {"--no-async-save"}
    assert bash(script, "dsv3", "sft", "--epo") == ["--epochs"]
    assert bash(script, "dsv3", "train", "--epo") == []
    assert bash(script, "dsv3", "convert", "") == ["hf-to-megatron", "megatron-to-hf", "verify", "inventory"]
    assert bash(script, "dsv3", "convert", "megatron-to-hf", "--dtype", "f") == ["fp8", "fp32"]
    assert bash(script, "dsv3", "convert", "inventory", "--lic") == []
    assert bash(script, "dsv3", "plot", "runs/") == [], "bash then completes names of files"
    assert bash(script, "dsv3", "no-such-command", "--") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_takes_the_script(shell: str, scripts: dict[str, Path]) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([program, "-n", str(scripts[shell])], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_fish_offers_commands_flags_and_values(scripts: dict[str, Path]) -> None:
    program = shutil.which("fish")
    if program is None:
        pytest.skip("fish is not installed")

    def offered(line: str) -> set[str]:
        done = subprocess.run([program, "--no-config", "-c", f"source {scripts['fish']}; complete -C '{line}'"],
                              capture_output=True, text=True, timeout=20, check=True)
        return {row.split("\t")[0] for row in done.stdout.splitlines()}

    assert offered("dsv3 ") == set(NAMES)
    assert offered("dsv3 train --exp-avg-dtype ") == {"fp32", "bf16"}
    assert offered("dsv3 convert megatron-to-hf --dtype f") == {"fp8", "fp32"}
    assert offered("dsv3 sft --epo") == {"--epochs"} and not offered("dsv3 train --epo")


def test_quotes_and_brackets_of_help_do_not_end_a_word(scripts: dict[str, Path]) -> None:
    """Every line of fish's script has its quotes closed, and every specification of zsh's its brackets."""
    for line in scripts["fish"].read_text().splitlines():
        assert len(re.findall(r"(?<!\\)'", line)) % 2 == 0, line
    specs = re.findall(r"^            '(--.*)'$", scripts["zsh"].read_text(), re.MULTILINE)
    assert len(specs) > 1000 and all(re.fullmatch(r"--[\w-]+\[[^\[\]]*\](:.*)?", spec) for spec in specs)
