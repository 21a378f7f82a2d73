"""What a rehearsed rank does on its GPU, operation by operation: seen, counted, answered where values are asked for.

Tensors of a GPU are fake: shapes without values or memory. Small tensors of the host are real. Between the two:

    host to device   the copy has the values, if they are few (known_values.py)
    device to host   known values, or ones: the host waits, and this is noted with its line

Usage:
    with fake_mode(), Watch() as watch:
        ...
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_megatron.rehearsal.collective_calls import CollectiveCalls
from dsv3_megatron.rehearsal.kernel_workspaces import workspace_bytes
from dsv3_megatron.rehearsal.known_values import follow, forget, is_small, known, run_on_host, tensors_in, written
from dsv3_megatron.rehearsal.live_memory import LiveMemory
from dsv3_megatron.rehearsal.remembered_results import RememberedResults, Result
from dsv3_megatron.rehearsal.source_lines import source_line

_DEVICE = torch.ops.prim.device.default
# Host memory above this many bytes is fake too: a rehearsed rank may keep gigabytes there.
_LARGE_HOST_BYTES = 64 << 20
# Elements that the host may read of unknown numbers: a step's loads of all experts are among them.
_MAX_READ = 1 << 16
# Operations whose result's size depends on values: the host waits for them on a GPU.
_SIZED_BY_VALUES = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive",
                    "repeat_interleave"}
_NO_KERNEL = {"detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "device",
              "lift_fresh", "record_stream", "is_pinned", "_local_scalar_dense"}


class UnknownSize(RuntimeError):
    """A tensor's size depends on values that a rehearsal does not know."""


@contextlib.contextmanager
def fake_mode() -> Iterator[None]:
    """Let tensors of a GPU have no memory inside the block; real tensors of the host may be among them."""
    before = torch._C._only_lift_cpu_tensors()
    # What torch.tensor(..., device="cuda") makes is then seen on its way to the device.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@dataclass
