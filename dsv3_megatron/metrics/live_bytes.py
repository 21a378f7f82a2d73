"""Bytes of tensors on the CPU, exactly: what a block of code allocates, holds at its end, and holds at most.

From the allocator's events as torch's profiler records them; unlike the process's resident size this does not depend on
what the allocator or the system keep for later. It slows the block down: not for timing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass
class LiveBytes:
    """Filled in when the block ends.

    Attributes:
        at_end: Allocated in the block and not freed in it, less what was freed in it and allocated before.
        peak: The largest value of that during the block.
    """

    at_end: int = 0
    peak: int = 0


@contextlib.contextmanager
def count_live_bytes() -> Iterator[LiveBytes]:
    """Count allocations and frees of CPU tensors by this thread while the block runs.

    Those of another thread are not seen: what a thread of gloo lets go of last seems to stay.
    """
    counted = LiveBytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        yield counted
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            counted.at_end += event.nbytes()
            counted.peak = max(counted.peak, counted.at_end)
