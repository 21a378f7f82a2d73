"""`dsv3 certify` as a command: what it refuses, what it prints, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.certification.random_layouts import random_layouts
from dsv3_megatron.commands.certify import EXIT_DIFFERS, main, usual_processes
from tests.distributed.launch import run_command


@pytest.mark.parametrize(("flags", "message"), [
    ("--world-size 0", "--world-size=0 must be at least 1"),
    ("--processes 0", "--processes=0 must be at least 1"),
    ("--random 3 --tensor-model-parallel-size 2", "--random draws the layouts itself; leave out --tensor-model"),
    ("--with context --world-size 2", "--with context chooses among layouts at random; give --random N"),
    ("--random 3 --first 4", "--first=4 begins behind the last of the layouts at random, --random 3"),
    ("--first 2", "--first=2 begins behind the last of the layouts at random; give --random N"),
    ("--random 3 --with context --processes 1", "--with context needs at least 2 processes"),
    ("--random 3 --world-size 2", "leave out --world-size, or --random"),
    ("--preset tiny --world-size 3 --tensor-model-parallel-size 2", "must divide world_size=3"),
    ("--preset tiny --tensor-model-parallel-size 2 --processes 1", "--processes=1 are too few"),
    ("--preset tiny --no-such-flag", "--no-such-flag is not a flag"),
])
def test_what_cannot_be_is_refused_before_any_process_starts(flags: str, message: str,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 2
    assert message in capsys.readouterr().err


def test_processes_follow_memory(tmp_path: Path) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal: 9000000 kB\nMemAvailable: 1500000 kB\n")
    assert usual_processes(memory) == 2
    memory.write_text("MemTotal: 900 kB\nMemAvailable: 900 kB\n")
    assert usual_processes(memory) == 1
    assert usual_processes(tmp_path / "none") >= 8


@pytest.mark.distributed
def test_a_certificate_in_text_and_json() -> None:
    flags = ("--preset tiny --expert-model-parallel-size 2 --world-size 64 --global-batch-size 64 --micro-batch-size 1 "
             "--processes 2").split()
    done = run_command("dsv3_megatron", "certify", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("EQUAL: 2 processes: pp 1 x tp 1, ep 2, etp 1, dp 2\n")
    assert "processes 64 -> 2" in done.stdout and "resumes from its own checkpoint (bit for bit)" in done.stdout
    assert "2 steps of one process against the definition in float64" in done.stdout
    done = run_command("dsv3_megatron", "certify", *"--random 2 --seed 5 --first 2 --processes 2 --json".split())
    found = json.loads(done.stdout)
    (layout,) = found["layouts"]
    assert done.returncode == 0 and layout["is_equal"] and layout["differences"] == []
    assert set(layout["versions"]) == {"dsv3_megatron", "torch", "megatron-core"}
    assert layout["largest_errors"]["gradient"] < layout["tolerances"]["gradient"] * 10
    _, (size, flags_of_second) = random_layouts(2, 5, 2)
    assert layout["command"].startswith(f"dsv3 certify --world-size {size} {flags_of_second[0]}")
    assert all(flag in layout["command"] for flag in flags_of_second)


@pytest.mark.distributed
def test_a_layout_that_fails_is_told_with_its_command() -> None:
    done = run_command("tests.distributed.failing_certificate")
    assert done.returncode == EXIT_DIFFERS
    assert "DIFFERS: 2 processes" in done.stdout and "planted: no memory" in done.stdout
    assert "again: dsv3 certify --world-size 2 --preset tiny --expert-model-parallel-size 2" in done.stdout
