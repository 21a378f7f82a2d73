"""Workers end with the process that started them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.process import parent
from dsv3_megatron.process.parent import environment_of_child
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
    starter = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = [int(pid) for pid in starter.stdout.readline().split()]
    assert len(pids) == 3 and all(map(is_alive, pids))
    time.sleep(0.2)
    starter.send_signal(number)
    starter.wait(10)
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_what_was_frozen_is_collected_again_before_the_end() -> None:
    """Libraries count what is left of theirs at the end of a process; frozen objects would be told as leaked."""
    program = ("import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"
               "from dsv3_megatron.process.parent import freeze_before_forks as freeze\n"
               "freeze(); print(gc.get_freeze_count() > 0, flush=True)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "0"]


def test_a_child_imports_the_same_package(tmp_path: Path) -> None:
    program = "import dsv3_megatron.process.parent as parent; print(parent.__file__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60,
                          cwd=tmp_path, env=environment_of_child())
    assert done.stdout.strip() == parent.__file__
