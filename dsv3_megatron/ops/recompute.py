"""Tensors that are computed again in backward instead of being kept for it.

`recomputed(function, *inputs)` returns function(*inputs) and notes how it came about. An operation that would save one
of the outputs for its backward pass, and runs inside `saving()`, saves the note instead; when its backward asks for the
tensor, it is computed again from the inputs. The graph is not touched: every gradient is computed by the same
operations from the same values, bit for bit, in whatever order and by whomever backward is driven; what changes is only
what is kept. Where an operation outside `saving()` keeps an output, nothing is saved and nothing breaks.

A tensor is recognised by its storage, so that views, slices and detached copies of an output count as it. An output
that several operations ask for is computed once and kept until the last of them has it.

What an operation would save in another form, such as an FP8 copy, need not be saved either where the tensor itself will
be there in backward: computed again, or kept by another operation, which says so by `held`. `is_at_hand` tells.

Megatron-Core's CheckpointWithoutOutput discards the data of an output and restores it in a hook on the gradient of a
later tensor, which must come before the first use: that depends on what is run between the two. This does not.

Source of what to recompute: DeepSeek-V3 report, section 3.2.3.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# By storage: a reference to it that tells when it is gone, how it came about, and as which output.
_live: dict[int, tuple[weakref.ref, _Recipe, int]] = {}
# Likewise, what some operation keeps as it is.
_held: dict[int, tuple[weakref.ref]] = {}
_num_computing = 0


def recomputed(function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """function(*inputs), whose outputs need not be kept for backward.

    Args:
        function: Deterministic, without effects, of tensors; returns a tensor or a tuple of tensors, none of them an
            input or a view of one. Weights that it finds by itself must not change before backward.
        inputs: Kept until backward, or themselves recomputed.
    """
    return remembered(function(*inputs), function, *inputs)


def remembered(outputs: Any, function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """Give back outputs in whose place function(*inputs) will be there in backward.

    It need not be the same to the last bit: where the inputs are rounded, such as what is kept of SwiGLU's input in
    FP8, what backward gets is what the rounded ones make.

    Args:
        outputs: A tensor or a tuple of tensors, none of them an input or a view of one.
        function: Function as `recomputed` takes it; its outputs have the shapes, strides and dtypes of `outputs`.
        inputs: Kept until backward, or themselves recomputed.
    """
    if torch.is_grad_enabled() and not _num_computing:
        recipe = _Recipe(function, inputs)
        for index, output in enumerate(_as_tuple(outputs)):
            _note(_live, output, recipe, index)
    return outputs


def held(tensor: torch.Tensor) -> torch.Tensor:
    """Give back a tensor that the operation which made it keeps until its own backward pass, whoever else does."""
    if torch.is_grad_enabled() and not _num_computing:
        _note(_held, tensor)
    return tensor


def _note(table: dict[int, Any], tensor: torch.Tensor, *said: Any) -> None:
    """Enter a tensor's storage, for as long as it is there: a reference to it, and what is said of it."""
    storage = tensor.untyped_storage()
    address = storage._cdata

    def forget(_: Any) -> None:
        table.pop(address, None)

    table[address] = (weakref.ref(storage, forget), *said)


def is_recomputed(tensor: torch.Tensor) -> bool:
    """Whether the tensor is, or is a view of, an output of `recomputed`."""
    return _find(tensor) is not None


def is_at_hand(tensor: torch.Tensor) -> bool:
    """Whether saving the tensor inside `saving()` costs nothing: it is computed again, or held by another operation."""
    storage = tensor.untyped_storage()
    (reference,) = _held.get(storage._cdata, (None,))
    return is_recomputed(tensor) or (reference is not None and reference() is storage)


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Operations in this context save how to compute recomputed tensors again, and other tensors as always."""
    if not _live or not torch.is_grad_enabled():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


class _Recipe:
    """How some tensors are computed; and they themselves, between the first and the last request for them."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> None:
        self.function = function
        self.inputs = [_pack(tensor) for tensor in inputs]
        self.versions = [_version(tensor) for tensor in inputs]
        self.outputs: tuple[torch.Tensor, ...] | None = None
        self.num_waiting = 0

    def output(self, index: int) -> torch.Tensor:
        if self.outputs is None:
            self.outputs = self._compute()
        return self.outputs[index]

    def _compute(self) -> tuple[torch.Tensor, ...]:
        global _num_computing
        inputs = [_unpack(packed) for packed in self.inputs]
        for tensor, packed, version in zip(inputs, self.inputs, self.versions, strict=True):
            if not isinstance(packed, _Note) and _version(tensor) != version:
                raise RuntimeError(f"an input {tuple(tensor.shape)} of what is recomputed in backward was changed in "
                                   "place after forward; compute into a new tensor instead")
        _num_computing += 1
        try:
            # With gradients enabled, so that every operation takes the way that it took in forward.
            with torch.enable_grad():
                outputs = self.function(*(tensor.detach() for tensor in inputs))
            return tuple(output.detach() for output in _as_tuple(outputs))
        finally:
            _num_computing -= 1


@dataclass
class _Note:
    """What is saved in a tensor's place: which output of which recipe, and which view of it."""

    recipe: _Recipe
    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    is_waiting: bool = True

    def tensor(self) -> torch.Tensor:
        recipe = self.recipe
        tensor = recipe.output(self.index).as_strided(self.shape, self.stride, self.offset)
        recipe.num_waiting -= self.is_waiting
        self.is_waiting = False
        if not recipe.num_waiting:
            recipe.outputs = None
        return tensor


def _pack(tensor: torch.Tensor) -> torch.Tensor | _Note:
    found = _find(tensor)
    if found is None:
        return tensor
    recipe, index = found
    recipe.num_waiting += 1
    return _Note(recipe, index, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(packed: torch.Tensor | _Note) -> torch.Tensor:
    return packed.tensor() if isinstance(packed, _Note) else packed


def _find(tensor: torch.Tensor) -> tuple[_Recipe, int] | None:
    if not _live:
        return None
    storage = tensor.untyped_storage()
    reference, recipe, index = _live.get(storage._cdata, (None, None, 0))
    # Another storage may have the address of one that is gone.
    return (recipe, index) if recipe is not None and reference is not None and reference() is storage else None


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was changed in place; None of one made in inference mode, which torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
