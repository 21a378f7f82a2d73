"""Parameters, main gradients and optimizer states of a rank: what it holds between steps, to the byte.

Megatron-Core's DistributedDataParallel lays the parameters of a chunk that are reduced over the same ranks into one
flat buffer, and their fp32 main gradients into another of as many elements: each parameter starts at a multiple of 64
elements, the whole is padded to a multiple of the least common multiple of the group's size and 128, and each rank of
the group owns an equal part, for which it has moments and, beside bf16 weights, fp32 master weights (ZeRO-1).

Source: `megatron.core.optimizer.param_layout` and `DistributedOptimizer` of Megatron-Core 0.19.2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.weights import Place, Weight, layer_weights, weights_at
from dsv3_megatron.metrics.parameters import count_parameters, weight_bytes_per_parameter
from dsv3_megatron.parallel.layout import StageLayout, stage_layouts
from dsv3_megatron.parallel.placement import placement

_PARAMETER_ALIGNMENT = 64  # elements
_BUCKET_ALIGNMENT = 128
# optim/adamw.py: blocks of scratch, elements.
_NARROW_BLOCK = 1 << 17


@dataclass(frozen=True)
class ParameterTensor:
    """A parameter as a rank holds it.

    Attributes:
        component: Component of the model that it belongs to, one of `config.weights.COMPONENTS`.
        numel: Elements on this rank.
        is_expert: A routed expert's, reduced over the expert-data-parallel ranks where those differ.
    """

    component: str
    numel: int
    is_expert: bool


@dataclass(frozen=True)
class RankState:
    """Bytes that a rank of one pipeline rank holds between steps.

    Attributes:
        parameter_bytes: Weights with their buffers' padding.
        gradient_bytes: fp32 main gradients with their buffers' padding.
        master_bytes: fp32 master weights of the owned part, beside bf16 weights.
        moment_bytes: Both moments of the owned part.
        scratch_bytes: Buffers of the optimizer that work on narrow moments needs.
        average_bytes: The average of the weights, in CPU memory.
        step_bytes: What lives at the end of a step on a CPU, where activations are gone: gloo's copy of the gradients
            that are reduced, or the largest gradient, scaled.
        parameters: Elements of the weights, without padding.
    """

    parameter_bytes: int
    gradient_bytes: int
    master_bytes: int
    moment_bytes: int
    scratch_bytes: int
    average_bytes: int
    step_bytes: int
    parameters: int

    @property
    def optimizer_bytes(self) -> int:
        """Everything that the optimizer has on the device."""
        return self.master_bytes + self.moment_bytes + self.scratch_bytes

    @property
    def total_bytes(self) -> int:
        """Weights, main gradients and optimizer, on the device."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def stage_tensors(model: ModelConfig, parallel: ParallelConfig, stage: StageLayout, *, shares_embedding: bool
                  ) -> Iterator[ParameterTensor]:
    """The parameters of a pipeline stage on one rank.

    Args:
        model: The model.
        parallel: How the model is split.
        stage: Layers and ends of the stage.
        shares_embedding: The stage's MTP modules use the embedding of another stage on the same rank.
    """
    def held(weights: tuple[Weight, ...]) -> Iterator[ParameterTensor]:
        for weight in weights:
            if weight.is_trained:
                yield ParameterTensor(weight.component, weight.local_numel(model, parallel), weight.is_expert)

    has_mtp = bool(stage.mtp_layer_ids)
    if stage.has_embedding or (has_mtp and not shares_embedding):
        yield from held(weights_at(model, Place.EMBEDDING))
    for layer in stage.layer_ids:
        yield from held(layer_weights(model, is_moe=layer >= model.num_dense_layers))
    if has_final_norm(model, stage):
        yield from held(weights_at(model, Place.AFTER_LAYERS))
    for _ in stage.mtp_layer_ids:
        yield from held(weights_at(model, Place.MTP_BEGIN, Place.MTP_END))
        yield from held(layer_weights(model, is_moe=model.num_moe_layers > 0))
    if stage.has_loss:
        yield from held(weights_at(model, Place.HEAD))


def has_final_norm(model: ModelConfig, stage: StageLayout) -> bool:
    """Whether a stage has the norm after the last layer: with MTP, where that layer is; else where the loss is."""
    return (model.num_layers - 1) in stage.layer_ids if model.mtp_num_layers else stage.has_loss


def has_expert_buffers(parallel: ParallelConfig) -> bool:
    """Whether routed experts are reduced over other ranks than the rest, in buffers of their own."""
    return (parallel.expert_model_parallel_size > 1
            or parallel.expert_tensor_parallel_size != parallel.tensor_model_parallel_size)


