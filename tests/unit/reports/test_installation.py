"""What the examination of a machine finds, with things taken away."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from dsv3_megatron.reports import installation
from dsv3_megatron.reports.installation import (
    OPTIONAL_PACKAGES,
    TOPICS,
    SetupFinding,
    State,
    check_requirement,
    examine,
)


def named(folder: Path) -> dict[str, SetupFinding]:
    findings = examine(folder)
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names) and {finding.topic for finding in findings} <= set(TOPICS)
    return {finding.name: finding for finding in findings}


def test_this_machine_is_ready_and_every_package_of_its_own_is_looked_at(tmp_path: Path) -> None:
    """The tests run here, so a run can."""
    findings = named(tmp_path)
    assert {name for name, finding in findings.items() if finding.state is State.WRONG} == set()
    assert {"Python", "torch", "megatron-core", "triton", "memory", "shared memory"} <= set(findings)
    assert findings["torch"].found == torch.__version__.partition("+")[0]
    assert "pytest" not in findings, "an extra's packages are none that a run needs"


@pytest.mark.parametrize(("version", "state"), [("2.11.0", State.GOOD), ("2.12.0+cu130", State.GOOD),
                                               ("2.10.9", State.WRONG), (None, State.WRONG)])
def test_a_package_is_compared_with_what_is_asked_for(version: str | None, state: State) -> None:
    finding = check_requirement(Requirement("torch>=2.11"), lambda name: {"torch": version}[name])
    assert finding.state is state
    if state is State.WRONG:
        assert ">=2.11 is needed" in finding.found and "make setup" in finding.remedy


def test_a_package_of_one_feature_that_is_absent_says_what_it_is_for_and_what_to_do(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    findings = named(tmp_path)
    for package in OPTIONAL_PACKAGES:
        finding = findings[package.module]
        assert finding.state is State.ABSENT and finding.use == package.use and finding.remedy == package.remedy
        assert package.otherwise in finding.found


def test_not_installed_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    finding = named(tmp_path)["dsv3_megatron"]
    assert finding.state is State.ABSENT and "make setup" in finding.remedy


def test_a_port_that_is_taken_and_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(installation, "DEFAULT_PORT", taken.getsockname()[1])
        monkeypatch.setattr(installation.os, "access", lambda path, mode: Path(path) != tmp_path)
        findings = named(tmp_path)
    port = findings[f"port {installation.DEFAULT_PORT}"]
    assert port.state is State.ABSENT and "another process listens" in port.found and "MASTER_PORT" in port.remedy
    assert findings[f"disk of {tmp_path}"].state is State.WRONG
    assert findings["shared memory"].state is State.GOOD


def test_little_room_and_few_files_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = installation.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(installation.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    monkeypatch.setattr(installation.resource, "getrlimit", lambda which: (64, 64))
    findings = named(tmp_path)
    assert findings["shared memory"].state is State.WRONG and "--shm-size" in findings["shared memory"].remedy
    assert findings["open files"].state is State.WRONG and "ulimit" in findings["open files"].remedy


def test_a_driver_without_gpus_for_torch_is_wrong_and_no_driver_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                       ) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    assert named(tmp_path)["GPUs"].state is State.ABSENT
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert named(tmp_path)["GPUs"].state is State.WRONG
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = named(tmp_path)["GPUs"]
    assert finding.state is State.ABSENT and "built without CUDA" in finding.found
