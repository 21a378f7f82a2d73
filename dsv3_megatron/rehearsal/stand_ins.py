"""What a rehearsed rank has in place of a cluster and a GPU: every replacement, with the reason for it.

All else is the run's own code. The CUDA runtime is replaced beneath torch (`device_library.py`), tensors by `watch.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3_megatron.rehearsal.known_values import remember
from dsv3_megatron.rehearsal.live_memory import FP8_WEIGHTS
from dsv3_megatron.rehearsal.made_data import make_current_data
from dsv3_megatron.rehearsal.made_routing import made_routing
from dsv3_megatron.rehearsal.replacement import Replacement, nothing, replaced
from dsv3_megatron.rehearsal.watch import Watch, written_by_kernel


@dataclass
class GroupCount:
    """Process groups as a rank makes them.

    Attributes:
        calls: Calls of new_group, which all ranks of the world or of the group make.
        joined: Groups that this rank is in, with the world.
        alone: Groups in which this rank is alone.
    """

    calls: int = 0
    joined: int = 0
    alone: int = 0


def replacements(watch: Watch, groups: GroupCount, *, rank: int, world_size: int, imbalance: float
                 ) -> tuple[Replacement, ...]:
    """Everything that is replaced, for one rank."""
    cluster = (
        Replacement("dsv3_megatron.parallel.groups", "meet_ranks", lambda original: nothing,
                    "waits for the other ranks, which do not exist"),
        Replacement(torch.distributed, "init_process_group", _fake_world(watch, groups, rank, world_size),
                    "connects to the other ranks"),
        Replacement(torch.distributed, "new_group", _fake_group(watch, groups),
                    "makes NCCL's communicators; counted here"),
        Replacement("dsv3_megatron.checkpoint.agreement", "on_first_rank", _here(watch),
                    "has rank 0 act and tell the others; here this rank acts for it", is_everywhere=True),
        Replacement(torch.distributed, "all_gather_object", _own_object(watch),
                    "sends pickled objects, whose bytes a fake tensor does not hold; all ranks are taken to have this "
                    "one's"),
        Replacement(torch.distributed, "broadcast_object_list", _kept_objects(watch), "likewise"),
        Replacement("dsv3_megatron.runs.trainer", "open_current_data", lambda original: make_current_data,
                    "reads files that a rehearsal need not have"),
    )
    device = (
        Replacement(torch, "compile", lambda original: _uncompiled,
                    "traces functions itself, which it cannot beneath another mode; what is not fused keeps more "
                    "memory for a moment"),
        Replacement(torch.nn.Module, "_apply", lambda original: _apply,
                    "swaps a fake parameter's contents, which torch refuses"),
        Replacement(torch, "tensor", lambda original: functools.partial(_tensor, original),
                    "reads the numbers of tensors in a list without asking them, and in a thread of autograd copies to "
                    "the device unseen; here each number is asked for, and the copy is seen"),
        Replacement(FakeTensor, "tolist", lambda original: _tolist,
                    "asks a fake tensor for one number after the other; on a GPU it copies them all at once"),
        Replacement(torch.Tensor, "data_ptr", _address, "gives an address, which a fake tensor has not"),
        Replacement("triton.runtime.jit.JITFunction", "run", _launch(watch), "compiles a kernel and starts it"),
        *(Replacement(owner, "synchronize", _waits(watch, what), "waits for the device; noted here")
          for owner, what in ((torch.cuda, "for the device"), (torch.cuda.Stream, "for a stream"),
                              (torch.cuda.Event, "for an event"))),
        Replacement("dsv3_megatron.optim.ema", "ThreadPoolExecutor", lambda original: _AtOnce,
                    "takes the weights in beside the step; a mode of fake tensors is one thread's"),
        Replacement("dsv3_megatron.schedule.execute.Executor", "run", _with_passes(watch),
                    "runs passes without saying when; noted here"),
        Replacement("dsv3_megatron.schedule.transport._Arrival", "__init__", _on_the_way(watch),
                    "says nobody what is on its way between pipeline ranks; noted here"),
        Replacement("dsv3_megatron.schedule.transport._Arrival", "wait", _arrived(watch), "likewise"),
        Replacement("dsv3_megatron.schedule.transport.PipelineChannels", "isend", _sent(watch),
                    "gives what is complete at once without another rank; on a GPU a send waits for the other side, "
                    "and here for the next one to it"),
        Replacement("dsv3_megatron.ops.fp8.held_weights", "quantized_weight", _held(watch),
                    "says nobody what it holds; noted here", is_everywhere=True),
        Replacement("dsv3_megatron.model.router.DeepSeekRouter", "best_experts", _routing(imbalance),
                    "chooses experts by values; the operations are carried out, their result is made up"),
    )
    return (*cluster, *device)


def while_importing() -> contextlib.AbstractContextManager[None]:
    """A block in which modules are imported before ranks are forked."""
    return replaced((Replacement(torch.cuda, "is_available", lambda original: lambda: True,
                                 "asks the CUDA runtime, after which torch takes no fork"),))


class _AtOnce:
    """An executor that has done its work when `submit` returns."""

    def __init__(self, **_: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args))
        return done


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return (lambda inner: inner) if function is None else function


# -- the cluster ---------------------------------------------------------------------------------------


def _fake_world(watch: Watch, groups: GroupCount, rank: int, world_size: int) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def init_process_group(*_: Any, **__: Any) -> None:
            original("fake", store=FakeStore(), rank=rank, world_size=world_size)
            watch.collectives.forget_groups()
            watch.collectives.group_made(torch.distributed.GroupMember.WORLD)
            groups.joined += 1

        return init_process_group

    return make


def _fake_group(watch: Watch, groups: GroupCount) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def new_group(ranks: Any = None, *_: Any, group_desc: Any = None, use_local_synchronization: bool = False,
                      **__: Any) -> Any:
            group = original(ranks, group_desc=group_desc, use_local_synchronization=use_local_synchronization)
            groups.calls += 1
            if isinstance(group, torch.distributed.ProcessGroup):
                watch.collectives.group_made(group)
                groups.joined += 1
                groups.alone += group.size() == 1
            return group

        return new_group

    return make


def _here(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def on_first_rank(action: Callable[[], Any], subject: str) -> Any:
            watch.collectives.record("broadcast of objects", torch.distributed.GroupMember.WORLD, "object", ())
            return action()

        return on_first_rank

    return make


def _own_object(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
            watch.collectives.record("all_gather of objects", group or torch.distributed.GroupMember.WORLD, "object",
                                     ())
            object_list[:] = [obj] * len(object_list)

        return all_gather_object

    return make


def _kept_objects(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def broadcast_object_list(object_list: list[Any], src: Any = None, group: Any = None, **_: Any) -> None:
            watch.collectives.record("broadcast of objects", group or torch.distributed.GroupMember.WORLD, "object",
                                     ())

        return broadcast_object_list

    return make


# -- the device ----------------------------------------------------------------------------------------


def _apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
    """Apply a function to a module's parameters and buffers, each put in the place of the one before."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed = fn(parameter)
        if changed is not parameter:
            made = torch.nn.Parameter(changed, parameter.requires_grad)
            made.__dict__.update({key: value for key, value in parameter.__dict__.items() if key not in made.__dict__})
            self._parameters[name] = made
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _tensor(original: Any, data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any
            ) -> torch.Tensor:
    def plain(value: Any) -> Any:
        if isinstance(value, FakeTensor) and not value.dim():
            return value.item()
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    made = original(plain(data), *args, **kwargs)
    return (made if device is None else made.to(device)).requires_grad_(requires_grad)


