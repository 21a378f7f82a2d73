"""Processes meet before they start: here threads stand for them, each with its own connection to the store."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.parallel import roll_call
from dsv3_megatron.parallel.roll_call import PeerError, RollCall


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(roll_call, "_LINGER_S", 3.0)
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def outcome(action: Callable[[], None]) -> str:
    try:
        action()
    except (ConfigError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "together"


def together(port: int, actions: list[Callable[[RollCall], None]], ranks: list[int] | None = None) -> list[str]:
    """What comes of it for each process."""
    ranks = list(range(len(actions))) if ranks is None else ranks

    def process(rank: int, action: Callable[[RollCall], None]) -> str:
        return outcome(lambda: action(RollCall("test", "127.0.0.1", port, rank, len(actions), patience_s=10.0)))

    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in
                [pool.submit(process, rank, action) for rank, action in zip(ranks, actions, strict=True)]]


def test_all_come(port: int) -> None:
    assert together(port, [RollCall.meet] * 4) == ["together"] * 4


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_of_one_is_heard_by_all(rank: int, port: int) -> None:
    actions: list[Callable[[RollCall], None]] = [RollCall.meet] * 3
    actions[rank] = lambda call: call.excuse("node1: the disk is gone")
    started = time.monotonic()
    found = together(port, actions)
    assert found.pop(rank) == "together"
    assert found == ["PeerError: node1: the disk is gone"] * 2
    assert time.monotonic() - started < 10, "somebody waited"


def test_two_with_one_rank_are_told_so(port: int) -> None:
    found = together(port, [RollCall.meet] * 3, ranks=[0, 1, 1])
    assert all("two processes came as rank 1 of 3; give each its own" in text for text in found)


def test_one_that_does_not_come_is_named(port: int, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(roll_call, "_MEET_S", 1.0)
    monkeypatch.setattr(roll_call, "_TELL_S", 0.1)
    call = RollCall("test", "127.0.0.1", port, 0, 3)
    with pytest.raises(PeerError, match=f"rank 1, 2 of 3 did not come to 127.0.0.1:{port} within 1 s"):
        call.meet()
    assert f"waiting at 127.0.0.1:{port} for rank 1, 2 of 3, " in capsys.readouterr().err


def test_nobody_serves_the_store(port: int) -> None:
    with pytest.raises(PeerError, match=f"rank 0 was not found at 127.0.0.1:{port} within 0.5 s"):
        RollCall("test", "127.0.0.1", port, 1, 2, patience_s=0.5)


def test_a_taken_port_is_said(port: int) -> None:
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} cannot be listened on"):
            RollCall("test", "127.0.0.1", port, 0, 2)


def test_those_that_stand_by_hear_the_exit_code(port: int) -> None:
    def process(rank: int) -> int:
        call = RollCall("standing by", "127.0.0.1", port, rank, 3, patience_s=10.0)
        if rank:
            return call.wait_for_end()
        time.sleep(0.3)
        call.end(75)
        return 75

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(process, range(3))) == [75, 75, 75]


def test_one_that_stands_by_notices_that_rank_0_is_gone(port: int) -> None:
    code = ("import sys, time; from dsv3_megatron.parallel.roll_call import RollCall\n"
            f"RollCall('standing by', '127.0.0.1', {port}, 0, 2); print('here', flush=True); time.sleep(60)")
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert host.stdout is not None and host.stdout.readline() == b"here\n"
    call = RollCall("standing by", "127.0.0.1", port, 1, 2, patience_s=10.0)
    host.kill()
    host.wait()
    with pytest.raises(PeerError, match="rank 0 ended"):
        call.wait_for_end()