def padded_numel(numels: list[int], group_size: int) -> int:
    """Elements of a flat buffer for parameters of these sizes, over a group of ranks."""
    aligned = sum(-(-numel // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT for numel in numels)
    divisor = math.lcm(group_size, _BUCKET_ALIGNMENT)
    return -(-aligned // divisor) * divisor


def stages_of(model: ModelConfig, parallel: ParallelConfig) -> list[StageLayout]:
    """`stage_layouts`, remembered by what decides it: balancing takes longer than the rest of an estimate."""
    return _stages(model, dataclasses.replace(parallel, tensor_model_parallel_size=1, expert_model_parallel_size=1,
                                              expert_tensor_parallel_size=1))


_stages = functools.lru_cache(maxsize=256)(stage_layouts)


@dataclass(frozen=True)
class _Numels:
    parameters: int
    padded: int
    owned: int
    num_parts: int
    largest_owned: int
    largest_reduced: int


@functools.lru_cache(maxsize=4096)
def _rank_numels(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> tuple[_Numels, ...]:
    """Elements by pipeline rank; owned are those of the data-parallel rank that owns most."""
    stages = stages_of(model, parallel)
    data_parallel = parallel.replicas_of_weights(world_size)
    expert_data_parallel = parallel.expert_data_parallel_size(world_size) * parallel.num_model_copies
    has_experts_apart = has_expert_buffers(parallel)
    ranks = []
    for places in placement(parallel):
        held = [stages[place.stage] for place in places]
        has_first = any(stage.has_embedding for stage in held)
        parameters = padded = owned = largest = reduced = 0
        kinds = set()
        for stage in held:
            shares = has_first and not stage.has_embedding
            # An embedding that another rank has a copy of is in a bucket of its own.
            has_other_copy = model.mtp_num_layers > 0 and len(stages) > 1
            tensors = list(stage_tensors(model, parallel, stage, shares_embedding=shares))
            for is_expert in (False, True):
                numels = [t.numel for t in tensors if (t.is_expert and has_experts_apart) is is_expert]
                if not numels:
                    continue
                group = expert_data_parallel if is_expert else data_parallel
                kinds.add(is_expert)
                size = padded_numel(numels, group)
                parameters, padded = parameters + sum(numels), padded + size
                owned += min(sum(numels), size // group)
                largest = max(largest, min(max(numels), size // group))
                apart = [t.numel for t in tensors
                         if t.component == "embedding" and has_other_copy and not is_expert]
                reduced = max(reduced, (size - sum(apart)) if group > 1 else 0, *apart)
        ranks.append(_Numels(parameters, padded, owned, len(kinds), largest, reduced))
    return tuple(ranks)


def rank_states(run: RunConfig, world_size: int, *, precision: str) -> tuple[RankState, ...]:
    """What each pipeline rank holds between steps.

    Args:
        run: A valid run.
        world_size: Processes of the run.
        precision: "bf16" or "fp32", of the weights; "auto" counts as bf16, what it is on a GPU.
    """
    training = run.training
    moment_sizes = [2 if dtype == "bf16" else 4 for dtype in (training.exp_avg_dtype, training.exp_avg_sq_dtype)]
    is_narrow = 2 in moment_sizes
    # Wide copies of both moments; two tables of random bits and a buffer for them.
    blocks = 2 + 3 * (training.moment_rounding == "stochastic") if is_narrow else 0
    return tuple(RankState(
        parameter_bytes=numels.padded * weight_bytes_per_parameter(precision),
        gradient_bytes=numels.padded * 4,
        master_bytes=0 if precision == "fp32" else numels.owned * 4,
        moment_bytes=numels.owned * sum(moment_sizes),
        scratch_bytes=numels.num_parts * blocks * _NARROW_BLOCK * 4,
        average_bytes=numels.owned * 4 if run.keeps_average else 0,
        step_bytes=max(numels.largest_owned, numels.largest_reduced) * 4,
        parameters=numels.parameters,
    ) for numels in _rank_numels(run.model, run.parallel, world_size))


def checkpoint_bytes(run: RunConfig) -> int:
    """Size of one of a run's checkpoints on disk, whatever the layout: each parameter once as the modules have it and
    once as the optimizer's fp32 copy (in fp32 too), its moments, its average.

    Names, positions and routers' biases are left out: 2% of a checkpoint of `tiny`, nothing of a large one.
    """
    training = run.training
    moments = sum(2 if dtype == "bf16" else 4 for dtype in (training.exp_avg_dtype, training.exp_avg_sq_dtype))
    states = 4 + moments + (4 if run.keeps_average else 0)
    return count_parameters(run.model).total * (weight_bytes_per_parameter(training.precision) + states)
