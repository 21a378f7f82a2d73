"""Megatron-Core on a machine without CUDA: every stand-in, with the call of Megatron-Core that needs it.

Megatron-Core 0.19 names CUDA in places where any device would do: buffers created with
`device="cuda"`, streams and events around work that is synchronous on a CPU, checks of a tensor's
type by name. Each such place is answered by one entry of `STAND_INS`. They are installed by
`dsv3_megatron.platform.prepare()` only where `torch.cuda.is_available()` is false, once, and can be
taken back for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_CPU = torch.device("cpu")


class CpuStream:
    """A stream on a device that finishes each operation before the next begins."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None:
        """Do nothing: no other stream has work that could be waited for."""

    def wait_event(self, event: Any) -> None:
        """Do nothing: an event's work is done when it is recorded."""

    def synchronize(self) -> None:
        """Do nothing: all work is done when its call returns."""

    def query(self) -> bool:
        """Say that all work is done."""
        return True

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event that has already happened."""
        return event or CpuEvent()


class CpuEvent:
    """An event that has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Do nothing: no stream has work to mark."""

    def wait(self, stream: Any = None) -> None:
        """Do nothing: the event's work is done."""

    def synchronize(self) -> None:
        """Do nothing: the event's work is done."""

    def query(self) -> bool:
        """Say that the event's work is done."""
        return True


