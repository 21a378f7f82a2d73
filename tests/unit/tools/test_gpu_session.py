"""A GPU session: its parts fit its time, one that fails or hangs stops no other, and it can be rehearsed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from tools import gpu_machine, gpu_session
from tools.gpu_session import Part, Step, run_parts

ROOT = Path(__file__).resolve().parents[3]


def python(code: str) -> tuple[str, str]:
    return ("-c", code)


def test_the_parts_fit_and_name_what_is_there():
    parts = gpu_session.parts()
    assert [part.name for part in parts] == ["machine", "modules", "fp8", "attention", "slice", "speed", "rest"]
    assert sum(part.budget_s for part in parts) <= 12 * 60
    for step in (step for part in parts for step in part.steps):
        for word in step.command:
            if word.startswith("tests/"):
                assert (ROOT / word).is_file(), word
            if word.startswith("tools."):
                assert (ROOT / word.replace(".", "/")).with_suffix(".py").is_file(), word


def test_what_fails_or_hangs_stops_no_other(tmp_path, capsys):
    parts = [
        Part("bad", "?", 60, (Step("raises", python("print('5 GB/s'); raise SystemExit(3)")),
                              Step("next", python("print('x::y PASSED'); print('x::z FAILED')")))),
        Part("slow", "?", 1.5, (
            Step("hangs", python("import subprocess, sys; print('begun', flush=True); "
                                 "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")),
            Step("late", python("print('never')")))),
        Part("good", "?", 60, (Step("here", python("print('fine')"), python("print('rehearsed')")),))]
    started = time.monotonic()
    outcomes = run_parts(parts, tmp_path, seconds=100, is_rehearsal=False)
    assert time.monotonic() - started < 30
    assert [(outcome.step, outcome.verdict) for outcome in outcomes] == [
        ("raises", "failed"), ("next", "passed"), ("hangs", "out of time"), ("late", "not run"), ("here", "passed")]
    assert [outcome.summary for outcome in outcomes][:2] == ["5 GB/s", "1 passed, 1 failed"]
    assert outcomes[2].summary.startswith("begun; ended after its ") and outcomes[4].summary == "fine"
    report = (tmp_path / "report.md").read_text()
    assert "| slow | late | not run | 0 | no time was left |" in report and "NCCL refuses two ranks" in report
    assert [entry["verdict"] for entry in json.loads((tmp_path / "report.json").read_text())] == [
        outcome.verdict for outcome in outcomes]
    assert "begun" in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().out.count("\n") == 5
    assert run_parts(parts[2:], tmp_path, seconds=100, is_rehearsal=True)[0].summary == "rehearsed"
    assert run_parts(parts[:1], tmp_path, seconds=0, is_rehearsal=False)[1].verdict == "not run"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_session.main([]) == 2
    assert "gpu_session needs one CUDA device that torch can use; --rehearse" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_rehearsal(tmp_path, capsys):
    """The quick parts, as the whole of it takes minutes; each process as on a GPU."""
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    assert gpu_session.main(["--rehearse", "--out", str(tmp_path), "--only", "machine", "attention"]) == 0, \
        (tmp_path / "log.txt").read_text()[-3000:]
    printed = capsys.readouterr().out
    assert "machine / packages: passed" in printed and "attention / attention: passed" in printed
    assert " passed" in json.loads((tmp_path / "report.json").read_text())[1]["summary"]


def test_missing_packages_are_named(monkeypatch, tmp_path):
    assert gpu_machine.unmet_requirements() == []
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=99", "no-such-package>=1", "torch>=2; python_version < \'3\'"]\n')
    monkeypatch.setattr(gpu_machine, "ROOT", tmp_path)
    unmet = gpu_machine.unmet_requirements()
    assert len(unmet) == 2 and unmet[0].startswith("torch>=99: 2.") and unmet[1] == "no-such-package>=1: not installed"
    assert sys.version_info >= (3, 12)
