"""Freed host memory: whether it is kept is said, and never an error."""

import ctypes
import logging

import pytest

from dsv3_megatron.ops import host_memory
from dsv3_megatron.ops.host_memory import keep_freed_memory


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