_THE_STREAM = CpuStream()


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    yield


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a factory, with a CUDA device in its arguments read as the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _type_as_if_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.type()` with the name a CUDA tensor would have; conversions as before."""

    @functools.wraps(original)
    def type_name(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, non_blocking, **kwargs)
        # "torch.FloatTensor" -> "torch.cuda.FloatTensor", by which Megatron-Core tells fp32 parameters from bf16 ones.
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_name


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def _nothing() -> Callable[..., None]:
    """A new function that does nothing; torch._dynamo wants each of its known functions to be another object."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return nothing


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return (lambda inner: inner) if function is None else function


def _split_sizes_as_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    """`maybe_move_tensor_to_cpu` that also turns a tensor which is on the CPU already into numpy."""

    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


def _gather_of_any_sizes(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`_gather_along_first_dim` where ranks hold different numbers of rows: padded to the largest."""

    @functools.wraps(original)
    def gather(input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
               ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather


def _reduce_scatter_of_any_sizes(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`_reduce_scatter_along_first_dim` where ranks get different numbers of rows: summed everywhere, then cut."""

    @functools.wraps(original)
    def reduce_scatter(input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any
                       ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, *args, **kwargs)
        summed = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed, group=group)
        return summed.split([int(size) for size in input_split_sizes])[group.rank()].clone()

    return reduce_scatter


def _unless_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """A reduce-scatter or all-gather between views of one buffer that does nothing in a group of one."""

    @functools.wraps(original)
    def collective(*args: Any, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
        if group is not None and group.size() == 1 and not async_op:
            return None
        return original(*args, group=group, async_op=async_op, **kwargs)

    return collective


def _gathers_apart(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_coalescing_manager` of which all-gathers become messages of their own.

    gloo's joined all-gather, while another collective of its group is under way, frees a buffer's record twice or
    hangs (torch 2.15); a plain one does not.
    """

    @contextlib.contextmanager
    def manager(group: Any, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        with original(group, device, async_ops) as handles:
            yield handles
            # A manager's calls are all of one kind. torch renamed this one in 2.15.
            waiting = torch.distributed.distributed_c10d._world.pg_coalesce_state[group]
            is_gather = any(call.op.__name__ in ("all_gather_into_tensor", "all_gather_single") for call in waiting)
            gathers = list(waiting) if is_gather else []
            if gathers:
                waiting.clear()
        for call in gathers:
            assert call.dst_tensor is not None
            handle = torch.distributed.all_gather_into_tensor(call.dst_tensor, call.tensor, group=group,
                                                              async_op=async_ops)
            if async_ops:
                handles.append(handle)

    return manager


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


@dataclass(frozen=True)
class StandIn:
    """An attribute that is replaced on machines without CUDA.

    Attributes:
        owner: The object that has the attribute, or the name of its module, imported when installed.
        name: The attribute.
        replacement: Value to put in the attribute's place, or a function of the original where `wraps` is set.
        needed_by: Calls of Megatron-Core 0.19 that need it: "module below megatron.core:class or function".
            A test looks each of them up and finds the attribute in it.
        reason: What the call does that a machine without CUDA cannot.
        wraps: Whether `replacement` is applied to the original.
    """

    owner: Any
    name: str
    replacement: Any
    needed_by: tuple[str, ...]
    reason: str
    wraps: bool = False


# Attributes of modules of Megatron-Core come last: importing them must already find torch's replaced.
STAND_INS: tuple[StandIn, ...] = (
    StandIn(torch.cuda, "current_device", lambda: _CPU,
            ("tensor_parallel.layers:ColumnParallelLinear", "tensor_parallel.layers:VocabParallelEmbedding",
             "distributed.param_and_grad_buffer:_ParamAndGradBuffer",
             "pipeline_parallel.p2p_communication:P2PCommunicator",
             "optimizer.distrib_optimizer:DistributedOptimizer"),
            "is the device of weights, gradient buffers and received activations"),
    StandIn(torch.cuda, "synchronize", _nothing(),
            ("pipeline_parallel.p2p_communication:P2PCommunicator",
             "dist_checkpointing.strategies.fully_parallel:FullyParallelLoadStrategyWrapper"),
            "waits for the device"),
    StandIn(torch.cuda, "Stream", CpuStream,
            ("transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher", "pipeline_parallel.utils:set_streams"),
            "is made whether it will be used or not"),
    StandIn(torch.cuda, "Event", CpuEvent,
            ("models.common.model_chunk_schedule_plan:TransformerModelChunkSchedulePlan",),
            "orders the two streams of an overlapped forward and backward"),
    StandIn(torch.cuda, "stream", _stream_context,
            ("pipeline_parallel.utils:ScheduleNode", "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher"),
            "is entered around every part of an overlapped chunk, and around copies of split sizes"),
    StandIn(torch.cuda, "current_stream", lambda *_: _THE_STREAM,
            ("distributed.param_and_grad_buffer:_ParamAndGradBucketGroup", "pipeline_parallel.utils:get_comp_stream",
             "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher"),
            "is asked for before every reduction of gradients"),
    StandIn(torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed) and None,
            ("tensor_parallel.random:CudaRNGStatesTracker", "tensor_parallel.random:model_parallel_cuda_manual_seed"),
            "seeds the generator whose states the trackers keep; on a CPU that is torch's default one"),
    StandIn(torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state(),
            ("tensor_parallel.random:CudaRNGStatesTracker",), "reads that generator"),
    StandIn(torch.cuda.random, "get_rng_state", lambda *_, **__: torch.get_rng_state(),
            ("tensor_parallel.random:_get_cuda_rng_state",), "reads that generator"),
    StandIn(torch.Tensor, "cuda", _itself,
            ("models.common.language_module.language_module:LanguageModule",
             "optimizer.distrib_optimizer:DistributedOptimizer", "dist_checkpointing.exchange_utils"),
            "moves what a collective is to send"),
    StandIn(torch.Tensor, "record_stream", _nothing(),
            ("pipeline_parallel.utils:ScheduleNode", "pipeline_parallel.combined_1f1b"),
            "keeps a tensor's memory until another stream is done with it"),
    StandIn(torch.Tensor, "type", _type_as_if_cuda,
            ("optimizer.distrib_optimizer:DistributedOptimizer", "optimizer.clip_grads:clip_grad_by_total_norm_fp32"),
            "is compared with 'torch.cuda.FloatTensor'", wraps=True),
    *(StandIn(torch, factory, _on_cpu, needed_by, "creates with device='cuda'", wraps=True)
      for factory, needed_by in (
          ("tensor", ("optimizer.clip_grads:get_grad_norm_fp32", "optimizer.optimizer:MixedPrecisionOptimizer",
                      "optimizer.optimizer:FP32Optimizer")),
          ("zeros", ("pipeline_parallel.schedules:forward_backward_no_pipelining",
                     "pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
                     "pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving")),
          ("empty", ("dist_checkpointing.exchange_utils",)),
          ("empty_like", ("dist_checkpointing.exchange_utils",)))),
    StandIn(torch, "compile", _uncompiled, ("jit",),
            "compiles element-wise functions at import; on a CPU that needs a C++ compiler and seconds at start-up for "
            "functions this library does not use"),
    StandIn("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state,
            ("tensor_parallel.random:CudaRNGStatesTracker",), "writes the state through a function of CUDA builds"),
    StandIn("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _split_sizes_as_numpy,
            ("transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher",),
            "makes the split sizes of an all-to-all numpy only if they came from a GPU; gloo wants integers",
            wraps=True),
    StandIn("megatron.core.tensor_parallel.mappings", "_gather_along_first_dim", _gather_of_any_sizes,
            ("tensor_parallel.mappings:_GatherFromSequenceParallelRegion",
             "tensor_parallel.mappings:_ReduceScatterToSequenceParallelRegion"),
            "gathers the rows of expert-tensor ranks, whose numbers differ; gloo wants equal ones", wraps=True),
    StandIn("megatron.core.tensor_parallel.mappings", "_reduce_scatter_along_first_dim", _reduce_scatter_of_any_sizes,
            ("tensor_parallel.mappings:_GatherFromSequenceParallelRegion",
             "tensor_parallel.mappings:_ReduceScatterToSequenceParallelRegion"),
            "the same on the way back", wraps=True),
    *(StandIn("megatron.core.distributed.param_and_grad_buffer", collective, _unless_alone,
              ("distributed.param_and_grad_buffer:_ParamAndGradBucketGroup",),
              "copies a whole gradient or parameter buffer onto itself where a rank has no replica; NCCL sees that "
              "it is in place, gloo copies", wraps=True)
      for collective in ("dist_reduce_scatter_func", "dist_all_gather_func")),
    StandIn("megatron.core.distributed.param_and_grad_buffer", "_coalescing_manager", _gathers_apart,
            ("distributed.param_and_grad_buffer:_ParamAndGradBucketGroup",),
            "joins all-gathers, which ends gloo's threads where others of the group are under way", wraps=True),
)

_originals: list[tuple[Any, str, Any]] = []


def install_stand_ins() -> None:
    """Install every stand-in, unless they are installed already.

    Raises:
        RuntimeError: CUDA is available, so nothing may be replaced.
    """
    if torch.cuda.is_available():
        raise RuntimeError("stand-ins for CUDA are for machines without it; this one has CUDA")
    if _originals:
        return
    # Transformer Engine's modules and its fused optimizer need CUDA; Megatron-Core takes them where they import.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    # torch notes which functions `with torch.device(...)` acts on at its first use: they must be the originals.
    with _CPU:
        torch.empty(0)
    for stand_in in STAND_INS:
        owner = importlib.import_module(stand_in.owner) if isinstance(stand_in.owner, str) else stand_in.owner
        original = getattr(owner, stand_in.name)
        _originals.append((owner, stand_in.name, original))
        setattr(owner, stand_in.name, stand_in.replacement(original) if stand_in.wraps else stand_in.replacement)


def remove_stand_ins() -> None:
    """Take every stand-in back, for tests."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    if sys.modules.get("transformer_engine", _CPU) is None:
        del sys.modules["transformer_engine"]


def installed() -> bool:
    """Whether the stand-ins are in place."""
    return bool(_originals)
