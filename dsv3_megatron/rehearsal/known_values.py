"""Values of small tensors that have none: what a rehearsal can know without computing the model.

A rehearsed GPU's tensors have shapes and no values. A run's host reads some of them all the same: how many rows go to
which expert, how many tokens count. Those numbers come from few sources (zeros, ranges, copies from the host, the
choice of experts, which the rehearsal makes up) by few operations, so each operation whose operands are all known is
carried out on the CPU too, and its result is remembered with the tensor.

A value is forgotten when anything unknown is written into the tensor's memory, by whatever view of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

# Elements of a tensor whose values are kept: routing maps of integers and truths; of others, a few sums.
MAX_COUNTS, MAX_NUMBERS = 1 << 22, 1 << 12
_FRESH = "_dsv3_writes"
_KNOWN = "_dsv3_known"
_WHOLE = "_dsv3_whole"
# Results without values, or with values that depend on a generator.
_UNKNOWABLE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "resize_"}
# Results that depend on their operand's shape alone.
_CONSTANTS = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}
_OVERWRITES = {"copy_", "fill_", "zero_"}


def is_small(shape: Iterable[int], dtype: torch.dtype) -> bool:
    """Whether values of such a tensor are kept."""
    size = 1
    for length in shape:
        size *= int(length)
    return size <= (MAX_NUMBERS if dtype.is_floating_point or dtype.is_complex else MAX_COUNTS)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments or results, those in lists too."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def _writes(tensor: torch.Tensor) -> int:
    return getattr(tensor.untyped_storage(), _FRESH, 0)


def forget(tensor: torch.Tensor) -> None:
    """Something unknown was written into a tensor's memory."""
    storage = tensor.untyped_storage()
    writes = getattr(storage, _FRESH, None)
    if writes is not None:  # of other memory nothing is known
        setattr(storage, _FRESH, writes + 1)


def remember(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Let a fake tensor have the values of a real one on the CPU, of its shape and dtype."""
    assert not isinstance(value, FakeTensor), "values are real"
    assert tensor.shape == value.shape and tensor.dtype == value.dtype, (tensor.shape, value.shape)
    storage = tensor.untyped_storage()
    writes = getattr(storage, _FRESH, None)
    if writes is None:
        writes = 0
        setattr(storage, _FRESH, 0)
    setattr(tensor, _KNOWN, (value, writes))
    if _fills_memory(tensor):
        with unset_fake_temporarily():
            setattr(storage, _WHOLE, (value.reshape(-1), writes))


def known(tensor: torch.Tensor) -> torch.Tensor | None:
    """The values of a tensor, on the CPU: its own if it is real, None if they are unknown."""
    if not isinstance(tensor, FakeTensor):
        return tensor if tensor.device.type == "cpu" else None
    value, writes = getattr(tensor, _KNOWN, (None, 0))
    if value is not None and writes == _writes(tensor):
        return value
    # What was written through another view of the same memory, all of it.
    whole, writes = getattr(tensor.untyped_storage(), _WHOLE, (None, 0))
    if whole is None or writes != _writes(tensor) or whole.dtype != tensor.dtype or not _fills_memory(tensor):
        return None
    with unset_fake_temporarily():
        return whole.view(tensor.shape)


def _fills_memory(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes into, by its schema."""
    found: list[torch.Tensor] = []
    for index, name in _written_places(func):
        found += tensors_in(args[index] if index < len(args) else kwargs.get(name))
    return found


@functools.cache
def _written_places(func: Any) -> tuple[tuple[int, str], ...]:
    """Numbers and names of the arguments that an operation writes into."""
    return tuple((index, argument.name) for index, argument in enumerate(func._schema.arguments)
                 if argument.alias_info is not None and argument.alias_info.is_write)


def follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Carry out on the known values what was carried out on tensors without values.

    Args:
        func: The operation.
        args: Arguments of the operation.
        kwargs: Arguments of the operation by name.
        out: Result of the operation, tensors without values.
    """
    targets = written(func, args, kwargs)
    name = func.overloadpacket.__name__
    if name in _OVERWRITES and targets and _overwrite(name, targets[0], args):
        return
    value = _value_of(func, args, kwargs, out)
    if value is None:
        for tensor in targets:
            forget(tensor)
        return
    for tensor, part in zip(tensors_in(out), tensors_in(value), strict=True):
        if isinstance(tensor, FakeTensor) and not any(tensor is target for target in targets):
            remember(tensor, part)


def _overwrite(name: str, target: torch.Tensor, args: tuple[Any, ...]) -> bool:
    """A tensor that fills its memory is known again once all of it is overwritten by what is known."""
    if not isinstance(target, FakeTensor) or not is_small(target.shape, target.dtype):
        return False
    if not _fills_memory(target):
        return False
    source = args[1] if len(args) > 1 else 0
    if isinstance(source, torch.Tensor):
        source = known(source)
        if source is None:
            return False
    forget(target)  # other views of the memory have what they had
    with unset_fake_temporarily():
        value = torch.zeros(target.shape, dtype=target.dtype)
        value.copy_(source) if isinstance(source, torch.Tensor) else value.fill_(source)
    remember(target, value)
    return True


def _value_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """The operation's result on the CPU; None if an operand is unknown, or a result too large to be kept."""
    if (func.overloadpacket.__name__ in _UNKNOWABLE or torch.Tag.nondeterministic_seeded in func.tags
            or func.namespace not in ("aten", "prims")):
        return None
    results = list(tensors_in(out))
    if not results or not all(is_small(result.shape, result.dtype) for result in results):
        return None
    if func.overloadpacket.__name__ in _CONSTANTS:
        with unset_fake_temporarily():
            return torch.full(results[0].shape, _CONSTANTS[func.overloadpacket.__name__], dtype=results[0].dtype)
    operands = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
    if any(known(operand) is None for operand in operands):
        return None
    return run_on_host(func, args, kwargs)


def run_on_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation on the known values of its operands."""
    def host(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return known(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, list | tuple):
            return type(value)(host(item) for item in value) if type(value) in (list, tuple) else value
        return value

    with unset_fake_temporarily():
        return func(*host(args), **{key: host(value) for key, value in kwargs.items() if key != "pin_memory"})
