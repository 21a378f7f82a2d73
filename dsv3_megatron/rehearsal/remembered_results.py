"""Results of operations on tensors without values, remembered by what goes in.

A fake tensor's result follows from the shapes, strides, dtypes and devices of the operands. Torch works it out in some
hundred microseconds, and a rehearsed rank carries out the same operations for each layer and micro-batch. Here the
first result of each kind is described, and those after it are made by the description:

    fresh   memory of its own, as large as its elements
    view    memory of an operand
    same    an operand itself, into which the operation has written

What cannot be described so (results of other sizes, numbers, changed operands) is left to torch each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from dsv3_megatron.rehearsal.known_values import is_small, tensors_in

_UNFIT_TAGS = {torch.Tag.data_dependent_output, torch.Tag.inplace_view}
# Where a result begins does not follow from where the operand does.
_BY_PLACE = {torch.ops.aten.as_strided.default, torch.ops.aten.view.dtype, torch.ops.aten.as_strided_scatter.default}
_SLICE = torch.ops.aten.slice.Tensor
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, torch.device, str, type(None))


class _Undescribed(Exception):
    """An operand or a result that is not described."""


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One tensor that an operation gives.

    Attributes:
        operand: Number of the operand that the tensor is, or whose memory it has; -1: it has its own.
        is_same: Whether the tensor is that operand.
        shape: Shape of the tensor.
        strides: Strides of the tensor, in elements.
        offset: Elements from the operand's beginning to the tensor's.
        dtype: Dtype of the tensor.
        device: Device of the tensor.
    """

    operand: int
    is_same: bool = False
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Result:
    """What an operation gives.

    Attributes:
        parts: Tensors of the result.
        form: Makes of a list of them what is returned: a tensor, a tuple or a list.
        is_small: Whether values of all of them are kept, if they are known.
        is_on_device: Whether one of them is a GPU's.
        is_fresh: Whether each has memory of its own.
    """

    parts: tuple[TensorResult, ...]
    form: Callable[[list[torch.Tensor]], Any]
    is_small: bool
    is_on_device: bool
    is_fresh: bool = False


