"""A pipeline stage's passes: what each makes, keeps and leaves for later, worked out on a ledger and remembered.

A stage's forward pass begins with its input and ends with its output; its backward pass begins with the output's
gradient and ends with the input's. All four are counted by whoever hands them on; a pass's turns are changes to that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.metrics.rank_state import has_final_norm
from dsv3_megatron.parallel.layout import StageLayout
from dsv3_megatron.planning.memory.ends import Embedding, MTPInput, TokenLossesPass, sum_into
from dsv3_megatron.planning.memory.layer_passes import DenseLayer, LatentAttentionPass
from dsv3_megatron.planning.memory.ledger import MemoryLedger, Tensor, Turn, run_turns
from dsv3_megatron.planning.memory.moe import MoELayer
from dsv3_megatron.planning.memory.operation_passes import NormPass, Operations
from dsv3_megatron.planning.memory.settings import LayerPrecisions, ModelPrecisions, PassSettings


class LayerContent(NamedTuple):
    """What decides about one layer, or about the layer of an MTP module.

    Attributes:
        is_moe: The layer has experts.
        precisions: Which of the layer's products are in FP8.
    """

    is_moe: bool
    precisions: LayerPrecisions


@dataclass(frozen=True)
class StageContent:
    """What a stage is made of, in its order.

    Attributes:
        has_embedding: The stage begins with token ids.
        layers: Transformer layers.
        has_final_norm: A norm follows the layers.
        mtp: MTP modules.
        has_loss: The stage ends with the losses.
        num_depths: Hidden states in what it begins with, where that is not token ids: more than one in a stage with the
            losses behind that of the MTP modules.
    """

    has_embedding: bool
    layers: tuple[LayerContent, ...]
    has_final_norm: bool
    mtp: tuple[LayerContent, ...]
    has_loss: bool
    num_depths: int = 1

    @property
    def num_depths_given(self) -> int:
        """Hidden states in what it gives to the next stage; 0 of the last stage."""
        return 0 if self.has_loss else 1 + len(self.mtp)

    @classmethod
    def of(cls, model: ModelConfig, stage: StageLayout, precisions: ModelPrecisions) -> StageContent:
        """What a stage of a model has, each layer in its own precisions."""
        layers = tuple(LayerContent(layer >= model.num_dense_layers, precisions.decoder[layer])
                       for layer in stage.layer_ids)
        mtp = tuple(LayerContent(model.num_moe_layers > 0, precisions.mtp[depth]) for depth in stage.mtp_layer_ids)
        num_depths = 1 + model.mtp_num_layers if stage.has_loss and not mtp else 1
        return cls(stage.has_embedding, layers, has_final_norm(model, stage), mtp, stage.has_loss, num_depths)


@dataclass(frozen=True)
class StageCost:
    """Bytes of the passes of one micro-batch through a stage.

    Attributes:
        forward: Turns of the forward pass.
        backward: Turns of the whole backward pass, up to where the gradient of its input is there.
        completion: The rest of it: weight gradients behind the last transfer, while that gradient is sent.
        backward_input: Turns of the backward pass's part for inputs, where weight gradients wait.
        weight: Turn of the part for weights.
        kept: Bytes that are kept between forward and backward, by name.
        deferred: Bytes that are kept between the two parts of the backward pass, by name.
        boundary: Bytes of the hidden states that go between stages, of one depth.
    """

    forward: tuple[Turn, ...]
    backward: tuple[Turn, ...]
    completion: Turn
    backward_input: tuple[Turn, ...]
    weight: Turn
    kept: dict[str, int]
    deferred: dict[str, int]
    boundary: int

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept between forward and backward."""
        return sum(self.kept.values())

    @property
    def deferred_bytes(self) -> int:
        """Bytes of what waits for the weight part."""
        return sum(self.deferred.values())


def _layer(ops: Operations, x: Tensor, is_moe: bool) -> DenseLayer | MoELayer:
    return MoELayer(ops, x) if is_moe else DenseLayer(ops, x)


