"""Process groups made by their own ranks alone, one for a set of ranks, and no communicator before it is used.

torch's `new_group` wants to be called by every rank for every group of the run, also for those that a rank is not in.
On a GPU each of these calls may split the communicator of all ranks, which all of them wait for: minutes at a start
with thousands of ranks. Here only a group's own ranks call it (`use_local_synchronization`), and a communicator is made
by the first thing that is sent over it (`lazy_init`).

Two rules are the price. The ranks of a group find each other by a name that torch makes of the ranks and of how many
groups the process has made before: all of them must have made equally many. And ranks that wait for each other in
different groups would wait for good. So every rank goes through all groups of the run in one order, though it makes
only its own; it counts what each of the others has made by then; and where some ranks of a group have made fewer
groups than others, they first make groups of themselves alone, which cost nothing. In the end all are made level, for
whoever makes a group by torch's own rules.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from dsv3_megatron.config.guards import UNWATCHED_TIMEOUT_S

__all__ = ["Ledger", "collective_timeout", "communicator_options", "ledger", "megatron_groups_of_own_ranks",
           "process_group", "set_collective_timeout", "set_most_sms"]

_timeout_s = UNWATCHED_TIMEOUT_S
_most_sms = 0


def set_collective_timeout(seconds: float) -> None:
    """Let the groups that are made from now on give up a message whose peer does not come in so many seconds."""
    global _timeout_s
    _timeout_s = seconds


def set_most_sms(count: int) -> None:
    """Let each group that is made from now on use so many multiprocessors of a GPU at most; 0: as NCCL likes."""
    global _most_sms
    _most_sms = count


def collective_timeout() -> datetime.timedelta:
    """How long a message of this run's groups waits for its peer, the same in all of them."""
    return datetime.timedelta(seconds=_timeout_s)


def communicator_options(backend: str) -> Any:
    """Options of a new group: with NCCL, that its communicator is made when it is first used, and how many
    multiprocessors it may hold (`set_most_sms`; a CTA is one); else None.

    torch 2.11 to 2.14 has no such option and makes communicators so by itself.
    """
    if backend != "nccl":
        return None
    options = torch.distributed.ProcessGroupNCCL.Options()
    if hasattr(options, "lazy_init"):
        options.lazy_init = True
    if _most_sms:
        options.config.max_ctas = _most_sms
    return options


def process_group(ranks: Sequence[int], name: str | None = None) -> torch.distributed.ProcessGroup:
    """Make a group that its own ranks make, without the others; `Ledger` is what knows when they may.

    Args:
        ranks: Global ranks, of which this process is one.
        name: Description for torch's messages.
    """
    group = torch.distributed.new_group(
        list(ranks), use_local_synchronization=True, group_desc=name,
        timeout=collective_timeout(),
        pg_options=communicator_options(torch.distributed.get_backend()))
    assert isinstance(group, torch.distributed.ProcessGroup)
    return group


class Ledger:
    """The groups of a run that were made so far, and how many each rank has made.

    Args:
        rank: Global rank of this process.
        world: Group of all ranks.
        make: Makes a group of ranks, for tests.
    """

    def __init__(self, rank: int, world: torch.distributed.ProcessGroup,
                 make: Callable[..., Any] = process_group) -> None:
        self.rank, self.world = rank, world
        self.num_made = [0] * world.size()
        self._make = make
        self._groups: dict[tuple[str, tuple[int, ...]], Any] = {("", tuple(range(world.size()))): world}

    def group(self, ranks: Iterable[int], purpose: str = "", make: Callable[..., Any] | None = None) -> Any:
        """Give the one group of a set of ranks; every rank of the run calls, in one order, members or not.

        Args:
            ranks: Global ranks of the group.
            purpose: What the group is for, where what it carries must not wait for what others carry; groups of the
                same ranks and purpose are one.
            make: Makes the group instead of `process_group`, with the same arguments.

        Returns:
            The group; None for ranks that are not in it.
        """
        key = purpose, tuple(sorted(ranks))
        if key not in self._groups:
            self._groups[key] = self._new(key[1], purpose, make or self._make)
        return self._groups[key]

    def level(self) -> None:
        """Let all ranks have made equally many groups, as torch takes it for groups that others make; called by all."""
        level = max(self.num_made)
        self._catch_up(level)
        self.num_made = [level] * len(self.num_made)

    def _catch_up(self, level: int) -> None:
        for _ in range(level - self.num_made[self.rank]):
            self._make([self.rank], "to count as many as others")

    def _new(self, ranks: tuple[int, ...], purpose: str, make: Callable[..., Any]) -> Any:
        level = max(self.num_made[rank] for rank in ranks)
        own = None
        if self.rank in ranks:
            self._catch_up(level)
            own = make(ranks, purpose or None)
        for rank in ranks:
            self.num_made[rank] = level + 1
        return own


_ledger: Ledger | None = None


def ledger() -> Ledger:
    """The ledger of the processes that have met; a new one where torch.distributed was started anew."""
    global _ledger
    world = torch.distributed.group.WORLD
    assert world is not None, "torch.distributed has started"
    if _ledger is None or _ledger.world is not world:
        _ledger = Ledger(torch.distributed.get_rank(), world)
    return _ledger


@contextlib.contextmanager
def megatron_groups_of_own_ranks() -> Iterator[None]:
    """Let Megatron-Core make its groups through the ledger inside the block.

    It asks every rank for every group, in one order, so for each of them as many times as the run has groups; and for
    several groups of the same ranks, for parallel dimensions that are 1.
    """
    original = parallel_state.create_group

    def create(ranks: Sequence[int], timeout: datetime.timedelta | None = None, backend: None = None,
               pg_options: Any = None, use_local_synchronization: bool = False, group_desc: str | None = None) -> Any:
        assert backend is None, "groups are of the run's own backend"

        def make(members: Sequence[int], _purpose: str | None) -> Any:
            options = pg_options or communicator_options(torch.distributed.get_backend())
            return original(list(members), timeout=collective_timeout(), use_local_synchronization=True,
                            group_desc=group_desc, pg_options=options)

        group = ledger().group(ranks, make=make)
        return torch.distributed.GroupMember.NON_GROUP_MEMBER if group is None else group

    parallel_state.create_group = create
    try:
        yield
        ledger().level()
    finally:
        parallel_state.create_group = original
