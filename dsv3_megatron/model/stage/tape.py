"""A forward pass in segments, and its backward pass: autograd within a segment, this tape between them.

A segment is an island of autograd: its inputs come without history, and its backward pass is one call of
`torch.autograd.backward` with the gradients that its outputs have got. Between islands, rows are exchanged with other
ranks outside autograd, started early and waited for late; at each exchange the pass stops (a generator yields), so that
another micro-batch can compute meanwhile.

The tape holds no activations of its own. What autograd has saved within the islands stays, as in an ordinary pass;
an output that no island saved is freed with the last reference to its `Value`. (Hence an island's entry is an autograd
node that passes the gradient on, not a leaf tensor, and outputs are remembered by their places in the graph.)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dsv3_megatron.model.stage.weight_gradients import WeightGradients
from dsv3_megatron.ops.linear import DeferredWeightGrad
from dsv3_megatron.parallel.exchange import PostAllToAll, Posted, Splits, post_all_to_all
from dsv3_megatron.parallel.narrow_rows import Narrow, post_narrow

Pause = Generator[None, None, None]


class GradientSlot:
    """A place in which the users of a value leave its gradient."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: torch.Tensor | None = None

    def add(self, grad: torch.Tensor) -> None:
        """Add one user's gradient."""
        self.grad = grad if self.grad is None else self.grad + grad

    def take(self) -> torch.Tensor | None:
        """The sum, None without a user; the slot is empty afterwards."""
        grad, self.grad = self.grad, None
        return grad


class Value(NamedTuple):
    """A tensor between segments, without history.

    Attributes:
        tensor: The tensor, of any dtype.
        slot: Place for the tensor's gradient; None for what has none.
    """

    tensor: torch.Tensor
    slot: GradientSlot | None = None


class _Entry(torch.autograd.Function):
    """A value as a tensor of an island's graph; its gradient goes to the slot."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, tensor: torch.Tensor, slot: GradientSlot) -> torch.Tensor:
        ctx.slot = slot
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        ctx.slot.add(grads[0])
        return None, None, None


class _Island(NamedTuple):
    """A segment that has run: where its outputs are in the graph, and their gradients' slots."""

    edges: list[GradientEdge]
    slots: list[GradientSlot]
    delaying: Sequence[Any]
    has_inputs: bool

    def backward(self, weights: WeightGradients) -> None:
        pairs = [(edge, grad) for edge, slot in zip(self.edges, self.slots, strict=True)
                 if (grad := slot.take()) is not None]
        if not pairs:
            return
        edges, grads = zip(*pairs, strict=True)
        if self.has_inputs:
            torch.autograd.backward(edges, grads)
        else:  # all that its backward pass computes is weight gradients
            weights(DeferredWeightGrad(torch.autograd.backward, edges, grads))
        for module in self.delaying:
            weights(module.backward_dw)


class _Exchange(NamedTuple):
    """Values that have been exchanged: of each its slot before and after, and an empty tensor of its row's shape.

    `narrow` says how the first one's gradients travel; None: as they are.
    """

    slots: list[tuple[GradientSlot, GradientSlot, torch.Tensor]]
    splits: Splits
    narrow: Narrow | None


