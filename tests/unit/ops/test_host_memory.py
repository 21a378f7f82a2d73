"""Freed host memory: whether it is kept is said, and never an error."""

import ctypes
import logging
import os
import subprocess
import sys

import pytest

from dsv3_megatron.ops import host_memory
from dsv3_megatron.ops.host_memory import ask_for_huge_pages, keep_freed_memory


def test_it_says_whether_it_worked():
    assert keep_freed_memory() in (True, False)


@pytest.mark.parametrize(("refused", "text"), [(0, "default policy (mallopt refused)"), (1, "kept for reuse")])
def test_what_the_library_answers_is_logged(monkeypatch, caplog, refused, text):
    class Library:
        calls = []

        def mallopt(self, name, value):
            self.calls.append((name, value))
            return refused

    monkeypatch.setattr(host_memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Library())
    with caplog.at_level(logging.INFO, "dsv3_megatron.ops.host_memory"):
        assert keep_freed_memory() is bool(refused)
    assert text in caplog.text
    # M_MMAP_THRESHOLD is -3 in malloc.h, M_TRIM_THRESHOLD -1.
    assert Library.calls[0] == (-3, 2**31 - 1) and (not refused or Library.calls[1] == (-1, 2**31 - 1))


def test_without_glibc_nothing_is_asked(monkeypatch, caplog):
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    with caplog.at_level(logging.INFO, "dsv3_megatron.ops.host_memory"):
        monkeypatch.setattr(host_memory.sys, "platform", "linux")
        assert not keep_freed_memory()
        monkeypatch.setattr(host_memory.sys, "platform", "darwin")
        assert not keep_freed_memory()
    assert "C library without mallopt" in caplog.text and "not glibc" in caplog.text


@pytest.mark.parametrize(("policy", "given", "asks", "text"), [
    ("always [madvise] never", None, True, "huge pages: asked for"),
    ("[always] madvise never", "0", False, "none (THP_MEM_ALLOC_ENABLE=0)"),
    ("always madvise [never]", None, False, "the kernel gives none"),
    (None, None, False, "the kernel gives none")])
def test_huge_pages_are_asked_for_where_there_are_any(monkeypatch, caplog, tmp_path, policy, given, asks, text):
    if policy is not None:
        (tmp_path / "enabled").write_text(policy)
    monkeypatch.setattr(host_memory, "_POLICY", tmp_path / "enabled")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    with caplog.at_level(logging.INFO, "dsv3_megatron.ops.host_memory"):
        assert ask_for_huge_pages() is asks
    assert text in caplog.text and os.environ.get("THP_MEM_ALLOC_ENABLE") == (given or ("1" if asks else None))


@pytest.mark.skipif(sys.platform != "linux" or not host_memory._POLICY.exists()
                    or "[never]" in host_memory._POLICY.read_text(), reason="this kernel has no huge pages")
def test_a_rank_asks_for_them_before_torch_has_decided():
    """The kernel notes under the tensor that it was asked (hg), after everything that a rank imports before it asks."""
    program = (
        "import torch\n"
        "from dsv3_megatron.runs.rank import prepare_rank\n"
        "prepare_rank()\n"
        "large = torch.ones(1 << 23)\n"
        "print(sum(line.startswith('VmFlags:') and ' hg' in line for line in open('/proc/self/smaps')))\n")
    environment = {name: text for name, text in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) > 0, done.stderr
