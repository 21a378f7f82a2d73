"""The report of `.ci/run_gpu`: from what its stages left in a folder to one page.

    python -m tests.gpu.write_report DIR EXIT_CODE_OF_TESTS EXIT_CODE_OF_QUICKSTART      writes DIR/report.md
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "transformer-engine-torch", "transformers")


@dataclass(frozen=True)
class Outcome:
    """One test: "passed", "failed", "error" or "skipped", why, its seconds, and what it printed."""

    name: str
    result: str
    reason: str
    seconds: float
    output: str


def outcomes(junit: Path) -> list[Outcome]:
    """The tests in a junit.xml."""
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        result, reason = "passed", ""
        for kind, word in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            element = case.find(kind)
            if element is not None:
                result, reason = word, " ".join(element.get("message", "").split())
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        found.append(Outcome(name, result, reason, float(case.get("time", 0)), case.findtext("system-out", "")))
    return found


def report(folder: Path, tests_code: int, quickstart_code: int) -> str:
    """The page, in Markdown."""
    return "\n".join([*_machine(), *_tests(folder / "junit.xml", tests_code),
                      *_throughput(folder / "training_throughput.csv"), *_quickstart(folder, quickstart_code), ""])


def _machine() -> Iterator[str]:
    import torch

    yield "# GPU report\n"
    yield f"- commit {_run('git', 'describe', '--always', '--dirty') or 'unknown'}"
    yield f"- date {_run('date', '-u', '+%Y-%m-%d %H:%M UTC')}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"- GPU {index}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    yield f"- driver {_run('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader') or 'unknown'}"
    yield f"- CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Python {platform.python_version()}"
    for package in PACKAGES:
        try:
            yield f"- {package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"- {package}: not installed"


def _tests(junit: Path, code: int) -> Iterator[str]:
    yield "\n## Tests\n"
    if not junit.is_file():
        yield f"pytest ended with code {code} before it wrote its results; see log.txt."
        return
    found = outcomes(junit)
    counts = Counter(outcome.result for outcome in found)
    yield f"{', '.join(f'{count} {result}' for result, count in sorted(counts.items()))}; exit code {code}.\n"
    yield "| test | result | seconds | |\n|---|---|---|---|"
    for outcome in sorted(found, key=lambda outcome: (outcome.result == "passed", outcome.name)):
        printed = " ".join(line for line in outcome.output.splitlines() if "error" in line or "loss" in line)
        note = (outcome.reason or printed).replace("|", "/")[:300]
        yield f"| {outcome.name} | {outcome.result} | {outcome.seconds:.1f} | {note} |"


def _throughput(file: Path) -> Iterator[str]:
    yield "\n## Training throughput\n"
    if not file.is_file():
        yield "Not measured."
        return
    yield "| config | metric | value | unit |\n|---|---|---|---|"
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            yield f"| {row['config']} | {row['metric']} | {row['value']} | {row['unit']} |"


def _quickstart(folder: Path, code: int) -> Iterator[str]:
    yield "\n## Quickstart\n"
    yield f"`RUN_DIR={folder / 'quickstart'} bash examples/pretrain_dsv3.sh --fresh`: exit code {code}.\n"
    summary = folder / "quickstart" / "summary.json"
    if summary.is_file():
        for key, value in json.loads(summary.read_text(encoding="utf-8")).items():
            yield f"- {key}: {value}"
    else:
        yield "It left no summary; see log.txt."


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "report.md").write_text(report(target, int(sys.argv[2]), int(sys.argv[3])), encoding="utf-8")
