"""The order in which one rank works, for every schedule. Pure: ranks and micro-batches in, actions out.

Each function is the whole recipe of one schedule. They take sizes that `plan.build_plan` has checked.
"""

from __future__ import annotations

from collections import Counter, deque

from dsv3_megatron.schedule.actions import Action, Kind, Operation


class _Order:
    """Actions of one rank as they are written down; counts each chunk's micro-batches, keeps the weight parts owed."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next_forward: Counter[int] = Counter()
        self._next_backward: Counter[int] = Counter()
        self._owed: deque[Operation] = deque()  # first in, first out

    def _take(self, counter: Counter[int], kind: Kind, chunk: int) -> Operation:
        counter[chunk] += 1
        return Operation(kind, chunk, counter[chunk] - 1)

    def num_forwards(self, chunk: int) -> int:
        return self._next_forward[chunk]

    def forward(self, chunk: int) -> None:
        self.actions.append(Action((self._take(self._next_forward, Kind.FORWARD, chunk),)))

    def backward(self, chunk: int) -> None:
        self.actions.append(Action((self._take(self._next_backward, Kind.BACKWARD, chunk),)))

    def pair(self, forward_chunk: int, backward_chunk: int) -> None:
        self.actions.append(Action((self._take(self._next_forward, Kind.FORWARD, forward_chunk),
                                    self._take(self._next_backward, Kind.BACKWARD, backward_chunk))))

    def backward_input(self, chunk: int) -> None:
        operation = self._take(self._next_backward, Kind.BACKWARD_INPUT, chunk)
        self.actions.append(Action((operation,)))
        self._owed.append(Operation(Kind.BACKWARD_WEIGHT, chunk, operation.microbatch))

    def backward_weight(self, chunk: int | None = None) -> None:
        """The weight part owed longest, of any chunk or of one."""
        operation = next(owed for owed in self._owed if chunk in (None, owed.chunk))
        self._owed.remove(operation)
        self.actions.append(Action((operation,)))

    def finish(self) -> tuple[Action, ...]:
        """Pay what is owed."""
        while self._owed:
            self.backward_weight()
        return tuple(self.actions)


def one_forward_one_backward(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    """1F1B: later ranks start later and alternate sooner, so that rank r never holds more than P - r micro-batches.

    Source: PipeDream-Flush, arXiv 2006.09503, section 3.
    """
    order = _Order()
    num_warmup = min(num_ranks - 1 - rank, num_microbatches)
    for _ in range(num_warmup):
        order.forward(0)
    for _ in range(num_microbatches - num_warmup):
        order.forward(0)
        order.backward(0)
    for _ in range(num_warmup):
        order.backward(0)
    return order.finish()


def interleaved(rank: int, num_ranks: int, num_microbatches: int, num_chunks: int, is_overlapped: bool,
                ) -> tuple[Action, ...]:
    """Interleaved 1F1B: chunk c of rank r is stage c * P + r; micro-batches go round in groups of P.

    Args:
        is_overlapped: Run one forward more before the first backward, which makes the forward and the backward of
            the steady state independent of each other, and run them as pairs. Megatron-Core's
            `overlap_moe_expert_parallel_comm`.

    Source: arXiv 2104.04473, section 2.2; the number of warm-up forwards is Megatron-Core's.
    """
    order = _Order()
    total = num_microbatches * num_chunks
    num_warmup = min(2 * (num_ranks - 1 - rank) + (num_chunks - 1) * num_ranks + is_overlapped, total)

    def forward_chunk(step: int) -> int:
        return step // num_ranks % num_chunks

    def backward_chunk(step: int) -> int:
        return num_chunks - 1 - forward_chunk(step)

    for step in range(num_warmup):
        order.forward(forward_chunk(step))
    for step in range(total - num_warmup):
        if is_overlapped:
            order.pair(forward_chunk(num_warmup + step), backward_chunk(step))
        else:
            order.forward(forward_chunk(num_warmup + step))
            order.backward(backward_chunk(step))
    for step in range(total - num_warmup, total):
        order.backward(backward_chunk(step))
    return order.finish()


def zero_bubble(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    """ZB1P: 1F1B with a split backward; rank r runs its weight parts r micro-batches late.

    Every rank then holds P micro-batches, no more than rank 0 of 1F1B, and the late weight parts fill the wait for the
    last gradients. Source: ZB-H1 of "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 2.
    """
    order = _Order()
    num_warmup = min(num_ranks - 1 - rank, num_microbatches)
    for _ in range(num_warmup):
        order.forward(0)
    for step in range(num_microbatches):
        if step < num_microbatches - num_warmup:
            order.forward(0)
        order.backward_input(0)
        if step >= rank:
            order.backward_weight()
    return order.finish()


def zero_bubble_v(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    """ZB-V: rank r holds stages r and 2P-1-r, so the loss is on rank 0 and backward passes start there.

    The recipe is for 2P-1 micro-batches or more. Fewer run in the same order with the rest left out, which keeps every
    dependency. Source: arXiv 2401.10241, section 6 (the hand-made order, which wants F = B-W = W).
    """
    order = _Order()
    num_filling = max(num_microbatches, 2 * num_ranks - 1)
    for _ in range(2 * (num_ranks - rank) - 1):
        order.forward(0)
    for _ in range(rank):
        order.forward(1)
        order.forward(0)
    for _ in range(num_ranks - rank):
        order.forward(1)
        order.backward_input(1)
        order.backward_weight(1)
    while order.num_forwards(1) < num_filling:
        if order.num_forwards(0) < num_filling:
            order.forward(0)
        order.backward_input(0)
        order.backward_weight(0)
        order.forward(1)
        order.backward_input(1)
        order.backward_weight(1)
    for _ in range(rank):
        order.backward_input(0)
        order.backward_input(1)
    for _ in range(num_ranks - rank):
        order.backward_input(0)
        order.backward_weight(0)
    for _ in range(rank):
        order.backward_weight(1)
    return tuple(action for action in order.finish() if action.operations[0].microbatch < num_microbatches)


def dualpipe(distance: int, num_levels: int, microbatches_per_chunk: int) -> tuple[Action, ...]:
    """The eight steps of DualPipe and of DualPipeV, which run the same order on differently placed chunks.

    Micro-batches of chunk 0 come from the near end of the pipeline, those of chunk 1 from the far end.

    Args:
        distance: Ranks between this one and the near end, 0..num_levels - 1 (h of the report's notation).
        num_levels: Ranks from an end to where the pipeline folds: P / 2 of DualPipe, P of DualPipeV (H).
        microbatches_per_chunk: Micro-batches of each direction.

    The eight steps are for 2 * num_levels micro-batches of a direction or more. Fewer run in the same order with the
    first ones left out. An operation waits for others of its own micro-batch only, so what is left waits for nothing
    that is gone, and no rank holds more. A pair that has lost one half is the other half alone. To leave out the first
    ones is the shortest of the ways tried (the last ones, those in the middle): what is late in the eight steps has
    the split backward passes that a short pipeline needs.

    The released code runs the first pair of step 4 one after the other on the ranks at the fold; here it is a pair, as
    in the description of the steps. With that the published bubble is exact (see `formulas`), and the step is shorter
    by F + B - F&B where F = B - W, longer by up to F where backward passes are much longer than forward ones.

    Source: DeepSeek-V3 report, section 3.2.1; the steps are those of the released DualPipe code.
    """
    order = _Order()
    num_steady = max(microbatches_per_chunk, 2 * num_levels)
    num_levels_left = num_levels - distance - 1
    for _ in range(2 * num_levels_left):  # 1: F0
        order.forward(0)
    for _ in range(distance + 1):  # 2: F0 F1
        order.forward(0)
        order.forward(1)
    for _ in range(num_levels_left):  # 3: I1 W1 F1
        order.backward_input(1)
        order.backward_weight()
        order.forward(1)
    for _ in range(num_steady - 2 * num_levels + distance + 1):  # 4: F0&B1 F1&B0
        order.pair(0, 1)
        order.pair(1, 0)
    for _ in range(num_levels_left):  # 5: B1 F1&B0
        order.backward(1)
        order.pair(1, 0)
    for index in range(2 * (distance + 1)):  # 6: B1 B0, the second half of them without their weight parts
        (order.backward if index <= distance else order.backward_input)(1 - index % 2)
    for _ in range(num_levels_left):  # 7: W I0
        order.backward_weight()
        order.backward_input(0)
    return _without_first(num_steady - microbatches_per_chunk, order.finish())  # 8: W


def _without_first(number: int, actions: tuple[Action, ...]) -> tuple[Action, ...]:
    """Actions without the first micro-batches of each chunk, and those behind them numbered from 0."""
    left = (tuple(operation._replace(microbatch=operation.microbatch - number) for operation in action.operations
                  if operation.microbatch >= number) for action in actions)
    return tuple(Action(operations) for operations in left if operations)
