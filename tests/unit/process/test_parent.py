"""Workers end with the process that started them."""

import signal
import subprocess
import sys
import time

import pytest

from tests.unit.process.alive import is_alive

PARENT = """
import sys, time
from dsv3_megatron.data.pool import WorkerPool
def slow(item, payload):
    time.sleep(60)
    return item, []
with WorkerPool(slow, 3) as pool:
    print(*[worker.process.pid for worker in pool._workers], flush=True)
    list(pool.map_ordered((item, None) for item in range(9)))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3 and all(map(is_alive, pids))
    time.sleep(0.2)
    parent.send_signal(number)
    parent.wait(10)
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))
