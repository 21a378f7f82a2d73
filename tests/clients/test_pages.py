"""How a page is followed, on planted pages; and that the pages tell a user to install what the tests have."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.clients.environments import CLIENTS, ROOT, STAMP, Client
from tests.clients.pages import Reader, blocks, page_text, requirements

PLANTED = """# A program

```
pip install "program[cpu]==1.2" torch
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
    assert requirements(PLANTED) == [list(HERE.requires)]


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


@pytest.mark.parametrize("name", CLIENTS)
def test_a_page_installs_what_is_tested(name: str) -> None:
    """Requirement for requirement; and the version is the one that the table of readers names, or of its series."""
    client = CLIENTS[name]
    assert list(client.requires) in requirements(page_text(client))
    assert blocks(page_text(client))
    if version := re.search(r" ([\d.]+)$", client.reader):
        assert any(re.search(rf"=={re.escape(version[1])}(\.\d+)?$", requirement) for requirement in client.requires)
    if not client.name:
        assert client.requires[0] in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