class RecomputedLayer:
    """A layer of which its input alone is kept; `output` is the caller's."""

    def __init__(self, ops: Operations, x: Tensor, *, is_moe: bool) -> None:
        self.ops, self.x, self.is_moe = ops, x, is_moe
        ops.ledger.keep(x)
        ops.ledger.pulse(_peak_without_keeping(ops.s, is_moe, ops.precisions))
        self.output = ops.ledger.make("hidden states", ops.s.hidden_bytes)

    is_in_pieces = False

    def backward(self, grad: Tensor) -> Tensor:
        """Forward again, then backward."""
        layer = _layer(self.ops, self.x, self.is_moe)
        grad = layer.backward(grad)
        self.ops.ledger.drop(layer.output, self.x)
        return grad


class RecomputedMTP:
    """An MTP module that Megatron-Core runs again whole: the embeddings and what it reads are kept, nothing else."""

    def __init__(self, ops: Operations, hidden: Tensor, *, is_moe: bool) -> None:
        self.ops, self.hidden, self.is_moe = ops, hidden, is_moe
        self.embedding = Embedding(ops)
        ops.ledger.keep(hidden)
        ops.ledger.pulse(_peak_without_keeping(ops.s, is_moe, ops.precisions))
        self.output = ops.ledger.make("head input", ops.s.hidden_bytes)

    def backward(self, grad: Tensor) -> Tensor:
        """Forward again, then backward, to the gradient of what it reads; `grad` is used up."""
        ops, ledger, s = self.ops, self.ops.ledger, self.ops.s
        start = MTPInput(ops, self.hidden, self.embedding)
        layer = _layer(ops, start.output, self.is_moe)
        norm = ops.norm(layer.output, "head input", s.local_tokens, s.hidden)
        ledger.drop(start.output, layer.output)
        normed = norm.backward(grad)
        ledger.drop(grad)
        result = start.backward(layer.backward(normed))
        ledger.drop(norm.output, self.hidden, self.embedding.output)
        return result


@functools.lru_cache(maxsize=1024)
def _peak_without_keeping(s: PassSettings, is_moe: bool, precisions: LayerPrecisions) -> int:
    """Peak of a layer's forward pass that keeps nothing, beyond its input: of attention, or of what follows it."""
    ledger = MemoryLedger()
    ops = Operations(ledger, s, precisions)
    x = ledger.make("input", s.hidden_bytes)
    LatentAttentionPass(ops, x)
    attention = ledger.peak - x.size
    whole = MemoryLedger()
    ops = Operations(whole, s, precisions)
    _layer(ops, whole.make("input", s.hidden_bytes), is_moe)
    return max(attention, whole.peak - ledger.level + s.hidden_bytes)


