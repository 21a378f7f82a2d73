"""Pipelines on a backend that makes them wait as NCCL does: as they are they run, as they were they hang."""

from __future__ import annotations

import datetime
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import ProcessGroupGloo

from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.schedule.delivery import FIRST_CONTACT
from dsv3_megatron.schedule.delivery import ONE_STREAM as ONE_STREAM_RULES
from tests.distributed.executor_runs import run_compositions
from tests.distributed.launch import RankError, run_ranks
from tests.distributed.nccl_like_runs import run_collectives, train_as_it_was
from tests.distributed.nccl_like_threads import ThreadRun
from tests.nccl_like import ONE_STREAM, STREAM_PER_PAIR, NcclLikeBackend
from tests.unit.schedule.sizes import FORMS, form
from tests.unit.schedule.test_delivery import hangs, two_communicators

pytestmark = pytest.mark.distributed

NUM_COMPOSITIONS = 40
# Long against an operation that has nothing to wait for, and longer than a test waits for one that has.
PAUSE_S, LONG_S, TIMEOUT = 0.6, 20.0, datetime.timedelta(seconds=60)
# Where a hang is expected.
HANG_S = 6.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("data") / "train"
    with DatasetWriter(str(prefix), vocab_size=128) as writer:
        writer.add_documents(np.arange(3000) % 128, np.full(100, 30))
    return str(prefix)


# -- the backend itself, on two threads ----------------------------------------------------------------


class Waiting:
    """An operation that is waited for, once, while something else is done."""

    def __init__(self, work: Any) -> None:
        self.thread = threading.Thread(target=work.wait, daemon=True)
        self.thread.start()

    def is_done(self, within_s: float) -> bool:
        self.thread.join(within_s)
        return not self.thread.is_alive()


def watch_the_rules(rank: int, groups: list[Any]) -> dict[str, Any]:
    """What waits for what, as one of two ranks sees it."""
    peer, found = 1 - rank, dict[str, Any]()

    def receive(group: Any) -> Any:
        return group.recv([torch.empty(2)], peer, 0)

    def send(group: Any) -> Any:
        return group.send([torch.ones(2)], peer, 0)

    # First contact: rank 1 comes late.
    time.sleep(rank * PAUSE_S)
    started = time.monotonic()
    work = send(groups[0]) if rank == 0 else receive(groups[0])
    found["first"] = time.monotonic() - started
    work.wait()
    # The communicator is there; no buffer: rank 1 receives late.
    started = time.monotonic()
    if rank == 0:
        work = send(groups[0])
        found["second"] = time.monotonic() - started
        waiting = Waiting(work)
        found["sent without a receiver"] = waiting.is_done(PAUSE_S / 2)
        assert waiting.is_done(LONG_S)
    else:
        time.sleep(PAUSE_S)
        receive(groups[0]).wait()
    for group in groups[1:]:
        (send(group) if rank == 0 else receive(group)).wait()
    # A receive, then a send, on both sides: over two groups, then over one.
    works = [receive(groups[1 + rank]), send(groups[1 + peer])]
    found["over two groups"] = [Waiting(work).is_done(LONG_S) for work in works]
    works = [receive(groups[1]), send(groups[1])]
    found["over one group"] = [Waiting(work).is_done(PAUSE_S) for work in works]
    return found


def on_two_threads(make: Callable[[Any, int], Any]) -> list[dict[str, Any]]:
    """Both ranks, each with three groups that `make` makes of a store and a rank."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: watch_the_rules(rank, [
            make(torch.distributed.PrefixStore(str(number), store), rank) for number in range(3)]), range(2)))


@pytest.mark.parametrize("has_pairs", [False, True])
def test_the_backend_keeps_the_rules(has_pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    first, second = on_two_threads(lambda store, rank: NcclLikeBackend(store, rank, 2, TIMEOUT, has_pairs=has_pairs))
    assert first["first"] > PAUSE_S / 2 > second["first"], "the first message blocks who comes first"
    assert first["second"] < PAUSE_S / 2 and not first["sent without a receiver"]
    assert first["over two groups"] == second["over two groups"] == [True, True]
    assert first["over one group"] == second["over one group"] == [False, False]


def test_gloo_keeps_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """So tests on it did not show what would hang."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for found in on_two_threads(lambda store, rank: ProcessGroupGloo(store, rank, 2, TIMEOUT)):
        assert found["first"] < PAUSE_S / 2 and found["over one group"] == [True, True]


def test_what_the_rules_say_of_a_plan_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an edge for each way no schedule hangs; with two groups those do of which `delivery` says it, no others."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    plans = {name: form(name, 4, 8) for name in FORMS}
    # On a CPU the host waits for each tensor.
    expected = {(name, delivery.name): hangs(plans[name], replace(delivery, waits_for_device=True),
                                             communicator=two_communicators, meetings=[])
                for name in FORMS for delivery in (ONE_STREAM_RULES, FIRST_CONTACT)}
    assert Counter(expected.values()) == {True: 9, False: 5}
    runs = {(name, rules, is_old): ThreadRun(
        plans[name], has_pairs=rules == FIRST_CONTACT.name, is_old=is_old,
        timeout_s=HANG_S if is_old and expected[name, rules] else TIMEOUT.total_seconds())
        for name, rules in expected for is_old in (False, True)}
    for (name, rules, is_old), run in runs.items():
        assert run.hangs() == (is_old and expected[name, rules]), (name, rules, is_old)


# -- processes -----------------------------------------------------------------------------------------


def test_collectives_are_those_of_gloo() -> None:
    for expected, found in zip(run_ranks(3, run_collectives), run_ranks(3, run_collectives, backend=ONE_STREAM),
                               strict=True):
        assert all(map(torch.equal, expected, found)) and len(expected) == len(found)


def test_random_plans_run() -> None:
    """Schedule x PP x EP x micro-batches x layers: results and peaks are checked where they ran."""
    counts = run_ranks(4, run_compositions, NUM_COMPOSITIONS, backend=STREAM_PER_PAIR, timeout_s=120)
    assert counts[0][0] == NUM_COMPOSITIONS and counts[3][0] > NUM_COMPOSITIONS / 10 < counts[0][1]


def test_as_it_was_a_run_hangs_and_the_watchdog_says_where(data: str, tmp_path: Path) -> None:
    """That it does not as it is, `test_layouts.py` shows on the same backend."""
    with pytest.raises(RankError, match="exit code 4"):
        run_ranks(4, train_as_it_was, data, str(tmp_path), backend=ONE_STREAM, timeout_s=120)
    summary = (tmp_path / "hang-summary.txt").read_text()
    assert "4 of 4 ranks answered. Furthest behind first:" in summary
    for rank in range(4):
        assert f"\n  rank {rank}: step 1, micro-batch " in summary
        # The training thread waits for a tensor of another rank, in the executor and its transport.
        stack = (tmp_path / f"hang-rank-0000{rank}.txt").read_text()
        assert re.search(r'transport\.py", line \d+ in wait\n.*execute\.py", line \d+ in _take\n', stack), stack
