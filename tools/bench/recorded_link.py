"""Messages of a rank with the processor time between them, and how long both take over a link of any speed.

On a machine whose links are fast and whose cores are slow, or busy with other work, a clock does not show what a slow
link does. So each message is noted with its bytes, and the time of this thread at which it is posted and waited for.
`seconds_over` plays that back: computing takes its processor time, a link sends one message after the other at a given
speed, and a wait lasts until the message is through. A message that comes is taken to be through when the one that was
posted with it is: ranks that share a sequence compute equally much and begin together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dsv3_megatron.parallel.exchange import PostAllToAll, Posted, Splits


class Event(NamedTuple):
    """Of a message, by its number: posted with its bytes, or waited for, with none."""

    processor_s: float
    message: int
    num_bytes: int | None


@dataclass
class RecordedLink:
    """Notes a rank's messages; is a `PostAllToAll`.

    Attributes:
        post: Does the transfers.
        now: Processor time of this thread, in seconds.
        events: What was posted and waited for, in that order.
    """

    post: PostAllToAll
    now: Callable[[], float] = time.thread_time
    events: list[Event] = field(default_factory=list)

    def __call__(self, rows: torch.Tensor, splits: Splits) -> Posted:
        """Start a transfer."""
        own = torch.distributed.get_rank(splits.group)
        num_bytes = (sum(splits.sent) - splits.sent[own]) * rows[0].numel() * rows.element_size()
        number = len(self.events)
        self.events.append(Event(self.now(), number, num_bytes))
        return _Recorded(self.post(rows, splits), self, number)


@dataclass(frozen=True)
class _Recorded:
    transfer: Posted
    link: RecordedLink
    number: int

    def wait(self) -> torch.Tensor:
        self.link.events.append(Event(self.link.now(), self.number, None))
        return self.transfer.wait()


def seconds_over(events: list[Event], started_s: float, ended_s: float, bytes_per_s: float) -> float:
    """Time from a start to an end over a link.

    Args:
        events: What was posted and waited for between them.
        started_s: Processor time of the start.
        ended_s: The same of the end.
        bytes_per_s: Speed of the link, one way.
    """
    waited, free_at, through = 0.0, started_s, dict[int, float]()
    for event in events:
        now = event.processor_s + waited
        if event.num_bytes is not None:
            free_at = max(free_at, now) + event.num_bytes / bytes_per_s
            through[event.message] = free_at
        else:
            waited += max(0.0, through[event.message] - now)
    return ended_s - started_s + waited
