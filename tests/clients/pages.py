"""Follows a page of docs/export/ as its reader would: its blocks in order, word for word, in one folder.

A block of commands is run by bash, a block of Python by the client's Python; blocks of Python that follow each other
are one session. Blocks of another language are output. Commands that install something are not run: `make clients` has
installed it.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from tests.clients.environments import ROOT, Client
from tools.run_documented_commands import COMMAND_FENCES, Fence, fences

INSTALLS = re.compile(r"(pip (?:un)?install|python3? -m venv|git clone|source) ")


def page_text(client: Client) -> str:
    """The page that tells a user how to run a client."""
    return (ROOT / "docs" / "export" / client.page).read_text(encoding="utf-8")


def is_installing(fence: Fence) -> bool:
    """Whether a block only installs."""
    return fence.language in COMMAND_FENCES and all(INSTALLS.match(line) for line in fence.text.splitlines() if line)


def blocks(page: str) -> list[Fence]:
    """The blocks of a page that are run, in order; those of one session of Python as one."""
    found: list[Fence] = []
    for fence in fences(page):
        if fence.language not in (*COMMAND_FENCES, "python") or is_installing(fence):
            continue
        if found and found[-1].language == fence.language == "python":
            found[-1] = Fence("python", f"{found[-1].text}\n{fence.text}")
        else:
            found.append(fence)
    return found


def scoring_block(page: str) -> str:
    """The Python of a page up to the block that writes `logprobs.npy`."""
    texts = [fence.text for fence in fences(page) if fence.language == "python"]
    (last,) = (index for index, text in enumerate(texts) if '"logprobs.npy"' in text)
    return "\n".join(texts[:last + 1])


def requirements(page: str, command: str = "pip install") -> list[list[str]]:
    """What each `pip install`, or another command of pip, of a page names."""
    lines = [line for fence in fences(page) if is_installing(fence) for line in fence.text.splitlines()]
    return [[word for word in shlex.split(line)[2:] if not word.startswith("-")]
            for line in lines if line.startswith(command)]


class Reader:
    """Somebody who follows a page in a folder. What runs on in the background is ended when the reader leaves.

    `dsv3` is this checkout's; `python` and all other commands are those of the client's environment first.
    """

    def __init__(self, client: Client, folder: Path, *, timeout_s: float = 900) -> None:
        self.client, self.folder, self.timeout_s = client, folder, timeout_s
        self.groups: list[int] = []
        programs = folder / ".programs"
        programs.mkdir(exist_ok=True)
        dsv3 = programs / "dsv3"
        dsv3.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} '
                        '-m dsv3_megatron "$@"\n')
        dsv3.chmod(0o755)
        if client.checkout:
            checkout = client.folder / "sources" / client.checkout
            (folder / checkout.name).symlink_to(checkout)
        # A llama.cpp that ends itself would first have gdb tell for minutes where it was.
        self.environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                            "CUDA_VISIBLE_DEVICES": "",
                            "PATH": os.pathsep.join([str(programs), str(client.programs), os.environ["PATH"]])}
        self.environment.pop("PYTHONPATH", None)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for group in self.groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue  # all of it has ended

    def run(self, block: Fence) -> str:
        """Run a block; return what it printed to stdout.

        Raises:
            AssertionError: it ended with an error, whose last lines are in the message, or did not end in time.
        """
        start = [str(self.client.programs / "python")] if block.language == "python" else ["bash", "-euo", "pipefail"]
        printed, said = self.folder / ".stdout", self.folder / ".stderr"
        with printed.open("w") as stdout, said.open("w") as stderr:
            process = subprocess.Popen([*start, "-c", block.text], cwd=self.folder, env=self.environment,
                                       stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True)
            self.groups.append(process.pid)
            try:
                process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"no end within {self.timeout_s:.0f} s:\n{block.text}") from None
        last = "\n".join((printed.read_text() + said.read_text(errors="replace")).splitlines()[-15:])
        assert process.returncode == 0, f"exit code {process.returncode} of\n{block.text}\n{last}"
        return printed.read_text()

    def follow(self, page: str) -> list[str]:
        """Run the blocks of a page in order; return what each printed."""
        return [self.run(block) for block in blocks(page)]
