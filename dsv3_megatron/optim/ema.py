"""A moving average of the weights in CPU memory, on a GPU kept up to date while the next step computes.

Each rank averages the shard of the fp32 master weights that its distributed optimizer owns: 4 bytes a parameter divided
by the data-parallel ranks. After an optimizer step on a GPU a stream of its own copies the new weights into pinned
memory, from where a thread takes them in (not run on a GPU yet). The next optimizer step waits for it, so that it does
not overwrite what is being read. Forward and backward passes do not wait.

A run on a CPU takes the weights in before the step ends. A thread would compute with OpenMP threads of its own beside
the step's. Where there are then more of them than cores, all of them sleep whenever they wait for one another: a step
of `tiny` took 0.16 s instead of 0.07 with two threads on two cores.

After k updates the average is

    e_k = (1 - d) / (1 - d^k) * sum_{i=1..k} d^(k-i) w_i

the exponentially weighted mean of the weights after each step, with shares that sum to 1: nothing of the initial
weights and no bias towards zero is in it, from the first update on. It is kept in this form, as
e_k = e_(k-1) + (1 - d) / (1 - d^k) (w_k - e_(k-1)), so that it can be used at any time as it stands.

Steps that were not applied are not taken in. The routers' biases are not averaged: they are used as they are.

Source: DeepSeek-V3 report, section 3.2.3: "we preserve the EMA of the model parameters in CPU memory, updated
asynchronously after each training step". It gives neither the decay nor a correction of the bias.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.model.stage.buckets import finish_gathering
from dsv3_megatron.optim.shards import distributed_parts, master_shards


class WeightAverage:
    """The average of this rank's shards.

    Args:
        optimizer: The distributed optimizer whose master weights are averaged.
        chunks: The wrapped stages that it trains.
        groups: The run's process groups.
        decay: d, in (0, 1): 0.999 averages over about the last 1,000 steps.

    Attributes:
        shards: Shards of master weights; entry i of `averages` is the average of shard i.
        averages: fp32, in CPU memory; of no meaning before the first update.
        num_updates: Updates so far, the k of the correction.
    """

    def __init__(self, optimizer: MegatronOptimizer, chunks: list[torch.nn.Module], groups: ProcessGroupCollection, *,
                 decay: float) -> None:
        self.optimizer, self.chunks, self.decay = optimizer, chunks, decay
        self.shards = list(master_shards(optimizer, chunks, groups))
        self.averages = [torch.zeros(shard.master.shape, dtype=torch.float32, device="cpu") for shard in self.shards]
        self.num_updates = 0
        is_cuda = any(shard.master.is_cuda for shard in self.shards)
        self._landing = [torch.empty(average.shape, dtype=torch.float32, device="cpu", pin_memory=True)
                         for average in self.averages] if is_cuda else None
        self._stream = torch.cuda.Stream() if is_cuda else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-average") if is_cuda else None
        self._pending: Future[None] | None = None

    def update(self) -> None:
        """Take in the weights as they are now, or on a GPU begin to. `wait` before they change."""
        self.wait()
        self.num_updates += 1
        share = (1.0 - self.decay) / (1.0 - self.decay ** self.num_updates)
        copied = self._copy_to_host()
        if self._thread is None:
            self._take_in(copied, share)
        else:
            self._pending = self._thread.submit(self._take_in, copied, share)

    def wait(self) -> None:
        """Return when the last update is done, and raise what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _copy_to_host(self) -> torch.cuda.Event | None:
        """Begin on a GPU to copy the weights; the event is reached when they are there."""
        if self._stream is None or self._landing is None:
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.no_grad():
            for landing, shard in zip(self._landing, self.shards, strict=True):
                landing.copy_(shard.master, non_blocking=True)
        return self._stream.record_event()

    @torch.no_grad()
    def _take_in(self, copied: torch.cuda.Event | None, share: float) -> None:
        if copied is not None:
            copied.synchronize()
        weights = self._landing or [shard.master for shard in self.shards]
        for average, weight in zip(self.averages, weights, strict=True):
            average.lerp_(weight, share)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model compute with the average; afterwards its weights are what they were, bit for bit.

        Called by every rank. The weights are kept in CPU memory meanwhile.

        Raises:
            ValueError: there is no average before the first update.
        """
        self.wait()
        if not self.num_updates:
            raise ValueError("the weights have no average before the first step with ema_decay")
        finish_gathering(self.chunks)
        kept = [shard.master.detach().to("cpu", copy=True) for shard in self.shards]
        self._set_weights(self.averages)
        try:
            yield
        finally:
            self._set_weights(kept)

    @torch.no_grad()
    def _set_weights(self, values: list[torch.Tensor]) -> None:
        """Put values into the master weights, and from there into every replica's weights."""
        for shard, value in zip(self.shards, values, strict=True):
            shard.master.copy_(value)
        for part in distributed_parts(self.optimizer):
            part._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
