"""Pipelines whose ranks are threads, on the backend that waits as NCCL does: the executor and its transport."""

from __future__ import annotations

import datetime
import re
import threading
from collections.abc import Sequence
from typing import Any

import torch

from dsv3_megatron.schedule.execute import Executor
from dsv3_megatron.schedule.plan import Plan
from dsv3_megatron.schedule.transfers import edges_of, rounds_of_meetings
from dsv3_megatron.schedule.transport import PipelineChannels
from tests.nccl_like import NcclLikeBackend
from tests.unit.schedule.arithmetic_stages import MultiplyingStage, expected_weight_grad

# What gloo says of a wait that took too long, to who waited and then to who waited for that one.
TIMED_OUT, CLOSED = re.compile("[Tt]imed? ?out"), re.compile("Connection closed by peer|Connection reset by peer")


class ThreadChannels(PipelineChannels):
    """A pipeline's groups, as a rank that is a thread has them.

    Args:
        store: Where the ranks find each other.
        rank: Of the pipeline.
        plan: What is run.
        has_pairs: Of the backend.
        is_old: Two groups for all, as it was, instead of one for each edge.
        timeout: Time after which a rank waits for good; a step takes a tenth of a second.
    """

    def __init__(self, store: Any, rank: int, plan: Plan, *, has_pairs: bool, is_old: bool,
                 timeout: datetime.timedelta) -> None:
        self.rank, self.is_old = rank, is_old
        self.backends: dict[Any, NcclLikeBackend] = {}

        def make(name: Any, ranks: Sequence[int]) -> None:
            self.backends[name] = NcclLikeBackend(torch.distributed.PrefixStore(str(name), store), ranks.index(rank),
                                                  len(ranks), timeout, has_pairs=has_pairs)

        if is_old:
            for is_up in (True, False):
                make(is_up, range(plan.num_ranks))
                if not has_pairs:  # the communicator is there: no first contact
                    self.backends[is_up].barrier(torch.distributed.BarrierOptions()).wait()
            return
        edges = [edge for edges in rounds_of_meetings(edges_of(plan.placement)) for edge in edges if rank in edge]
        for edge in edges:
            make(edge, sorted(edge))
        self._meet(edges, torch.device("cpu"))

    def isend(self, tensor: torch.Tensor, destination: int) -> Any:
        if self.is_old:
            return self.backends[self.rank < destination].send([tensor], destination, 0)
        return self.backends[self.rank, destination].send([tensor], int(destination > self.rank), 0)

    def irecv(self, tensor: torch.Tensor, source: int) -> Any:
        if self.is_old:
            return self.backends[source < self.rank].recv([tensor], source, 0)
        return self.backends[source, self.rank].recv([tensor], int(source > self.rank), 0)


class ThreadRun:
    """A step of a plan, begun on a thread for each rank."""

    def __init__(self, plan: Plan, *, has_pairs: bool, is_old: bool, timeout_s: float) -> None:
        self.plan, self.errors = plan, list[str]()
        self._settings: dict[str, Any] = {"has_pairs": has_pairs, "is_old": is_old,
                                          "timeout": datetime.timedelta(seconds=timeout_s)}
        self._store = torch.distributed.HashStore()
        self._threads = [threading.Thread(target=self._run, args=(rank,), daemon=True)
                         for rank in range(plan.num_ranks)]
        for thread in self._threads:
            thread.start()

    def hangs(self) -> bool:
        """Whether a rank waited in vain; errors of another kind are raised."""
        for thread in self._threads:
            thread.join()
        waited = [error for error in self.errors if TIMED_OUT.search(error)]
        others = [error for error in self.errors if error not in waited and not (waited and CLOSED.search(error))]
        assert not others, others
        return bool(waited)

    def _run(self, rank: int) -> None:
        plan = self.plan
        try:
            channels = ThreadChannels(self._store, rank, plan, **self._settings)
            stages = [MultiplyingStage(plan, rank, chunk) for chunk in range(plan.num_chunks)]
            transport = channels.transport(shape=(1,), dtype=torch.float64, device=torch.device("cpu"))
            Executor(plan, rank, transport).run(stages)
            assert [stage.weight_grad for stage in stages] == [expected_weight_grad(plan, place)
                                                               for place in plan.placement[rank]], "wrong result"
        except Exception as error:  # noqa: BLE001 - looked at in `hangs`
            self.errors.append(f"{type(error).__name__}: {error}")
