"""Messages between ranks, as one rehearsed rank posts them: recorded in order, and answered without any other rank.

What NCCL would refuse is noted as a fault: tensors of the host, or with gaps, dtypes it does not have, splits that do
not fit. Nothing is sent. Where values are known (counts of rows), every rank is taken to have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from dsv3_megatron.rehearsal.known_values import forget, known, remember, tensors_in
from dsv3_megatron.rehearsal.source_lines import source_line

_REFUSED_DTYPES = {torch.int16, torch.uint16, torch.uint32, torch.uint64}
_NAMES = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all", "send": "send", "recv_": "receive", "broadcast_": "broadcast", "barrier": "barrier",
    "allgather_": "all_gather", "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter", "reduce_scatter_": "reduce_scatter", "gather_": "gather",
    "scatter_": "scatter", "reduce_": "reduce", "alltoall_": "all_to_all", "allreduce_coalesced_": "all_reduce",
}


@dataclass(frozen=True)
class RankCall:
    """A message that a rank posts.

    Attributes:
        operation: Name of the kind of message, such as "all_reduce".
        ranks: Global ranks of the group, in its order.
        number: Which group of these ranks it is, in the order in which they were made; 0 is the first.
        dtype: Dtype of the tensors.
        sizes: Elements of each tensor that is given; for "all_to_all" the splits, sent and received.
        peer: Global rank of the other side of a "send" or "receive", or of the root of a "broadcast"; None: nobody's.
        num_bytes: Bytes that this rank gives.
        line: Line of the library.
        phase: What the rank did, one of `rank_results.PHASES`.
    """

    operation: str
    ranks: tuple[int, ...]
    number: int
    dtype: str
    sizes: tuple[tuple[int, ...], ...]
    peer: int | None
    num_bytes: int
    line: str
    phase: str

    @property
    def group(self) -> tuple[tuple[int, ...], int]:
        """The group: its ranks, and which of these ranks' groups it is."""
        return self.ranks, self.number

    def describe(self) -> str:
        """The message in words, without its line."""
        if self.operation == "all_to_all":
            size = f"{sum(self.sizes[0])} elements out, {sum(self.sizes[1])} in"
        else:
            size = f"{sum(map(sum, self.sizes))} elements"
        to = {"send": " to rank", "receive": " from rank"}.get(self.operation, " from rank")
        return f"{self.operation} of {size}, {self.dtype}" + ("" if self.peer is None else f"{to} {self.peer}")


def calls_as_json(calls: Sequence[RankCall]) -> dict[str, Any]:
    """Calls as plain values, each group once."""
    groups = list(dict.fromkeys(call.group for call in calls))
    places = {group: place for place, group in enumerate(groups)}
    return {"groups": [[list(ranks), number] for ranks, number in groups],
            "calls": [[call.operation, places[call.group], call.dtype, call.sizes, call.peer, call.num_bytes, call.line,
                       call.phase] for call in calls]}


def calls_of_json(content: dict[str, Any]) -> list[RankCall]:
    """The calls that `calls_as_json` wrote."""
    groups = [(tuple(ranks), number) for ranks, number in content["groups"]]
    return [RankCall(operation, groups[group][0], groups[group][1], dtype, tuple(tuple(size) for size in sizes), peer,
                 num_bytes, line, phase)
            for operation, group, dtype, sizes, peer, num_bytes, line, phase in content["calls"]]


