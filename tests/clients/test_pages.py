"""How a page is followed, on planted pages; and that the pages tell a user to install what the tests have."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import environments
from tests.clients.environments import CLIENTS, ROOT, STAMP, Client, main, python_of
from tests.clients.pages import Reader, blocks, page_text, requirements

PLANTED = """# A program

```
pip install "program[cpu]==1.2" torch
pip uninstall -y vision
```

```bash
WORD=kept
echo $WORD \\
    > word.txt
```

```python
import sys
print(open("word.txt").read().strip(), sys.prefix)
```

```python
print(len(sys.argv))
```

```text
pip install output
```
"""
# This library's own environment, in the place of a client's.
HERE = Client("", "A program 1.2", "program.md", ("program[cpu]==1.2", "torch"))


def test_a_planted_page_is_followed(tmp_path: Path) -> None:
    """What installs and what is output is not run; blocks share a folder, and Python is the client's."""
    with Reader(HERE, tmp_path) as reader:
        printed = reader.follow(PLANTED)
    assert printed == ["", f"kept {sys.prefix}\n1\n"]
    assert requirements(PLANTED) == [list(HERE.requires)] and requirements(PLANTED, "pip uninstall") == [["vision"]]


@pytest.mark.parametrize(("block", "said"), [
    ("```\nfalse | true\necho 1\n```\n", "exit code 1"),
    ("```\necho $UNKNOWN\n```\n", "UNKNOWN: unbound variable"),
    ("```python\nraise SystemExit('the last line')\n```\n", "the last line"),
    ("```\npip install torch\nexit 3\n```\n", "exit code 3"),
])
def test_a_block_that_fails_is_said(tmp_path: Path, block: str, said: str) -> None:
    with Reader(HERE, tmp_path) as reader, pytest.raises(AssertionError, match=said):
        reader.follow(block.replace("pip install", "true"))


def test_what_does_not_end_is_ended(tmp_path: Path) -> None:
    """A block that takes too long, and what a block left in the background."""
    with Reader(HERE, tmp_path, timeout_s=1) as reader, pytest.raises(AssertionError, match="no end within 1 s"):
        reader.follow("```\nsleep 60\n```\n")
    with Reader(HERE, tmp_path) as reader:
        reader.follow("```\nsleep 600 & echo $! > pid\n```\n")
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, 0)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("it runs on")


def test_dsv3_is_this_checkout_s(tmp_path: Path) -> None:
    with Reader(HERE, tmp_path) as reader:
        (printed,) = reader.follow("```\ncat $(command -v dsv3)\n```\n")
    assert f"PYTHONPATH={ROOT}" in printed and sys.executable in printed


def test_an_environment_is_there_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was left half-made, or was made for other versions, is none; the reason names the command."""
    monkeypatch.setattr("tests.clients.environments.FOLDER", tmp_path)
    client = Client("program", "A program 1.2", "program.md", ("program==1.2",))
    assert not client.is_there()
    assert "python -m tests.clients.environments program" in client.mark.kwargs["reason"]
    (tmp_path / "program").mkdir()
    assert not client.is_there() and client.mark.args == (True,)
    (tmp_path / "program" / STAMP).write_text(client.installed)
    assert client.is_there() and client.mark.args == (False,)
    assert not Client("program", "A program 1.3", "program.md", ("program==1.3",)).is_there()


@pytest.fixture
def pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on PATH, and nothing else where a Python is looked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    python_of.cache_clear()
    yield folder
    python_of.cache_clear()


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_a_python_of_a_version_is_found(pythons: Path, tmp_path: Path) -> None:
    """What does not run, is of another version or cannot make environments is passed over; "" is this Python."""
    script(pythons / "python3.99", "echo 'version 3.99 is not selected' >&2; exit 127")
    script(tmp_path / "pyenv/versions/3.99.0/bin/python", "echo 3.98")
    right = script(tmp_path / "pyenv/versions/3.99.1/bin/python", "echo 3.99")
    assert python_of("3.99") == str(right) and python_of("") == sys.executable
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    real = script(pythons / f"python{own}", f'exec {sys.executable} "$@"')
    assert python_of(own) == str(real), "the probe runs in a real Python"


def test_where_a_python_is_missing_it_is_said(pythons: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The test's reason says so; all other environments are made; one that is named ends with the error."""
    shim = script(pythons / "python3.99", "echo 'version 3.99 is not selected' >&2; exit 127")
    clients = {name: Client(name, "A program 1.2", "program.md", (f"{name}==1.2",), python=version)
               for name, version in (("old", "3.99"), ("new", ""))}
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "CLIENTS", clients)
    assert (f"no Python 3.99 with venv and ensurepip on PATH or in pyenv's versions; install it (looked at {shim}: "
            "version 3.99 is not selected)") in clients["old"].mark.kwargs["reason"]
    make, made = environments.make, []
    monkeypatch.setattr(environments, "make", lambda client: made.append(client) if not client.python else make(client))
    (tmp_path / "old").mkdir()
    main([])
    assert made == [clients["new"]]
    assert "old: left out, its tests will be skipped: no Python 3.99" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="old: no Python 3.99"):
        main(["old"])
    assert (tmp_path / "old").is_dir(), "what was there is not touched"


@pytest.mark.parametrize("name", CLIENTS)
def test_a_page_installs_what_is_tested(name: str) -> None:
    """Requirement for requirement; and the version is the one that the table of readers names, or of its series."""
    client = CLIENTS[name]
    assert list(client.requires) in requirements(page_text(client))
    assert requirements(page_text(client), "pip uninstall") == [list(client.removes)] * bool(client.removes)
    assert blocks(page_text(client)) or client.parts
    if version := re.search(r" ([\d.]+)$", client.reader):
        assert any(re.search(rf"=={re.escape(version[1])}(\.\d+)?$", requirement) for requirement in client.requires)
    if not client.name:
        assert client.requires[0] in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