class PhaseCounts:
    """What is counted in a phase.

    Attributes:
        waits: Number of times that the host waited for the device, by what for and line.
        copies: Copies between host and device that nobody waits for, by way and line.
        assumed: Numbers that the host was given without their being known, all ones, by what read them and line.
        launches: Operations that start at least one kernel, by name.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    assumed: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)


class Watch(TorchDispatchMode):
    """Sees every operation of a process.

    Attributes:
        memory: Device memory.
        collectives: Messages between ranks.
        faults: What a GPU or NCCL would refuse, by text and line.
        counts: What was counted in each phase, by its name.
        now: Counts of the phase under way.
        results: Results of operations that were carried out before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = LiveMemory()
        self.faults: Counter[tuple[str, str]] = Counter()
        self.counts: dict[str, PhaseCounts] = {}
        self.now = PhaseCounts()
        self.results = RememberedResults()
        self.collectives = CollectiveCalls(self.fault)

    def begin(self, phase: str) -> None:
        """Count for another phase from here on."""
        self.now = self.counts[phase] = PhaseCounts()
        self.collectives.phase = phase

    def fault(self, text: str) -> None:
        """Note something that would be an error on a GPU, with the line that does it."""
        self.faults[text, source_line()] += 1

    def wait(self, what: str) -> None:
        """Note that the host waits for the device here."""
        self.now.waits[what, source_line()] += 1

    def launch(self, name: str) -> None:
        """Note that a kernel starts."""
        self.now.launches[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """Carry out an operation: on real tensors as it is, on fake ones by their shapes."""
        if func is _DEVICE and type(args[0]) is FakeTensor:  # autograd asks for it at every turn
            return args[0].fake_device
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self.collectives.carry_out(func, args, kwargs)
        name = func.overloadpacket.__name__
        if name == "lift_fresh":
            return args[0]
        if func.namespace == "aten" and _is_composite(func):
            with self:  # so that its parts are seen, not the whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if self._is_of_host(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return self._read(args[0])
        if name == "record_stream":
            return None
        if name in ("_to_copy", "copy_"):
            answered, out = self._copy(name, func, args, kwargs)
            if answered:
                return out
        elif name in _SIZED_BY_VALUES:
            return self._see(func, args, kwargs, self._sized_by_values(name, func, args, kwargs))
        elif name == "index" and any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1])):
            return self._see(func, args, kwargs, self._index_by_mask(args))
        key, result = self.results.find(func, args, kwargs)
        if result is not None:
            return self._see_again(func, args, kwargs, self.results.made(result, args, kwargs), result)
        out = func(*args, **kwargs)
        self.results.note(key, args, kwargs, out)
        return self._see(func, args, kwargs, out)

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        follow(func, args, kwargs, out)
        is_kernel = False
        for tensor in tensors_in(out):
            if tensor.device.type == "cuda":
                is_kernel = True
                self.memory.see(tensor, func.overloadpacket.__name__)
        self._see_workspace(func, args)
        if _starts_kernel(func):
            if is_kernel or any(tensor.device.type == "cuda" for tensor in written(func, args, kwargs)):
                self.now.launches[func.overloadpacket.__name__] += 1
        return out

    def _see_again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, result: Result) -> Any:
        """Note an operation with a remembered result: what is in its description need not be looked for."""
        if result.is_small:
            follow(func, args, kwargs, out)
        else:
            for tensor in written(func, args, kwargs):
                forget(tensor)
        if result.is_on_device:
            for part, tensor in zip(result.parts, tensors_in(out), strict=True):
                if part.operand < 0:
                    self.memory.see(tensor, func.overloadpacket.__name__)
            self._see_workspace(func, args)
        if _starts_kernel(func):
            if result.is_on_device or any(tensor.device.type == "cuda" for tensor in written(func, args, kwargs)):
                self.now.launches[func.overloadpacket.__name__] += 1
        return out

    # -- host and device -----------------------------------------------------------------------------

    def _see_workspace(self, func: Any, args: tuple[Any, ...]) -> None:
        size = workspace_bytes(func.overloadpacket.__name__, args)
        if size:
            self.memory.pulse(size, f"inside {func.overloadpacket.__name__}")

    def _is_of_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether all operands and results are real tensors of the host."""
        if any(type(arg) is FakeTensor for arg in args):
            return False
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return False
        operands = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
        if operands:
            return all(not isinstance(operand, FakeTensor) and operand.device.type == "cpu" for operand in operands)
        sizes = next((arg for arg in args if isinstance(arg, list | tuple)), ())
        count = 1
        for size in sizes:
            count *= size if isinstance(size, int) else 1
        return count * 8 <= _LARGE_HOST_BYTES

    def _read(self, tensor: torch.Tensor) -> Any:
        """One number for the host."""
        if tensor.device.type == "cuda":
            self.wait("a number is read")
        value = self._values_or_ones(tensor, "a number is read")
        with unset_fake_temporarily():
            return value.item()

    def _values_or_ones(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """The values of a tensor on the CPU; ones where they are unknown, which is noted."""
        value = known(tensor)
        if value is not None:
            return value
        self.now.assumed[what, source_line()] += tensor.numel()
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=tensor.dtype)

    def _copy(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Note a copy between host and device; carry it out if its result is real: (whether it was, the result)."""
        source = args[1] if name == "copy_" else args[0]
        if not isinstance(source, torch.Tensor):
            return False, None
        if name == "copy_":
            target = args[0].device
            is_non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            target = torch.device(kwargs.get("device") or source.device)
            is_non_blocking = bool(kwargs.get("non_blocking", False))
        if source.device.type == target.type:
            return False, None
        way = "device to host" if target.type == "cpu" else "host to device"
        if is_non_blocking:
            self.now.copies[way, source_line()] += 1
        else:
            self.wait(f"a copy {way}")
        if target.type != "cpu":
            if name == "copy_" or isinstance(source, FakeTensor):
                return False, None
            # Torch would take a real tensor's copy for a real one too.
            out = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=target)
            return True, self._see(func, args, kwargs, out)
        if not is_small(source.shape, source.dtype) and source.numel() > _MAX_READ:
            return False, None
        value = self._values_or_ones(source, f"a copy {way}")
        with unset_fake_temporarily():
            if name == "_to_copy":
                return True, value.to(kwargs.get("dtype") or source.dtype, copy=True)
            if not isinstance(args[0], FakeTensor):
                return True, args[0].copy_(value)
        return False, None

    # -- results whose size depends on values ----------------------------------------------------------

    def _sized_by_values(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = next(tensor.device for tensor in tensors_in(args))
        if name == "repeat_interleave" and (kwargs.get("output_size") is not None):
            return func(*args, **kwargs)
        if device.type == "cuda":
            self.wait(name)
        if name == "masked_select":
            return args[0].new_empty(self._count(args[1], name))
        if all(known(operand) is not None for operand in tensors_in(args)):
            values = run_on_host(func, args, kwargs)
            made = [torch.empty(part.shape, dtype=part.dtype, device=device) for part in tensors_in(values)]
            return made[0] if isinstance(values, torch.Tensor) else type(values)(made)
        if name == "bincount" and len(args) > 2 or kwargs.get("minlength"):
            # The usual case: no value is beyond those that are asked for.
            length = kwargs["minlength"] if "minlength" in kwargs else args[2]
            return torch.empty(length, dtype=torch.int64, device=device)
        raise UnknownSize(f"the size of what {name} gives depends on values that a rehearsal does not know "
                          f"({source_line()})")

    def _index_by_mask(self, args: tuple[Any, ...]) -> torch.Tensor:
        """x[mask], where the mask covers x's first dimensions."""
        self.wait("indexing by a mask")
        indices = list(args[1])
        if len(indices) != 1:
            raise UnknownSize(f"indexing by masks among other indices is not rehearsed ({source_line()})")
        mask = indices[0]
        return args[0].new_empty((self._count(mask, "indexing by a mask"), *args[0].shape[mask.dim():]))

    def _count(self, mask: torch.Tensor, name: str) -> int:
        value = known(mask)
        if value is None:
            raise UnknownSize(f"the size of what {name} gives depends on a mask whose values a rehearsal does not know "
                              f"({source_line()})")
        with unset_fake_temporarily():
            return int(value.count_nonzero())


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether a GPU runs the operation as others, without a kernel of its own."""
    return func._can_decompose() and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")


def written_by_kernel(tensors: list[torch.Tensor]) -> None:
    """Note that a kernel may have written into these tensors."""
    for tensor in tensors:
        forget(tensor)


@functools.cache
def _starts_kernel(func: Any) -> bool:
    """Whether a GPU starts a kernel for the operation; one on the host's tensors does not."""
    return func.overloadpacket.__name__ not in _NO_KERNEL and not func.is_view
