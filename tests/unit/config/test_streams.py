"""Commands whose reader has gone, whose disk is full, whose encoding lacks a character."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.config.streams import message, quoted

ROOT = Path(__file__).resolve().parents[3]


def test_every_command_ends_by_run_command() -> None:
    files = [*(ROOT / "dsv3_megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    mains = {path.name: path.read_text().partition('if __name__ == "__main__":')[2].strip() for path in files
             if 'if __name__ == "__main__":' in path.read_text()}
    assert {"__main__.py", "plan_run.py", "evaluate.py", "generate.py", "plot_run.py"} <= set(mains)
    through_dispatch = {name for name, text in mains.items() if text.startswith(("run_named(", "run()"))}
    assert {name for name, text in mains.items() if not text.startswith("run_command(")} - through_dispatch == {
        "calibrate.py", "forked_ranks.py", "file_copier.py",
            "local_torchrun.py"}  # helper processes, which nobody types
    dispatch = ast.parse((ROOT / "dsv3_megatron/commands/dispatch.py").read_text(encoding="utf-8"))
    ends = {node.name: ast.unparse(node.body[-1]) for node in dispatch.body if isinstance(node, ast.FunctionDef)}
    assert all(ends[name].startswith("run_command(") for name in ("run", "run_named"))


SCRIPT = """
import sys
from dsv3_megatron.config.streams import run_command
def main():
    try:
        for number in range(int(sys.argv[1])):
            print("line", number, "\\u00e9\\U0001f600\\udc80")
    except (OSError, ValueError) as error:  # as tools have it
        print("error:", error, file=sys.stderr)
        return 2
    except Exception as error:
        print("lost peer:", error, file=sys.stderr)
        return 1
    print("remark", file=sys.stderr)
    return 3
run_command(main)
"""


def run(arguments: list[str], stdout: int, stderr: int = subprocess.PIPE, **environment: str
        ) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *arguments], stdout=stdout, stderr=stderr, timeout=120, check=False,
                          cwd=ROOT, env={**os.environ, **environment})


def closed_pipe() -> int:
    """A pipe whose reader has gone, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(num_lines: int) -> None:
    done = run(["-c", SCRIPT, str(num_lines)], closed_pipe())
    assert (done.returncode, done.stderr.replace(b"remark\n", b"")) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_full_disk_is_told_once(num_lines: int) -> None:
    with open("/dev/full", "wb") as full:
        done = run(["-c", SCRIPT, str(num_lines)], full.fileno())
        assert done.returncode == 2
        assert done.stderr.replace(b"remark\n", b"") == (
            b"error: standard output cannot be written: No space left on device; give it another place\n")
        done = run(["-c", SCRIPT, str(num_lines)], subprocess.PIPE, full.fileno())  # remarks that cannot be written
        assert done.returncode == 3 and done.stdout.count(b"\n") == num_lines


@pytest.mark.parametrize(("environment", "line"), [
    ({"PYTHONIOENCODING": "utf-8"}, b"line 0 \xc3\xa9\xf0\x9f\x98\x80\\udc80\n"),
    ({"PYTHONIOENCODING": "ascii"}, b"line 0 \\u00e9\\ud83d\\ude00\\udc80\n"),
    ({"PYTHONIOENCODING": "latin-1"}, b"line 0 \xe9\\ud83d\\ude00\\udc80\n"),
    ({"LC_ALL": "C"}, b"line 0 \xc3\xa9\xf0\x9f\x98\x80\\udc80\n"),
    ({"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "ascii"}, b"line 0 \\u00e9\\ud83d\\ude00\\udc80\n"),
], ids=str)
def test_what_an_encoding_does_not_have_is_escaped_as_json_does(environment: dict[str, str], line: bytes) -> None:
    assert run(["-c", SCRIPT, "1"], subprocess.PIPE, **environment).stdout == line
    escaped = line.split()[2].decode("latin-1" if b"\xe9" in line else "utf-8")
    assert json.loads(f'"{escaped}"') == "\u00e9\U0001f600\udc80"


@pytest.mark.parametrize("arguments", [
    ["-m", "dsv3_megatron", "train", "--preset", "tiny", "--print-model"], ["-m", "dsv3_megatron", "train", "--help"],
    ["tools/plan_run.py", "--help"], ["tools/evaluate.py", "--help"], ["tools/generate.py", "--help"],
    ["tools/simulate_pipeline.py", "--schedule", "1f1b", "--pipeline-model-parallel-size", "2", "--num-microbatches",
     "4", "--json"],
    ["tools/convert_checkpoint.py", "inventory", "--preset", "tiny", "--list"]], ids=lambda a: " ".join(a[:2]))
def test_commands_end_quietly_when_nobody_reads(arguments: list[str]) -> None:
    done = run(arguments, closed_pipe())
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_lost_reader_is_no_lost_rank() -> None:
    code = ("import sys, time; from dsv3_megatron.config.streams import run_command\n"
            "from dsv3_megatron.runs.rank import run_rank\n"
            "run_command(lambda: run_rank(0, lambda: print('x' * 100_000) or 0))")
    done = run(["-c", code], closed_pipe())
    assert (done.returncode, done.stderr) == (141, b"")


def test_work_that_has_something_to_save_goes_on_without_a_reader() -> None:
    """It is told once; what it writes afterwards is dropped."""
    code = ("import os, sys; from dsv3_megatron.config.streams import reader_gone_calls, run_command\n"
            "def main():\n"
            "    seen = []\n"
            "    with reader_gone_calls(lambda: seen.append(1)):\n"
            "        for number in range(3): print('x' * 100_000, file=sys.stderr, flush=True)\n"
            "    return 40 + len(seen)\n"
            "run_command(main)")
    assert run(["-c", code], subprocess.PIPE, closed_pipe()).returncode == 41


HOSTILE = "a\x1b[2Jb\x07\nerror: forged\r\u2028\u202e\x9b1m\tc"


def test_what_files_hold_is_quoted() -> None:
    assert quoted(HOSTILE) == r"a\x1b[2Jb\x07\nerror: forged\r\u2028\u202e\x9b1m\tc"
    assert message(HOSTILE) == "a\\x1b[2Jb\\x07\n  error: forged\\r\\u2028\\u202e\\x9b1m\tc"
    assert message("one:\n  two\n\nthree é") == "one:\n  two\n\n  three é"


def test_nothing_of_a_file_moves_the_cursor() -> None:
    """On stderr, also in a log; on stdout where nobody but a program reads, the text is as it is."""
    script = (f"import logging, sys\nfrom dsv3_megatron.config.streams import run_command\ntext = {HOSTILE!r}\ndef "
              "main():\n    print(text)\n    print(text, file=sys.stderr)\n    "
              "logging.basicConfig(format='%(message)s')\n    logging.warning('of %s: %d', text, 3)\nrun_command(main)")
    ended = run(["-c", script], subprocess.PIPE, PYTHONIOENCODING="utf-8")
    assert ended.returncode == 0 and ended.stdout.decode().rstrip("\n") == HOSTILE
    printed, _, logged = ended.stderr.decode().rpartition("of ")
    assert printed == "a\\x1b[2Jb\\x07\nerror: forged\r\\u2028\\u202e\\x9b1m\tc\n"
    assert logged == f"{quoted(HOSTILE)}: 3\n"