class _Stage:
    """One micro-batch's passes through a stage."""

    def __init__(self, s: PassSettings, content: StageContent) -> None:
        self.s, self.content = s, content
        self.ledger = MemoryLedger()
        self.ops = Operations(self.ledger, s)
        self.mtp: list[tuple[MTPInput, _Layer, NormPass]] = []
        self.recomputed_mtp: list[RecomputedMTP] = []
        self.mtp_losses: list[TokenLossesPass] = []

    def _ops_of(self, content: LayerContent) -> Operations:
        return replace(self.ops, precisions=content.precisions)

    def _layer(self, x: Tensor, content: LayerContent) -> _Layer:
        ops = self._ops_of(content)
        if self.s.recomputes_layers:
            return RecomputedLayer(ops, x, is_moe=content.is_moe)
        return _layer(ops, x, content.is_moe)

    def forward(self) -> tuple[Turn, ...]:
        ledger, s, content = self.ledger, self.s, self.content
        self.embedding = None
        if content.has_embedding:
            self.embedding = Embedding(self.ops)
            x = self.embedding.output
        else:
            x = ledger.make("hidden states", content.num_depths * s.hidden_bytes)
            ledger.take_turns()
        self.layers: list[_Layer] = []
        for each in content.layers:
            layer = self._layer(x, each)
            ledger.drop(x)
            x = layer.output
            self.layers.append(layer)
        self.final_norm = None
        if content.has_final_norm:
            self.final_norm = self.ops.norm(x, "head input", s.local_tokens, s.hidden)
            ledger.drop(x)
            x = self.final_norm.output
        if content.num_depths > 1:
            self.mtp_losses = [TokenLossesPass(self.ops, x) for _ in range(content.num_depths - 1)]
            self.main = TokenLossesPass(self.ops, x)
            ledger.drop(x)
        elif content.has_loss:
            self._losses(x)
        elif content.mtp:
            x = self._all_depths(x)
        self.output = None if content.has_loss else x
        turns = ledger.take_turns()
        if self.output is not None:
            ledger.drop(self.output)
        self.kept = ledger.by_name()
        return turns

    def _losses(self, x: Tensor) -> None:
        ledger, s = self.ledger, self.s
        if s.recomputes_layers and not s.is_piped and self.content.mtp:
            return self._losses_of_recomputed(x)
        if self.content.mtp and not s.is_piped:  # Megatron-Core's block returns all depths as one tensor
            together = self._all_depths(x)
            self.mtp_losses = [TokenLossesPass(self.ops, together) for _ in self.mtp]
            self.main = TokenLossesPass(self.ops, together)
            ledger.drop(together)
            return
        hidden = x
        for module in self.content.mtp:
            before, hidden = hidden, self._mtp_module(module, hidden)
            if before is not x:
                ledger.drop(before)
            self.mtp_losses.append(TokenLossesPass(self.ops, hidden))
        if hidden is not x:
            ledger.drop(hidden)
        self.main = TokenLossesPass(self.ops, x)
        ledger.drop(x)

    def _mtp_module(self, module: LayerContent, hidden: Tensor) -> Tensor:
        """One MTP module, from the hidden states of the depth before to its own, which are the caller's."""
        ledger, s = self.ledger, self.s
        start = MTPInput(self._ops_of(module), hidden)
        layer = self._layer(start.output, module)
        ledger.drop(start.output)
        norm = self.ops.norm(layer.output, "head input", s.local_tokens, s.hidden)
        ledger.drop(layer.output)
        self.mtp.append((start, layer, norm))
        return norm.output

    def _all_depths(self, x: Tensor) -> Tensor:
        """The MTP modules one after the other, and the hidden states of all depths in one tensor; `x` is used up."""
        depths = [x]
        for module in self.content.mtp:
            depths.append(self._mtp_module(module, depths[-1]))
        together = self.ledger.make("hidden states of all depths", len(depths) * self.s.hidden_bytes)
        self.ledger.drop(*depths)
        return together

    def _losses_of_recomputed(self, x: Tensor) -> None:
        hidden, ledger = x, self.ledger
        for module in self.content.mtp:
            self.recomputed_mtp.append(RecomputedMTP(self._ops_of(module), hidden, is_moe=module.is_moe))
            hidden = self.recomputed_mtp[-1].output
        together = ledger.make("hidden states of all depths", (1 + len(self.content.mtp)) * self.s.hidden_bytes)
        ledger.drop(*(module.output for module in self.recomputed_mtp), x)
        self.mtp_losses = [TokenLossesPass(self.ops, together) for _ in self.recomputed_mtp]
        self.main = TokenLossesPass(self.ops, together)
        ledger.drop(together)

    def backward(self, *, defers_all: bool) -> tuple[Turn, ...]:
        ledger, s, content = self.ledger, self.s, self.content
        ledger.take_turns()
        ledger.defers_all = defers_all
        self.pieces_left = sum(layer.is_in_pieces for layer in (*self.layers, *(mtp[1] for mtp in self.mtp)))
        if content.has_loss:
            grad = self._backward_losses()
        else:
            grad = ledger.make("gradient of hidden states", content.num_depths_given * s.hidden_bytes)
            ledger.take_turns()
            if content.mtp:
                grad = self._backward_modules(grad)
        if self.final_norm is not None:
            self._begin_segment()
            normed = self.final_norm.backward(grad)
            ledger.drop(grad)
            grad = normed
        for layer in reversed(self.layers):
            grad = self._through(layer, grad)
        result: Tensor | None = grad
        if self.embedding is not None:
            self._begin_segment()
            self.embedding.backward(grad)
            if not s.is_piped:
                for embedding in (*(module.embedding for module in self.recomputed_mtp),
                                  *(start.embedding for start, *_ in self.mtp)):
                    embedding.added()
                self.embedding.added()
            result = None
        turns = ledger.take_turns()
        if result is not None:
            ledger.drop(result)
        return turns

    def _begin_segment(self) -> None:
        """Begin a segment: behind a pass's last exchange, weight gradients of the segment before are computed now."""
        if self.s.is_piped and not self.ledger.defers_all and not self.pieces_left:
            self.ledger.compute_waiting()

    def _through(self, layer: _Layer, grad: Tensor) -> Tensor:
        """A layer's backward pass; on a tape, autograd's call holds the gradient that it begins with."""
        is_one_piece = self.s.is_piped and not layer.is_in_pieces
        if is_one_piece:
            self._begin_segment()
        self.pieces_left -= layer.is_in_pieces
        grad.references += is_one_piece
        result = layer.backward(grad)
        if is_one_piece:
            self.ledger.drop(grad)
        return result

    def _backward_losses(self) -> Tensor:
        ledger, s = self.ledger, self.s
        if not s.is_piped:
            return self._backward_losses_together()
        grad = self.main.backward()
        if self.content.num_depths > 1:
            return self._backward_given(grad)
        later: Tensor | None = None
        for (start, layer, norm), losses in zip(reversed(self.mtp), reversed(self.mtp_losses), strict=True):
            self._begin_segment()
            own = losses.backward()
            own = sum_into(self.ops, later, own)
            self._begin_segment()
            normed = norm.backward(own)
            ledger.drop(own)
            back = self._through(layer, normed)
            self._begin_segment()
            later = start.backward(back)
        return grad if later is None else sum_into(self.ops, grad, later)

    def _backward_modules(self, together: Tensor) -> Tensor:
        """Back from the gradient of the hidden states of all depths, whose parts are used where they lie."""
        ledger = self.ledger
        together.references += len(self.mtp)
        later: Tensor | None = None
        for start, layer, norm in reversed(self.mtp):
            own = together if later is None else self._sum_with_part(together, later)
            self._begin_segment()
            normed = norm.backward(own)
            ledger.drop(own)
            back = self._through(layer, normed)
            self._begin_segment()
            later = start.backward(back)
        assert later is not None
        return self._sum_with_part(together, later)

    def _sum_with_part(self, together: Tensor, grad: Tensor) -> Tensor:
        total = self.ledger.make("sum of gradients", grad.size)
        self.ledger.drop(together, grad)
        return total

    def _backward_given(self, grad: Tensor) -> Tensor:
        """Back to the gradient of the hidden states of all depths, which the stage before gave in one tensor."""
        grads = [grad]
        for losses in reversed(self.mtp_losses):
            self._begin_segment()
            grads.append(losses.backward())
        self._begin_segment()
        together = self.ledger.make("gradient of hidden states", len(grads) * self.s.hidden_bytes)
        self.ledger.drop(*grads)
        return together

    def _backward_losses_together(self) -> Tensor:
        ledger, s = self.ledger, self.s
        own = [self.main.backward()]
        own += [losses.backward() for losses in reversed(self.mtp_losses)]
        if len(own) == 1:
            return own[0]
        ledger.pulse((2 * len(own) - 1) * s.hidden_bytes)
        grads = [ledger.make("gradient of hidden states", s.hidden_bytes) for _ in own]
        ledger.drop(*own)
        main, *rest = grads
        later: Tensor | None = None
        for module, grad in zip(reversed(self.recomputed_mtp), rest, strict=False):
            later = module.backward(sum_into(self.ops, later, grad))
        for (start, layer, norm), grad in zip(reversed(self.mtp), rest, strict=False):
            total = sum_into(self.ops, later, grad)
            normed = norm.backward(total)
            ledger.drop(total)
            later = start.backward(layer.backward(normed))
        assert later is not None
        return sum_into(self.ops, main, later)

    def weight(self) -> Turn:
        ledger = self.ledger
        ledger.take_turns()
        ledger.compute_waiting()
        return run_turns(ledger.take_turns())


_Layer = DenseLayer | MoELayer | RecomputedLayer


@functools.lru_cache(maxsize=8192)
def stage_cost(s: PassSettings, content: StageContent, *, is_split: bool) -> StageCost:
    """The passes of one micro-batch through a stage; those of a split backward where the schedule has it."""
    stage = _Stage(s, content)
    forward, kept = stage.forward(), stage.kept
    backward, completion = stage.backward(defers_all=False), stage.weight()
    assert stage.ledger.level == 0, stage.ledger.by_name()
    if not is_split:
        return StageCost(forward, backward, completion, (), Turn(0, 0), kept, {}, s.hidden_bytes)
    split = _Stage(s, content)
    split.forward()
    backward_input = split.backward(defers_all=True)
    deferred = split.ledger.by_name()
    weight = split.weight()
    assert split.ledger.level == 0, split.ledger.by_name()
    return StageCost(forward, backward, completion, backward_input, weight, kept, deferred, s.hidden_bytes)
