"""examples/setup_environment.sh on made-up Pythons: what it accepts, what it says, what it skips and repairs.

Each test runs the script in a small copy of the repository, with a search path of its own. The made-up Pythons are
shell scripts that write down how they were called, so nothing is installed and a test takes a fraction of a second.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "setup_environment.sh"

FAKE_PYTHON = """#!/bin/bash
echo "$0 $*" | head -n 1 >>"{calls}"
case "$*" in
    *"import ensurepip"*) echo "{version} {minor} {is_new_enough} {has_venv} $0" ;;
    *"-m venv "*) target="${{@: -1}}"; mkdir -p "$target/bin"; cp "$0" "$target/bin/python" ;;
    *"-m pip install"*) echo "pip says this"; {pip} ;;
    *platform.python_version*) echo "{version}" ;;
    *tomllib*) {check} ;;
esac
"""


class Sandbox:
    """A copy of what the script reads, with an empty search path."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repository"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        self.bin.mkdir()
        (self.repository / "examples").mkdir(parents=True)
        shutil.copy(SCRIPT, self.repository / "examples")
        for name in ("pyproject.toml", "constraints.txt", "setup.py"):
            shutil.copy(REPOSITORY / name, self.repository)
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "DSV3_PYTHON_SEARCH_PATH": str(self.bin)}

    def add_python(self, path: str | Path, version: str = "3.12.9", *, is_new_enough: int = 1, has_venv: int = 1,
                   pip: str = "true", check: str = "true") -> Path:
        """A made-up Python; `pip` and `check` are what `pip install` and the check of its packages do."""
        file = self.bin / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(FAKE_PYTHON.format(calls=self.calls, version=version, minor=version.split(".")[1], pip=pip,
                                           check=check, is_new_enough=is_new_enough, has_venv=has_venv))
        file.chmod(0o755)
        return file

    def add_shim(self, name: str) -> None:
        """A pyenv shim of a version that is not selected."""
        file = self.bin / name
        file.write_text(f'#!/bin/bash\necho "pyenv: {name}: command not found" >&2\nexit 127\n')
        file.chmod(0o755)

    def command(self, *arguments: str) -> list[str]:
        return ["bash", str(self.repository / "examples" / SCRIPT.name), *arguments]

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), env=self.environment | variables, capture_output=True,
                              text=True, stdin=subprocess.DEVNULL, timeout=60)

    def num_installs(self) -> int:
        return self.calls.read_text().count("-m pip install") if self.calls.exists() else 0

    @property
    def venv_python(self) -> str:
        return str(self.repository / ".venv" / "bin" / "python")


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_shell_scripts_parse() -> None:
    scripts = [*REPOSITORY.glob("examples/**/*.sh"), *REPOSITORY.glob("examples/**/*.sbatch"),
               *REPOSITORY.glob(".ci/*")]
    assert SCRIPT in scripts
    for script in scripts:
        result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert result.returncode == 0, f"{script}: {result.stderr}"


def test_no_python_is_one_message_and_exit_code_2(sandbox: Sandbox) -> None:
    result = sandbox.run("--venv")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "No Python >= 3.12 was found, which Megatron-Core needs" in result.stderr
    assert "PYTHON=/path/to/python3.12" in result.stderr
    assert not Path(sandbox.venv_python).exists()


def test_every_rejected_candidate_is_named_with_its_reason(sandbox: Sandbox) -> None:
    sandbox.add_shim("python3.13")
    sandbox.add_python("python3.12", has_venv=0)
    sandbox.add_python("python3", "3.11.7", is_new_enough=0)
    result = sandbox.run("--venv")
    assert result.returncode == 2
    assert f"{sandbox.bin}/python3.13: does not run" in result.stderr
    assert "3.12.9 without venv and ensurepip; Debian and Ubuntu: apt install python3.12-venv" in result.stderr
    assert f"{sandbox.bin}/python3: 3.11.7, not a 64-bit CPython >= 3.12" in result.stderr


def test_a_shim_that_fails_is_passed_over_for_the_newest_pyenv_version(sandbox: Sandbox) -> None:
    sandbox.add_shim("python3.12")
    root = sandbox.bin.parent / ".pyenv" / "versions"
    for version, is_new_enough in (("3.9.18", 0), ("3.12.1", 1), ("3.12.10", 1)):
        sandbox.add_python(root / version / "bin" / "python", version, is_new_enough=is_new_enough)
    result = sandbox.run("--venv")
    assert result.returncode == 0, result.stderr
    assert f"[1/5] Python 3.12.10 ({root}/3.12.10/bin/python)" in result.stderr


def test_an_untested_newer_python_comes_last(sandbox: Sandbox) -> None:
    sandbox.add_python("python3", "3.15.0")
    assert "[1/5] Python 3.15.0" in sandbox.run("--venv").stderr
    shutil.rmtree(sandbox.repository / ".venv")
    sandbox.add_python(sandbox.bin.parent / ".pyenv" / "versions" / "3.13.0" / "bin" / "python", "3.13.0")
    assert "[1/5] Python 3.13.0" in sandbox.run("--venv").stderr