class CollectiveCalls:
    """The messages of a process.

    Attributes:
        calls: Messages in the order of posting.
        phase: What the rank does now; noted with each message.
    """

    def __init__(self, fault: Callable[[str], None]) -> None:
        self.calls: list[RankCall] = []
        self.phase = ""
        self._fault = fault
        self._numbers: dict[str, int] = {}
        self._known_groups: dict[tuple[int, ...], int] = {}
        self._ranks: dict[str, tuple[int, ...]] = {}

    def group_made(self, group: Any) -> None:
        """Number a group among those of the same ranks; called for each when it is made."""
        name = group.group_name
        if name not in self._numbers:
            ranks = tuple(torch.distributed.get_process_group_ranks(group))
            self._ranks[name] = ranks
            self._numbers[name] = self._known_groups.get(ranks, 0)
            self._known_groups[ranks] = self._numbers[name] + 1

    def forget_groups(self) -> None:
        """Number groups from 0 again: the process begins anew."""
        self._numbers, self._known_groups, self._ranks = {}, {}, {}

    def record(self, operation: str, group: Any, dtype: str, sizes: tuple[tuple[int, ...], ...], *,
               peer: int | None = None, num_bytes: int = 0) -> None:
        """Note a message that is posted on a group."""
        self.group_made(group)
        name = group.group_name
        self.calls.append(RankCall(operation, self._ranks[name], self._numbers[name], dtype, sizes, peer, num_bytes,
                               source_line(), self.phase))

    def carry_out(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a message and answer it."""
        name = func.overloadpacket.__name__
        group = next(found for found in (_group(arg) for arg in args) if found is not None)
        tensors = list(tensors_in(args))
        operation = _NAMES.get(name, name)
        if operation != "barrier":
            self._check(operation, tensors)
        given, sizes = self._given(name, args, tensors)
        peer = self._peer(name, args, group)
        self.record(operation, group, ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in given})),
                    sizes, peer=peer, num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in given))
        if name == "alltoall_base_":
            self._check_splits(args, group)
        out = _post(func, args, kwargs)
        _answer(name, args, group)
        return out

    def _check(self, operation: str, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            shape = tuple(tensor.shape)
            if tensor.device.type != "cuda":
                self._fault(f"{operation} of a tensor of the {tensor.device.type} {shape}: NCCL takes a GPU's alone")
            elif not tensor.is_contiguous():
                self._fault(f"{operation} of a tensor with gaps {shape}, strides {tuple(tensor.stride())}: NCCL takes "
                            "contiguous ones")
            elif tensor.dtype in _REFUSED_DTYPES:
                self._fault(f"{operation} of {tensor.dtype} {shape}: NCCL has no such dtype")

    def _check_splits(self, args: tuple[Any, ...], group: Any) -> None:
        output, given, _, output_splits, input_splits = args[:5]
        for tensor, splits, way in ((output, output_splits, "received"), (given, input_splits, "sent")):
            if splits and (sum(splits) != tensor.shape[0] or len(splits) != group.size()):
                self._fault(f"all_to_all of {tensor.shape[0]} rows {way}, whose {len(splits)} splits sum up to "
                            f"{sum(splits)}, in a group of {group.size()}")

    def _given(self, name: str, args: tuple[Any, ...], tensors: list[torch.Tensor]
               ) -> tuple[list[torch.Tensor], tuple[tuple[int, ...], ...]]:
        """The tensors that count, and their sizes as they are compared between ranks."""
        if name == "barrier":
            return [], ()
        if name == "alltoall_base_":
            output, given, group = args[0], args[1], _group(args[2])
            assert group is not None
            width = given.numel() // max(given.shape[0], 1) if given.dim() else 1
            parts = [splits or [tensor.shape[0] // group.size()] * group.size()
                     for tensor, splits in ((given, args[4]), (output, args[3]))]
            return [given], tuple(tuple(int(rows) * width for rows in splits) for splits in parts)
        if name in ("_allgather_base_", "allgather_into_tensor_coalesced_", "_reduce_scatter_base_",
                    "reduce_scatter_tensor_coalesced_", "allgather_", "reduce_scatter_"):
            tensors = list(tensors_in(args[1]))
        return tensors, tuple((tensor.numel(),) for tensor in tensors)

    def _peer(self, name: str, args: tuple[Any, ...], group: Any) -> int | None:
        ranks = torch.distributed.get_process_group_ranks(group)
        if name in ("send", "recv_"):
            return ranks[args[2]]
        return ranks[args[2]] if name == "broadcast_" else None


def _group(value: Any) -> Any:
    """The process group that an argument is; None if it is something else."""
    if not isinstance(value, torch.ScriptObject):
        return None
    try:
        return torch.distributed.ProcessGroup.unbox(value)
    except RuntimeError:  # another object of torch's, such as a kind of reduction
        return None


def _post(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give the message to torch's group without other ranks; several at once one by one, which it has not."""
    one_by_one = {"allgather_into_tensor_coalesced_": torch.ops.c10d._allgather_base_.default,
                  "reduce_scatter_tensor_coalesced_": torch.ops.c10d._reduce_scatter_base_.default}
    single = one_by_one.get(func.overloadpacket.__name__)
    if single is None:
        return func(*args, **kwargs)
    work = None
    for output, given in zip(args[0], args[1], strict=True):
        rest = (args[2], args[3], False) if "reduce" in func.overloadpacket.__name__ else (args[2], False)
        _, work = single(output, given, *rest)
    return work


def _answer(name: str, args: tuple[Any, ...], group: Any) -> None:
    """Let what comes back be known where every rank's part is: all are taken to have given the same."""
    size, is_sum = group.size(), False
    if name == "_allgather_base_":
        pairs = [(args[0], args[1])]
    elif name == "allreduce_":
        # A loss is the last stage's alone: a sum of numbers that are no counts is not taken for so many times this one.
        is_sum = not any(word in _reduction(args) for word in ("MAX", "MIN", "AVG"))
        pairs = [(tensor, tensor) for tensor in args[0] if not (is_sum and tensor.is_floating_point())]
    elif name == "broadcast_":
        return
    else:
        pairs = []
    answered = []
    for target, source in pairs:
        value = known(source)
        if value is None or not isinstance(target, FakeTensor):
            continue
        with unset_fake_temporarily():
            if name == "_allgather_base_":
                value = value.reshape(-1).repeat(size).reshape(target.shape)
            elif is_sum:
                value = value * size
            value = value.clone()
        forget(target)
        remember(target, value)
        answered.append(target)
    for tensor in tensors_in(args[0] if name != "send" else ()):
        if isinstance(tensor, FakeTensor) and not any(tensor is target for target in answered):
            forget(tensor)


def _reduction(args: tuple[Any, ...]) -> str:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return str(torch.distributed.ReduceOp.unbox(arg).op)
            except (AttributeError, RuntimeError):
                continue
    return ""