class Arriving(Protocol):
    """Tensors that are under way to this rank."""

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Wait for the tensors, once."""
        ...


class Carrier(Protocol):
    """Carries tensors to other ranks, by one transfer or several, and gradients back."""

    def start(self, post: PostAllToAll, *tensors: torch.Tensor) -> Arriving:
        """Start on the way there; holds the tensors no longer than they travel."""
        ...

    def start_backward(self, post: PostAllToAll, *grads: torch.Tensor | None) -> Arriving:
        """Start on the way back with the gradients of what came, None where a value was not used here."""
        ...


class _Carriage(NamedTuple):
    """Values that have been carried: their slots before and after."""

    carrier: Carrier
    sent: list[GradientSlot | None]
    received: list[GradientSlot]


class _Place(NamedTuple):
    """A place that the pass has come by."""

    passed_back: Callable[[], None]


class Tape:
    """The pass of one micro-batch through one stage.

    Args:
        is_recording: Whether a backward pass will follow. Without, segments run without autograd and nothing is kept.
        post: Starts an exchange.

    Attributes:
        weights: Weight gradients that wait.
    """

    def __init__(self, *, is_recording: bool, post: PostAllToAll = post_all_to_all) -> None:
        self.weights = WeightGradients()
        self.is_recording, self._post = is_recording, post
        self._nodes: list[_Island | _Exchange | _Carriage | _Place] = []

    def value(self, tensor: torch.Tensor) -> Value:
        """A tensor from outside whose gradient is wanted."""
        return Value(tensor.detach(), GradientSlot() if self.is_recording else None)

    def run(self, function: Callable[..., Any], *inputs: Value, delaying: Sequence[Any] = ()) -> tuple[Value, ...]:
        """Run a segment, and note it for the backward pass.

        Args:
            function: The segment: takes the inputs' tensors and returns a tensor or a tuple of them.
            inputs: None have a gradient: all that the segment's backward pass computes is weight gradients (as of an
                embedding), and waits where they do.
            delaying: Modules of the segment, as `delaying_modules` finds them.

        Returns:
            One value for each tensor, always a tuple.
        """
        if not self.is_recording:
            with torch.no_grad():
                return tuple(Value(output) for output in _as_tuple(function(*(value.tensor for value in inputs))))
        with torch.enable_grad(), self.weights.bound():
            outputs = _as_tuple(function(*map(_enter, inputs)))
        values = tuple(Value(output.detach(), GradientSlot() if output.requires_grad else None) for output in outputs)
        self._nodes.append(_Island(
            [get_gradient_edge(output) for output in outputs if output.requires_grad],
            [value.slot for value in values if value.slot is not None],
            delaying, any(value.slot is not None for value in inputs)))
        return values

    def note_place(self, passed_back: Callable[[], None]) -> None:
        """Note a place of the pass.

        Args:
            passed_back: Called when all gradients of what follows the place are computed, those of weights too.
        """
        if self.is_recording:
            self._nodes.append(_Place(passed_back))

    def exchange(self, *inputs: Value, splits: Splits, narrow: Narrow | None = None
                 ) -> Generator[None, None, tuple[Value, ...]]:
        """Exchange the rows of values; yields once, with the transfers under way.

        Args:
            inputs: Rows, by receiving rank.
            splits: Numbers of rows that go to and come from each rank.
            narrow: How the first value's rows (or gradients) travel in FP8, and in which pass; None: in neither.
        """
        forward, backward = ((narrow, None) if narrow and narrow.direction == "forward" else (None, narrow))
        posted = [self._start(value.tensor, splits, forward if index == 0 else None)
                  for index, value in enumerate(inputs)]
        yield
        outputs = tuple(Value(transfer.wait(), GradientSlot() if self.is_recording and value.slot else None)
                        for transfer, value in zip(posted, inputs, strict=True))
        if self.is_recording:
            # Backward makes zeros like a value that was not used: it needs the width, dtype and device, and no rows.
            self._nodes.append(_Exchange(
                [(value.slot, output.slot, output.tensor.new_empty((0, *output.tensor.shape[1:])))
                 for value, output in zip(inputs, outputs, strict=True) if value.slot and output.slot], splits,
                backward))
        return outputs

    def carry(self, carrier: Carrier, *inputs: Value) -> Generator[None, None, tuple[Value, ...]]:
        """Let values travel as a carrier has them; yields once, with them under way."""
        arriving = carrier.start(self._post, *(value.tensor for value in inputs))
        yield
        outputs = tuple(Value(tensor, GradientSlot() if self.is_recording else None) for tensor in arriving.wait())
        if self.is_recording:
            self._nodes.append(_Carriage(carrier, [value.slot for value in inputs],
                                         [output.slot for output in outputs if output.slot is not None]))
        return outputs

    def _start(self, rows: torch.Tensor, splits: Splits, narrow: Narrow | None) -> Posted:
        return self._post(rows, splits) if narrow is None else post_narrow(rows, splits, narrow, self._post)

    def backward(self, *, defer_weights: bool) -> Pause:
        """Run the backward pass, from the gradients that have been left in the slots of the last values.

        Yields with each exchange under way, and computes there, behind the transfer, the weight gradients so far: a
        transfer starts as soon as its rows are there. After the last exchange they wait for no longer than the next
        segment; those of the pass's first segment are left for `weights.compute`, so that the gradient of its input can
        be sent before.

        Args:
            defer_weights: All weight gradients are left for `weights.compute`.
        """
        self.weights.is_long = defer_weights
        exchanges_left = sum(isinstance(node, _Exchange | _Carriage) for node in self._nodes)
        while self._nodes:
            node = self._nodes.pop()
            if isinstance(node, _Place):
                self.weights.then(node.passed_back)
                continue
            if isinstance(node, _Island):
                if not defer_weights and not exchanges_left:
                    self.weights.compute()
                with self.weights.bound(is_deferring=True):
                    node.backward(self.weights)
                continue
            exchanges_left -= 1
            finish = self._carry_gradients(node) if isinstance(node, _Carriage) else self._post_gradients(node)
            if not defer_weights:
                self.weights.compute()
            yield
            finish()
            del finish  # and what came, in the form in which it travelled

    def _carry_gradients(self, carriage: _Carriage) -> Callable[[], None]:
        arriving = carriage.carrier.start_backward(self._post, *(slot.take() for slot in carriage.received))

        def finish() -> None:
            for slot, grad in zip(carriage.sent, arriving.wait(), strict=True):
                if slot is not None:
                    slot.add(grad)

        return finish

    def _post_gradients(self, exchange: _Exchange) -> Callable[[], None]:
        """Every rank posts every transfer, with zeros where a value was not used here."""
        posted, splits = [], exchange.splits.reversed()
        for index, (sent, received, like) in enumerate(exchange.slots):
            grad = received.take()
            if grad is None:
                grad = like.new_zeros((sum(splits.sent), *like.shape[1:]))
            posted.append((sent, self._start(grad, splits, exchange.narrow if index == 0 else None)))

        def finish() -> None:
            for slot, transfer in posted:
                slot.add(transfer.wait())

        return finish


def _enter(value: Value) -> torch.Tensor:
    if value.slot is None:
        return value.tensor
    # The value has no history, and autograd calls a function's backward only if one of its inputs requires a gradient:
    # this empty tensor is that input. It is on the CPU whatever the value is on, so that it costs nothing there.
    return _Entry.apply(torch.empty(0, device="cpu", requires_grad=True), value.tensor, value.slot)


def _as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