def test_a_finished_environment_is_skipped_at_once(sandbox: Sandbox) -> None:
    sandbox.add_python("python3.12")
    first = sandbox.run("--venv")
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == sandbox.venv_python
    assert re.findall(r"^\[(\d)/5\] .*?(?: \d+ s)?$", first.stderr, re.M) == list("12345")
    installs = sandbox.num_installs()
    start = time.perf_counter()
    second = sandbox.run("--venv")
    assert time.perf_counter() - start < 1
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert sandbox.num_installs() == installs


@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml", "setup.py"])
def test_a_changed_input_installs_again(sandbox: Sandbox, changed: str) -> None:
    sandbox.add_python("python3.12")
    sandbox.run("--venv")
    installs = sandbox.num_installs()
    with open(sandbox.repository / changed, "a") as file:
        file.write("\n")
    assert sandbox.run("--venv").returncode == 0
    assert sandbox.num_installs() == 2 * installs


def test_another_python_makes_the_environment_anew(sandbox: Sandbox) -> None:
    sandbox.add_python("python3.12")
    sandbox.run("--venv")
    other = sandbox.add_python("other", "3.13.1")
    result = sandbox.run("--venv", PYTHON=str(other))
    assert "[1/5] Python 3.13.1" in result.stderr
    assert "3.13.1" in Path(sandbox.venv_python).read_text()


def test_a_failed_installation_shows_the_log_and_is_not_trusted(sandbox: Sandbox) -> None:
    sandbox.add_python("python3.12", pip='echo "OSError: [Errno 28] No space left on device"; exit 1')
    result = sandbox.run("--venv")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "    pip says this" in result.stderr
    assert "The disk is full: the environment needs about 8 GB" in result.stderr
    shutil.rmtree(sandbox.repository / ".venv")
    sandbox.add_python("python3.12")
    assert "[5/5]" in sandbox.run("--venv").stderr