def _tolist(self: torch.Tensor) -> Any:
    copied = self.cpu()
    if isinstance(copied, FakeTensor):  # too large for its values to be kept
        with unset_fake_temporarily():
            copied = torch.ones(copied.shape, dtype=copied.dtype)
    return torch.Tensor.tolist(copied)


def _address(original: Any) -> Any:
    @functools.wraps(original)
    def data_ptr(self: torch.Tensor) -> int:
        if not isinstance(self, FakeTensor):
            return original(self)
        # Different for tensors of different memory, and a multiple of what an allocator gives.
        return (self.untyped_storage()._cdata << 9) + self.storage_offset() * self.element_size()

    return data_ptr


def _launch(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def run(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
            name = self.fn.__name__
            watch.launch(f"triton {name}")
            operands = [getattr(value, "base", value) for value in (*args, *kwargs.values())]
            tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
            for tensor in tensors:
                if tensor.device.type != "cuda":
                    watch.fault(f"the kernel {name} is given a tensor of the {tensor.device.type} "
                                f"{tuple(tensor.shape)}: it takes a GPU's alone")
            written_by_kernel([tensor for tensor in tensors if isinstance(tensor, FakeTensor)])

        return run

    return make


def _waits(watch: Watch, what: str) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def synchronize(*_: Any, **__: Any) -> None:
            watch.wait(what)

        return synchronize

    return make


def _routing(imbalance: float) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def best_experts(self: Any, scores_TE: torch.Tensor) -> torch.Tensor:
            ids_TK = original(self, scores_TE)
            config = self.config
            with unset_fake_temporarily():
                remember(ids_TK, made_routing(
                    len(scores_TE), experts=config.num_moe_experts, top_k=config.moe_router_topk,
                    ep=config.expert_model_parallel_size, imbalance=imbalance))
            return ids_TK

        return best_experts

    return make


# -- what memory is --------------------------------------------------------------------------------------


class _Passes:
    """A recorder of an executor that notes when passes begin."""

    def __init__(self, watch: Watch, inner: Any) -> None:
        self._watch, self._inner = watch, inner

    def begin(self, action: Any) -> None:
        self._watch.memory.begin_pass()
        if self._inner is not None:
            self._inner.begin(action)

    def end(self, action: Any) -> None:
        if self._inner is not None:
            self._inner.end(action)


def _with_passes(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def run(self: Any, runners: Any, recorder: Any = None) -> None:
            original(self, runners, _Passes(watch, recorder))

        return run

    return make


def _on_the_way(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, work: Any, tensor: torch.Tensor) -> None:
            original(self, work, tensor)
            watch.memory.receive(tensor)

        return __init__

    return make


def _arrived(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def wait(self: Any) -> torch.Tensor:
            tensor = original(self)
            watch.memory.arrived(tensor)
            return tensor

        return wait

    return make


class _Sending:
    """A send that is complete once the next one to the same rank is posted, or is waited for."""

    def __init__(self) -> None:
        self._is_complete = False

    def is_completed(self) -> bool:
        return self._is_complete

    def wait(self) -> bool:
        self._is_complete = True
        return True


def _sent(watch: Watch) -> Callable[[Any], Any]:
    last: dict[int, _Sending] = {}

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def isend(self: Any, tensor: torch.Tensor, destination: int) -> _Sending:
            original(self, tensor, destination)
            if destination in last:
                last[destination].wait()
            last[destination] = _Sending()
            watch.memory.sent(tensor)
            return last[destination]

        return isend

    return make


def _held(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def quantized_weight(*args: Any, **kwargs: Any) -> Any:
            held = original(*args, **kwargs)
            for part in vars(held).values():
                if isinstance(part, torch.Tensor):
                    watch.memory.name(part, FP8_WEIGHTS)
            return held

        return quantized_weight

    return make
