"""Gradients that are reduced, and weights that are gathered, while a stage still computes.

A bucket is what one message of each kind carries: the parameters of the embedding, of one layer, or of all that follows
the layers (the final norm, MTP modules, the head); apart for experts, which other ranks share. A pass comes to the
beginnings of these parts, their places, one after the other. On the way forward it waits there for the part's weights.
On the way back all gradients of the part in this micro-batch are computed when it comes there, so with the step's last
micro-batch the bucket's reduction begins.

Every rank of a group runs the same passes in the same order, also the two ranks of DualPipe that hold copies of the
same stages (`schedule/orders.py`). So all of them begin the same messages in the same order, and none waits for its end
before the passes do, or the weights are needed. The messages and their buffers are Megatron-Core's.

Source: ZeRO-1 of Rajbhandari et al. 2020, arXiv 1910.02054, with Megatron-LM's `--overlap-grad-reduce` and
`--overlap-param-gather`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout
from megatron.core.utils import unwrap_model

EMBEDDING, HEAD = "embedding", "head"


def layer_place(index: int) -> str:
    """Name of the place where a stage's layer begins, counted from 0 on this stage."""
    return f"layer {index}"


def place_of(path: str) -> str:
    """Name of the place behind which a parameter of a stage is first needed, by its path in the stage."""
    if path.startswith("embedding."):
        return EMBEDDING
    layer = re.match(r"decoder\.layers\.(\d+)\.", path)
    return layer_place(int(layer[1])) if layer else HEAD


def bucket_layout(stage: torch.nn.Module, config: DistributedDataParallelConfig, num_ranks: int, num_expert_ranks: int
                  ) -> FullParamLayout:
    """Places of a stage's parameters in Megatron-Core's buffers, with a bucket for each place of a pass.

    Args:
        stage: The stage, in the dtype that it is trained in, not wrapped.
        config: Settings of the wrapper that the stage gets.
        num_ranks: Ranks over which gradients are reduced.
        num_expert_ranks: Ranks over which gradients of experts are reduced.
    """
    paths = {parameter: path for path, parameter in stage.named_parameters() if parameter.requires_grad}
    whole = DistributedOptimizer.compute_full_param_layout(list(paths), None, num_ranks, config, num_expert_ranks)
    return FullParamLayout(layouts={
        key: _cut(layout, {parameter: place_of(paths[parameter]) for parameter in layout.param_index_map}, config)
        for key, layout in whole.layouts.items()})


def _cut(layout: PerBufferParamLayout, places: Mapping[torch.nn.Parameter, str],
         config: DistributedDataParallelConfig) -> PerBufferParamLayout:
    """The layout of one buffer, with a bucket for each place; a bucket's end is padded as Megatron-Core pads it."""
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for parameter, place in places.items():
        parts.setdefault(place, []).append(parameter)
    cut = PerBufferParamLayout(param_indices=layout.param_indices, num_optimizer_shards=layout.num_optimizer_shards)
    for part in parts.values():
        # Megatron-Core goes through parameters backward, and what it made is in that order.
        own = DistributedOptimizer._compute_per_buffer_param_layout(
            part[::-1], None, layout.num_optimizer_shards, config)
        first, bucket = cut.bucket_indices[-1][1] if cut.bucket_indices else 0, len(cut.bucket_indices)
        for parameter, (start, end, number) in own.param_index_map.items():
            cut.param_index_map[parameter] = (first + start, first + end, bucket + number)
        cut.bucket_indices += [(first + start, first + end) for start, end in own.bucket_indices]
        cut.per_bucket_numel_unpadded += own.per_bucket_numel_unpadded
    return cut


