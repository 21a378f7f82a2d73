"""Worker processes: results in order, errors said, nobody left behind."""

import os
import signal
import time

import pytest

from dsv3_megatron.data.pool import WorkerDied, WorkerError, WorkerPool
from tests.unit.process.alive import is_alive


def square(item, payload=None):
    time.sleep(0.001 * (item % 5))
    return item * item, [bytes([item % 256]) * (item * 1000), b""]


def numbers(count):
    return ((item, None) for item in range(count))


def pids_of(pool):
    return [worker.process.pid for worker in pool._workers]


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_results_come_in_order(num_workers):
    with WorkerPool(square, num_workers) as pool:
        pids = pids_of(pool)
        results = [
            (item, result, [len(part) for part in buffers]) for item, result, buffers in pool.map_ordered(numbers(60))
        ]
    assert results == [(item, item * item, [item * 1000, 0]) for item in range(60)]
    assert not any(map(is_alive, pids))


def measure(item, payload):
    return (item, None if payload is None else len(payload)), []


def test_payloads_go_along():
    sizes = [None, 0, 1, 70_000, 20_000_000]
    items = ((size, None if size is None else bytearray(size)) for size in sizes)
    with WorkerPool(measure, 2) as pool:
        assert [result for _, result, _ in pool.map_ordered(items)] == [(size, size) for size in sizes]


def test_no_items():
    with WorkerPool(square, 2) as pool:
        assert list(pool.map_ordered([])) == []


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for item in range(1000):
            taken.append(item)
            yield item, None

    with WorkerPool(square, 2) as pool:
        results = pool.map_ordered(items())
        for _ in range(5):
            next(results)
        time.sleep(0.2)
        assert len(taken) < 30


def fail_at_five(item, payload):
    if item == 5:
        raise ValueError("five is right out")
    return square(item)


def test_an_error_in_a_worker_is_raised_here():
    with WorkerPool(fail_at_five, 2) as pool, pytest.raises(WorkerError, match="(?s)Traceback.*five is right out"):
        list(pool.map_ordered(numbers(20)))


def test_an_error_in_the_items_is_raised_here():
    def items():
        yield 1, None
        raise OSError("the disk is gone")

    with WorkerPool(square, 2) as pool, pytest.raises(OSError, match="the disk is gone"):
        list(pool.map_ordered(items()))


def die_at_five(item, payload):
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(item)


def test_a_killed_worker_is_noticed():
    with WorkerPool(die_at_five, 2) as pool:
        pids = pids_of(pool)
        with pytest.raises(
            WorkerDied, match=r"worker process \d+ was killed by SIGKILL \(was memory short\?\)"
        ) as error:
            list(pool.map_ordered(numbers(20)))
        assert error.value.item == 5
    assert not any(map(is_alive, pids))


def exit_at_five(item, payload):
    if item == 5:
        os._exit(3)
    return square(item)


def test_a_worker_that_exits_is_noticed():
    with WorkerPool(exit_at_five, 2) as pool, pytest.raises(WorkerDied, match=r"ended with exit code 3"):
        list(pool.map_ordered(numbers(20)))