def is_gone(pid: int) -> bool:
    """Whether a process ends within a few seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_installation_ends_and_is_not_trusted(sandbox: Sandbox, number: signal.Signals) -> None:
    sandbox.add_python("python3.12", pip=f"echo $$ >{sandbox.bin}/pid; sleep 60; true")
    process = subprocess.Popen(sandbox.command("--venv"), env=sandbox.environment, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    pid_file = sandbox.bin / "pid"
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "set-up interrupted; run it again" in stderr
    assert not (sandbox.repository / ".venv" / ".dsv3_ready").exists()
    assert is_gone(int(pid_file.read_text())), "the installer was left running"


def test_a_linked_environment_is_left_alone(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.add_python("python3.12")
    assert sandbox.run("--venv").returncode == 0
    other = tmp_path / "other"
    shutil.copytree(sandbox.repository, other, ignore=shutil.ignore_patterns(".venv"))
    (other / ".venv").symlink_to(sandbox.repository / ".venv")
    with open(other / "constraints.txt", "a") as file:
        file.write("torch==1.0\n")
    before = {path: path.read_bytes() for path in (sandbox.repository / ".venv").rglob("*") if path.is_file()}
    installs = sandbox.num_installs()
    theirs = Sandbox.__new__(Sandbox)
    theirs.__dict__ = {**sandbox.__dict__, "repository": other}
    result = theirs.run("--venv")
    assert result.returncode == 2 and result.stdout == ""
    assert f"{other}/.venv is a link to {sandbox.repository}/.venv, which the set-up of {sandbox.repository} made" in (
        result.stderr)
    assert f"PYTHON={sandbox.repository}/.venv/bin/python" in result.stderr and f"rm {other}/.venv" in result.stderr
    assert sandbox.num_installs() == installs
    assert before == {path: path.read_bytes() for path in (sandbox.repository / ".venv").rglob("*") if path.is_file()}
    assert sandbox.run("--venv").stderr == ""


@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_link_to_anything_else_is_left_alone(is_dangling: bool, sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.add_python("python3.12")
    if not is_dangling:
        (tmp_path / "elsewhere").mkdir()
    (sandbox.repository / ".venv").symlink_to(tmp_path / "elsewhere")
    result = sandbox.run("--venv")
    assert result.returncode == 2
    assert f"{sandbox.repository}/.venv is a link to {tmp_path}/elsewhere: it is not changed" in result.stderr
    assert sandbox.num_installs() == 0 and (sandbox.repository / ".venv").is_symlink()


def test_an_environment_that_another_checkout_made_is_left_alone(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.add_python("python3.12")
    sandbox.run("--venv")
    other = tmp_path / "other"
    shutil.copytree(sandbox.repository, other)
    installs = sandbox.num_installs()
    theirs = Sandbox.__new__(Sandbox)
    theirs.__dict__ = {**sandbox.__dict__, "repository": other}
    result = theirs.run("--venv")
    assert result.returncode == 2
    assert f"was made by the set-up of another checkout, {sandbox.repository}: it is not changed" in result.stderr
    assert sandbox.num_installs() == installs
    shutil.rmtree(sandbox.repository)  # as if the checkout had been moved
    assert theirs.run("--venv").returncode == 0
    assert sandbox.num_installs() > installs


def test_a_checkout_reached_through_a_link_is_set_up(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.add_python("python3.12")
    sandbox.run("--venv")
    installs = sandbox.num_installs()
    (tmp_path / "link").symlink_to(sandbox.repository)
    linked = Sandbox.__new__(Sandbox)
    linked.__dict__ = {**sandbox.__dict__, "repository": tmp_path / "link"}
    for variables in ({}, {"PYTHON": sandbox.venv_python}, {"VIRTUAL_ENV": str(sandbox.repository / ".venv")}):
        result = linked.run("--venv", **variables)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.strip() == f"{tmp_path}/link/.venv/bin/python"
    assert sandbox.num_installs() == installs


@pytest.mark.parametrize("variable", ["PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_that_satisfies_is_used_as_it_is(sandbox: Sandbox, variable: str) -> None:
    python = sandbox.add_python("active/bin/python", check='echo "Python 3.12.9, torch 2.15.0, megatron-core 0.19.2"')
    result = sandbox.run(**{variable: str(python if variable == "PYTHON" else python.parent.parent)})
    assert result.returncode == 0
    assert result.stdout.strip() == str(python)
    assert "torch 2.15.0, megatron-core 0.19.2), used as it is" in result.stderr
    assert sandbox.num_installs() == 0


def test_an_active_environment_that_does_not_satisfy_is_left_alone(sandbox: Sandbox) -> None:
    sandbox.add_python("python3.12")
    active = sandbox.add_python("active/bin/python", check='echo "it lacks psutil>=6.0 (not installed)"; exit 1')
    result = sandbox.run(VIRTUAL_ENV=str(active.parent.parent))
    assert result.returncode == 0
    assert result.stdout.strip() == sandbox.venv_python
    assert f"{active} is not used: it lacks psutil>=6.0 (not installed); .venv is" in result.stderr
    assert f"{active} -I -m pip install" not in sandbox.calls.read_text()


def test_find_installs_nothing(sandbox: Sandbox) -> None:
    python = sandbox.add_python("python3.12")
    assert sandbox.run("--find").stdout.strip() == str(python)
    assert sandbox.num_installs() == 0


def test_an_unknown_option_is_exit_code_2(sandbox: Sandbox) -> None:
    result = sandbox.run("--frech")
    assert result.returncode == 2
    assert "--frech is not an option" in result.stderr


def embedded_source(name: str) -> str:
    """A Python program that the script holds in a shell variable."""
    found = re.search(rf"^{name}='\n(.*?)^'$", SCRIPT.read_text(), re.M | re.S)
    assert found is not None
    return found.group(1)


def test_the_check_names_what_is_missing_and_what_is_too_old(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\ndependencies = ["pytest>=1.0", "pytest>=99", "no-such-package-of-ours>=1"]\n')
    result = subprocess.run([sys.executable, "-c", embedded_source("check_source"), str(pyproject), ""],
                            capture_output=True, text=True)
    assert result.returncode == 1
    assert re.fullmatch(r"it lacks pytest>=99 \(is [\d.]+\), no-such-package-of-ours>=1 \(not installed\)\n",
                        result.stderr)


def test_the_check_accepts_the_environment_the_tests_run_in() -> None:
    command = [sys.executable, "-c", embedded_source("check_source"), str(REPOSITORY / "pyproject.toml"), ""]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.match(r"Python 3\.\d+\.\d+, torch [^,]+, megatron-core \S+\n", result.stdout)


def test_repair_drops_packages_with_missing_or_truncated_files(tmp_path: Path) -> None:
    for name in ("whole", "missing", "truncated", "unrecorded"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: x\n")
        (tmp_path / f"{name}.py").write_text("x = 1\n")
        (info / "RECORD").write_text(f"{name}.py,sha256=,6\n{name}-1.0.dist-info/RECORD,,\n")
    (tmp_path / "missing.py").unlink()
    (tmp_path / "truncated.py").write_text("x\n")
    (tmp_path / "unrecorded-1.0.dist-info" / "RECORD").unlink()
    (tmp_path / "~eftover").mkdir()
    program = f"import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r}\n"
    program += embedded_source("repair_source")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert sorted(re.findall(r"again: (\w+)-1\.0", result.stdout)) == ["missing", "truncated", "unrecorded"]
    assert [path.name for path in tmp_path.glob("*.dist-info")] == ["whole-1.0.dist-info"]
    assert not list(tmp_path.glob("~*"))