class RememberedResults:
    """Results of one process.

    Attributes:
        hits: Operations that were answered by a remembered result.
        misses: Operations that were not.
    """

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self._results: dict[Any, Result | None] = {}
        self._mode: Any = None
        self._noted: dict[torch.device, dict[str, Any]] = {}

    def find(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Result | None]:
        """Look for the result of an operation.

        Returns:
            What the result follows from, None if it has to be asked for each time; and the result, None if it is not
            known or cannot be described.
        """
        found, key = None, None
        if func is _SLICE and type(args[0]) is FakeTensor:
            found = slice_result(args[0], *args[1:])
        elif (places := _number_places(func)) is not None:
            try:
                key = (func, *(_signature(value, index in places) for index, value in enumerate(args)),
                       *((name, _signature(value, name in places)) for name, value in kwargs.items()))
                found = self._results.get(key)
            except _Undescribed:
                key = None
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return key, found

    def note(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Remember what torch gave for what `find` said it follows from."""
        if key is None or key in self._results:
            return
        try:
            self._results[key] = _describe(_operands(args, kwargs), out)
        except _Undescribed:
            self._results[key] = None
        else:
            self._mode = next((part.fake_mode for part in tensors_in(out) if isinstance(part, FakeTensor)), self._mode)

    def made(self, result: Result, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation gives, made by its description."""
        operands = [] if result.is_fresh else _operands(args, kwargs)
        return result.form([self._tensor(part, operands) for part in result.parts])

    def _tensor(self, part: TensorResult, operands: list[torch.Tensor]) -> torch.Tensor:
        if part.is_same:
            return operands[part.operand]
        with torch._C._DisableTorchDispatch():
            if part.operand < 0:
                content = torch.empty_strided(part.shape, part.strides, dtype=part.dtype, device="meta")
            else:
                content = torch.empty_strided((), (), dtype=part.dtype, device="meta")
                operand = operands[part.operand]
                content.set_(operand.untyped_storage(), operand.storage_offset() + part.offset, part.shape,
                             part.strides)
        made = torch.Tensor._make_subclass(FakeTensor, content, False, dispatch_device=True,
                                           device_for_backend_keys=part.device)
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(self._attributes(part.device))
        return made

    def _attributes(self, device: torch.device) -> dict[str, Any]:
        """What torch notes with every new fake tensor of a device, as it does it itself."""
        found = self._noted.get(device)
        if found is None:
            with torch._C._DisableTorchDispatch():
                content = torch.empty((), device="meta")
            found = self._noted[device] = dict(vars(FakeTensor(self._mode, content, device)))
        return found


def slice_result(given: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
                 ) -> Result:
    """A slice, which each offset makes another operation of: so it is computed instead of remembered."""
    shape, strides = list(given.shape), list(given.stride())
    dim %= len(shape)
    first, last, _ = slice(start, end).indices(shape[dim])
    offset = first * strides[dim]
    shape[dim], strides[dim] = len(range(first, max(first, last), step)), strides[dim] * step
    part = TensorResult(0, False, tuple(shape), tuple(strides), offset, given.dtype, given.device)
    return Result((part,), _only, is_small(shape, given.dtype), given.device.type == "cuda")


@functools.cache
def _number_places(func: Any) -> frozenset[int | str] | None:
    """Arguments of an operation that, if numbers, are to compute with, and no shape follows from: places and names.

    None: its result does not follow from its operands' shapes alone.
    """
    if func.namespace not in ("aten", "prims") or func in _BY_PLACE or _UNFIT_TAGS & set(func.tags):
        return None
    numbers = [(index, argument.name) for index, argument in enumerate(func._schema.arguments)
               if str(argument.type) in ("number", "Optional[number]", "Tensor", "Optional[Tensor]")]
    return frozenset(place for pair in numbers for place in pair)


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [*tensors_in(args), *tensors_in(list(kwargs.values()))] if kwargs else list(tensors_in(args))


def _signature(value: Any, is_number: bool = False) -> Any:
    """All that a result can follow from; equal for equal ones alone (1, 1.0 and True are not)."""
    kind = type(value)
    if is_number and kind in (int, float, bool):
        return kind
    if kind is FakeTensor:
        if value.is_conj() or value.is_neg() or value.layout is not torch.strided:
            raise _Undescribed
        return (FakeTensor, value.shape, value.stride(), value.dtype, value.fake_device)
    if kind is int or isinstance(value, _CONSTANTS):
        return value
    if kind is float or kind is bool:
        return kind, value
    if kind is tuple or kind is list:
        return (kind, *map(_signature, value))
    if kind in (torch.Tensor, torch.nn.Parameter):
        return (torch.Tensor, value.shape, value.stride(), value.dtype, value.device)
    raise _Undescribed


def _describe(operands: list[torch.Tensor], out: Any) -> Result:
    if isinstance(out, torch.Tensor):
        parts: list[Any] = [out]
    elif out is None or type(out) in (tuple, list):
        parts = list(out or ())
    else:
        raise _Undescribed
    if not parts and not any(type(operand) is FakeTensor for operand in operands):
        raise _Undescribed
    form: Callable[[list[torch.Tensor]], Any] = (
        _only if isinstance(out, torch.Tensor) else _nothing if out is None else type(out))
    described = tuple(_describe_tensor(operands, part) for part in parts)
    return Result(described, form,
                  all(is_small(part.shape, part.dtype) for part in parts),
                  any(part.device.type == "cuda" for part in parts), all(part.operand < 0 for part in described))


def _only(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0]


def _nothing(parts: list[torch.Tensor]) -> None:
    return None


def _describe_tensor(operands: list[torch.Tensor], part: Any) -> TensorResult:
    if type(part) is not FakeTensor or part.layout is not torch.strided or part.is_conj() or part.is_neg():
        raise _Undescribed
    for number, operand in enumerate(operands):
        if operand is part:
            return TensorResult(number, is_same=True)
    storage, offset = part.untyped_storage(), int(part.storage_offset())
    sharing = [number for number, operand in enumerate(operands)
               if operand.untyped_storage()._cdata == storage._cdata]
    if not sharing:
        with torch._C._DisableTorchDispatch():
            own = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="meta").untyped_storage()
        is_plain = not offset and storage.nbytes() == own.nbytes()
    else:
        # Of two operands in one memory it could be a view of either.
        is_plain = len(sharing) == 1 and type(operands[sharing[0]]) is FakeTensor
        offset -= int(operands[sharing[0]].storage_offset())
    if not is_plain:
        raise _Undescribed
    return TensorResult(sharing[0] if sharing else -1, False, tuple(part.shape), part.stride(), offset, part.dtype,
                        part.fake_device)
