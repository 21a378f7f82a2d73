"""How much memory there is: the machine's, or what a control group leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsv3_megatron.process import host_bytes as module
from dsv3_megatron.process.host_bytes import free_host_bytes, host_bytes

GIB = 1 << 30


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a control group two levels below the root, as Slurm makes for a job's step."""
    own = next((line.strip()[4:] for line in Path("/proc/self/cgroup").read_text().splitlines()
                if line.startswith("0::")), "")
    folder = tmp_path / own
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(module, "_CONTROL_GROUPS", tmp_path)
    return folder


def meminfo(folder: Path, available: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal:       99 kB\nMemAvailable:   {available // 1024} kB\nHugePages_Total:   0\n")
    return path


def limit(folder: Path, most: str, used: int, spare: int) -> None:
    (folder / "memory.max").write_text(most + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {spare}\nactive_file 7\n")


def test_the_machine_without_limits(job: Path, tmp_path: Path) -> None:
    assert host_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit(job, "max", 5, 5)
    assert free_host_bytes(meminfo(tmp_path, 3 * GIB)) == 3 * GIB
    assert host_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_limit_leaves_what_is_not_used_and_what_files_would_give_up(job: Path, tmp_path: Path) -> None:
    limit(job, str(1 * GIB), used=GIB // 2, spare=GIB // 4)
    assert host_bytes() == GIB
    assert free_host_bytes(meminfo(tmp_path, 3 * GIB)) == GIB * 3 // 4
    assert free_host_bytes(meminfo(tmp_path, GIB // 8)) == GIB // 8
    limit(job, str(1 * GIB), used=2 * GIB, spare=0)
    assert free_host_bytes(meminfo(tmp_path, 3 * GIB)) == 0


def test_a_kernel_that_does_not_say(job: Path, tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path / "nothing") is None


def test_this_machine_says() -> None:
    free, have = free_host_bytes(), host_bytes()
    assert free is not None and have is not None and 0 < free <= have
