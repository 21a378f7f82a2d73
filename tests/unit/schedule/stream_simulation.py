"""Hosts, devices and streams that move one step at a time, in any order: a slow second opinion on `delivery`.

It is written from the rules of NCCL as torch uses it. What each rank issues it is told as words:

    ("run",)                   an action
    ("put", message)           begin to send             ("take", message)   be ready to receive
    ("wait", message)          the device waits until the message has gone

A message is a tuple whose first two entries say from where it goes to where.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

Word = tuple[Any, ...]


class Simulation:
    """Ranks that have each a host, a device's stream, and a stream for every communicator.

    Args:
        issued: Words of each rank.
        communicator: Source and destination of a message -> its communicator.
        per_pair: A communicator has a stream for each pair of ranks.
        blocks: A host is held at the first message of a pair on a communicator until the other is there too.
        waits: A host is held behind an action until its device is idle.
        choice: Whose turn it is.
    """

    def __init__(self, issued: Sequence[Sequence[Word]], communicator: Callable[[int, int], Hashable], *,
                 per_pair: bool, blocks: bool, waits: bool, choice: random.Random) -> None:
        self.hosts = [deque(words) for words in issued]
        self.devices: list[deque[Word]] = [deque() for _ in issued]
        self.num_given, self.num_done = [0] * len(issued), [0] * len(issued)
        self.streams: dict[Hashable, deque[tuple[Any, int]]] = {}
        self.gone: set[Any] = set()
        self.at_contact: dict[Hashable, set[int]] = {}
        self.has_to_drain = [False] * len(issued)
        self.communicator, self.per_pair, self.blocks, self.waits = communicator, per_pair, blocks, waits
        self.choice = choice

    def ends(self) -> bool:
        """Whether everything that was issued is done when nothing moves any more."""
        ranks = list(range(len(self.hosts)))
        while True:
            self.choice.shuffle(ranks)
            moves = [move(rank) for rank in ranks for move in (self._host, self._device, self._streams)]
            if not any(moves):
                return not any(self.hosts) and not any(self.devices) and not any(self.streams.values())

    def _host(self, rank: int) -> bool:
        if not self.hosts[rank] or self.has_to_drain[rank] and self.devices[rank]:
            return False
        word = self.hosts[rank][0]
        if word[0] in ("put", "take"):
            message = word[1]
            pair = self.communicator(*message[:2]), frozenset(message[:2])
            if self.blocks:
                sides = self.at_contact.setdefault(pair, set())
                is_new = rank not in sides
                sides.add(rank)
                if len(sides) < 2:
                    return is_new
            stream = (rank, pair if self.per_pair else pair[0])
            self.streams.setdefault(stream, deque()).append((message, self.num_given[rank]))
        else:
            self.devices[rank].append(word)
            self.num_given[rank] += 1
        self.hosts[rank].popleft()
        self.has_to_drain[rank] = self.waits and word[0] == "run"
        return True

    def _device(self, rank: int) -> bool:
        if not self.devices[rank]:
            return False
        word = self.devices[rank][0]
        if word[0] == "wait" and word[1] not in self.gone:
            return False
        self.devices[rank].popleft()
        self.num_done[rank] += 1
        return True

    def _streams(self, rank: int) -> bool:
        """Let one message go that is first on both sides, if the devices have done what was given to them before."""
        firsts = [(key, *queue[0]) for key, queue in self.streams.items() if queue]
        for key, message, needed in firsts:
            if key[0] != rank or self.num_done[rank] < needed:
                continue
            peer = message[0] + message[1] - rank
            for other, same, needed_there in firsts:
                if other[0] == peer and same == message and self.num_done[peer] >= needed_there:
                    self.streams[key].popleft()
                    self.streams[other].popleft()
                    self.gone.add(message)
                    return True
        return False
