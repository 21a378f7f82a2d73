"""The stand-in for the CUDA runtime: compiled once, and every way in which it cannot be is said with the way out."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.rehearsal.device_library import require_cuda_build, runtime_library


def test_it_is_compiled_once_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = runtime_library(tmp_path / "cache")
    monkeypatch.setenv("PATH", "")  # no compiler any more
    assert runtime_library(tmp_path / "cache") == library and list((tmp_path / "cache").iterdir()) == [library]
    monkeypatch.setenv("DSV3_REHEARSAL_GPUS", "3")
    runtime, count = ctypes.CDLL(str(library)), ctypes.c_int()
    assert runtime.cudaGetDeviceCount(ctypes.byref(count)) == 0 and count.value == 3


def test_a_missing_compiler_is_said_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match=r"no C compiler is here \(looked for cc, gcc, clang\): install one, such as "
                                          r"the package gcc \(apt-get install gcc"):
        runtime_library(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho stdio.h is missing >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(ConfigError, match="cannot compile cuda_runtime.c for the rehearsal: stdio.h is missing; "):
        runtime_library(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be kept in .*file/cache \(Not a directory\); set XDG_CACHE_HOME"):
        runtime_library(tmp_path / "file" / "cache")


@pytest.mark.parametrize(("version", "found"), [(None, "a build without CUDA"), ("12.8", "for CUDA 12.8")])
def test_another_build_of_torch_is_refused(version: str | None, found: str) -> None:
    with pytest.raises(ConfigError, match=f"needs torch built for CUDA 13, and the one here is {found}: install"):
        require_cuda_build(version)
    require_cuda_build("13.2")


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="works on Linux; this is darwin"):
        require_cuda_build("13.2")