class StageBuckets:
    """The buckets of one stage, and how far their messages are.

    Args:
        groups: Megatron-Core's bucket groups by place, in the order of a forward pass; each is one message.
        reduces_early: A bucket's reduction begins with the last pass back through its place; else it is left to the
            end of the step.
        gathers_late: Weights are gathered when the next pass needs them; else by the update.

    Attributes:
        gathers_late: Whether weights are gathered late, as was asked for.
        num_borrowers: Other stages on this rank that use this one's embedding.
    """

    def __init__(self, groups: Mapping[str, Sequence[Any]], *, reduces_early: bool, gathers_late: bool) -> None:
        self._groups, self._reduces_early, self.gathers_late = groups, reduces_early, gathers_late
        self.num_borrowers = 0
        self._left: dict[str, int] = {}             # passes back that a place has yet to see
        self._is_stale = False                      # this rank has updated its shard, and not seen the others'
        self._coming: dict[str, Sequence[Any]] = {}  # groups whose weights are under way

    def begin_step(self, num_microbatches: int) -> None:
        """Expect so many micro-batches on this stage before its gradients are complete."""
        if self._reduces_early:
            self._left = {place: num_microbatches * (1 + self.num_borrowers * (place == EMBEDDING))
                          for place in self._groups}

    def pass_back(self, place: str) -> None:
        """Note that a micro-batch's gradients of a part are computed; with the last, its reduction begins."""
        if place not in self._left:
            return
        self._left[place] -= 1
        if not self._left[place]:
            del self._left[place]
            for group in self._groups[place]:
                group.start_grad_sync()

    def end_step(self) -> None:
        """Note that the gradients have been reduced, what was left by Megatron-Core."""
        self._left = {}

    def note_update(self) -> None:
        """Note that this rank's shard of the weights is new, and the other ranks' are not here yet."""
        assert not self._coming, "weights are used before they are updated"
        self._is_stale = self.gathers_late

    def start_gathering(self) -> None:
        """Begin to gather weights that were updated, in the order of a forward pass; called by every rank."""
        if not self._is_stale:
            return
        self._is_stale = False
        for place, groups in self._groups.items():
            for group in groups:
                group.start_param_sync()
            self._coming[place] = groups

    def pass_forward(self, place: str) -> None:
        """Wait for the weights of a part, if they are under way."""
        self.start_gathering()
        for group in self._coming.pop(place, ()):
            group.finish_param_sync(skip_next_bucket_dispatch=True)

    def finish_gathering(self) -> None:
        """Wait for all weights: for whoever reads them outside a pass; called by every rank."""
        for place in self._groups:
            self.pass_forward(place)


def add_buckets(stage: Any, wrapped: Any, *, reduces_early: bool, gathers_late: bool) -> None:
    """Let a stage know its buckets.

    Args:
        stage: The stage, whose attribute `buckets` is set.
        wrapped: Megatron-Core's wrapper around it, with buffers by `bucket_layout`.
        reduces_early: Argument of `StageBuckets`.
        gathers_late: Argument of `StageBuckets`.
    """
    found: dict[str, list[Any]] = {}
    paths = {parameter: path for path, parameter in stage.named_parameters()}
    groups = [*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups]
    for path in paths.values():
        found.setdefault(place_of(path), [])
    if reduces_early or gathers_late:
        for group in groups:
            (bucket,) = group.buckets
            found[place_of(paths[bucket.params_list[0]])].append(group)
            # The wrapper's own hooks on parameters must not see this: they would have a gradient of each from autograd.
            group.ddp_config = dataclasses.replace(
                group.ddp_config, overlap_grad_reduce=reduces_early, overlap_param_gather=gathers_late)
    stage.buckets = StageBuckets(found, reduces_early=reduces_early, gathers_late=gathers_late)


def buckets_of(chunks: Iterable[torch.nn.Module]) -> list[StageBuckets]:
    """Find the buckets of stages, wrapped or not; those that nothing trains have none."""
    found = [getattr(unwrap_model(chunk), "buckets", None) for chunk in chunks]
    return [buckets for buckets in found if buckets is not None]


def finish_gathering(chunks: Iterable[torch.nn.Module]) -> None:
    """Have all weights of stages here that an update has left to the next pass; called by every rank."""
    for buckets in buckets_of(chunks):
        buckets.finish_gathering()


class _Passage(torch.autograd.Function):
    """Hidden states as they are; backward says that it was here."""

    @staticmethod
    def forward(ctx: Any, hidden_SBH: torch.Tensor, passed_back: Callable[[], None]) -> torch.Tensor:
        ctx.passed_back = passed_back
        return hidden_SBH.view_as(hidden_SBH)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.passed_back()
        return grads[0], None


def watch_whole_passes(stage: Any) -> None:
    """Let the modules of a stage that autograd runs as a whole come to their places by themselves.

    The gradient of a layer's input is complete when all that reads it has gone back, the layer's weights included. The
    embedding's is not seen: nothing is left to compute behind it.
    """
    buckets: StageBuckets = stage.buckets

    def watch(module: torch.nn.Module, place: str, *, is_first: bool = False) -> None:
        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            buckets.pass_forward(place)
            if is_first or not torch.is_grad_enabled():
                return inputs, named
            passed_back = partial(buckets.pass_back, place)
            if inputs:
                return (_Passage.apply(inputs[0], passed_back), *inputs[1:]), named
            return inputs, named | {"hidden_states": _Passage.apply(named["hidden_states"], passed_back)}

        module.register_forward_pre_hook(hook, with_kwargs=True)

    watch(stage.embedding, EMBEDDING, is_first=True)
    for index, layer in enumerate(stage.decoder.layers):
        watch(layer, layer_place(index))
    watch(stage.decoder.final_layernorm, HEAD)
