"""How many parameters a model has, where they sit, and how many of them each rank holds.

Arithmetic on a ModelConfig alone: no torch, nothing allocated, so that `--print-model` answers at once
for any size. The counts are exact and are what the tests compare built models with.

Usage:
    table = count_parameters(model)                       # table.main_total, table.main_active, table.mtp_total
    ranks = rank_parameters(run_config, stages)           # one RankParameters per pipeline rank

Source of the definitions: DeepSeek-V3 report, sections 2.1, 2.2 and 4.2. Its 671B and 37B are
`main_total` and `main_active` of dsv3-671b. The routing bias is no parameter: it is not trained by a
gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.config.weights import COMPONENTS, Place, Split, Weight, weights_at
from dsv3_megatron.parallel.placement import placement

if TYPE_CHECKING:
    from dsv3_megatron.parallel.layout import StageLayout

# How the parameters of a component are spread over the ranks of one pipeline stage.
REPLICATED = "replicated"  # every tensor-parallel rank holds all of it
TENSOR = "tensor"  # split over the tensor-parallel ranks
EXPERT = "expert"  # split over the expert-parallel and expert-tensor-parallel ranks


@dataclass(frozen=True)
class Component:
    """Equal weights that occur `num_units` times, of which a token passes through `num_active_units`."""

    part: str
    name: str
    parameters_per_unit: int
    num_units: int
    num_active_units: int
    sharding: str

    @property
    def total(self) -> int:
        """Parameters of all units."""
        return self.parameters_per_unit * self.num_units

    @property
    def active(self) -> int:
        """Parameters of the units that one token passes through."""
        return self.parameters_per_unit * self.num_active_units


@dataclass(frozen=True)
class ParameterTable:
    """Components of the main model and of the MTP modules; the latter without shared embedding and head."""

    main: tuple[Component, ...]
    mtp: tuple[Component, ...]

    @property
    def main_total(self) -> int:
        """Parameters of the main model, embedding and head included."""
        return _total(self.main)

    @property
    def main_active(self) -> int:
        """Parameters of the main model that one token activates, embedding table and head included."""
        return _active(self.main)

    @property
    def main_active_without_embedding(self) -> int:
        """Parameters of the main model that one token activates, without the embedding table, a look-up: what the FLOP
        count multiplies by 6.
        """
        return sum(c.active for c in self.main if c.part != "embedding")

    @property
    def mtp_total(self) -> int:
        """Parameters of the MTP modules alone: embedding and head are the main model's."""
        return _total(self.mtp)

    @property
    def mtp_active(self) -> int:
        """Parameters of the MTP modules that one token activates."""
        return _active(self.mtp)

    @property
    def total(self) -> int:
        """Every distinct parameter that is trained."""
        return self.main_total + self.mtp_total

    def parts(self) -> dict[str, int]:
        """Total parameters of the main model by part, in the order of the forward pass."""
        sums: dict[str, int] = {}
        for component in self.main:
            sums[component.part] = sums.get(component.part, 0) + component.total
        return sums


@dataclass(frozen=True)
class RankParameters:
    """What one rank of a pipeline rank holds of the model; `rank_state.py` has the bytes of it.

    `dense_parameters` are those replicated over the data-parallel ranks, `expert_parameters` the routed
    experts, replicated over the expert-data-parallel ranks.
    """

    pipeline_rank: int
    stages: tuple[int, ...]
    layer_ids: tuple[int, ...]
    dense_parameters: int
    expert_parameters: int

    @property
    def parameters(self) -> int:
        """Parameters in this rank's shard of the model."""
        return self.dense_parameters + self.expert_parameters


def _total(components: Iterable[Component]) -> int:
    return sum(component.total for component in components)


def _active(components: Iterable[Component]) -> int:
    return sum(component.active for component in components)


def _lines(model: ModelConfig, rows: Iterable[tuple[Weight, int]]) -> list[Component]:
    """Components of weights that occur so many times, in the order of the lines' first weights.

    A unit of routed or shared experts is one expert.
    """
    sums: dict[tuple[str, str, str, int, int, int], int] = {}
    for weight, times in rows:
        if weight.is_trained:
            units, active = _units(model, weight)
            key = weight.component, weight.counted_as, _sharding(weight), times * units, times * active, units
            sums[key] = sums.get(key, 0) + weight.numel(model) * (units if weight.is_expert else 1)
    return [Component(part, name, size // units, num_units, num_active, sharding)
            for (part, name, sharding, num_units, num_active, units), size in sums.items()]


def _units(model: ModelConfig, weight: Weight) -> tuple[int, int]:
    """Count in how many units a layer has a weight, and how many of them a token passes through."""
    if weight.is_expert:
        return model.num_experts, model.moe_router_topk
    units = model.num_shared_experts if weight.component == "shared_experts" else 1
    return units, units


def _sharding(weight: Weight) -> str:
    if weight.is_expert:
        return EXPERT
    return REPLICATED if weight.split is Split.REPLICATED else TENSOR


def _blocks(model: ModelConfig, num_dense: int, num_moe: int) -> list[Component]:
    """Components of `num_dense` dense and `num_moe` MoE transformer layers."""
    counts = {Place.ATTENTION: num_dense + num_moe, Place.FFN_INPUT: num_dense + num_moe,
              Place.DENSE_LAYER: num_dense, Place.MOE_LAYER: num_moe}
    lines = _lines(model, [(weight, times) for place, times in counts.items() for weight in weights_at(model, place)])
    return sorted(lines, key=lambda line: COMPONENTS.index(line.part))


def _ends(model: ModelConfig, place: Place, times: int = 1) -> list[Component]:
    return _lines(model, [(weight, times) for weight in weights_at(model, place)])


def _mtp(model: ModelConfig, depth: int) -> list[Component]:
    """`depth` MTP modules: two input norms, M_k of eq. 21, one layer like the last, the norm before the shared head."""
    num_moe = depth if model.num_moe_layers else 0
    return [*_ends(model, Place.MTP_BEGIN, depth), *_blocks(model, depth - num_moe, num_moe),
            *_ends(model, Place.MTP_END, depth)]


def _present(components: Iterable[Component]) -> tuple[Component, ...]:
    return tuple(component for component in components if component.total)


def count_parameters(model: ModelConfig) -> ParameterTable:
    """Exact parameter counts by component.

    Args:
        model: Any architecture; head and embedding are untied.

    Returns:
        Components in the order of the forward pass; those a model does not have are left out.

    Source: DeepSeek-V3 report, sections 2.1.1 (eq. 1-11), 2.1.2, 2.2 and 4.2.
    """
    main = [*_ends(model, Place.EMBEDDING), *_blocks(model, model.num_dense_layers, model.num_moe_layers),
            *_ends(model, Place.AFTER_LAYERS), *_ends(model, Place.HEAD)]
    return ParameterTable(_present(main), _present(_mtp(model, model.mtp_num_layers)))


def stage_components(model: ModelConfig, stage: StageLayout) -> tuple[Component, ...]:
    """What one pipeline stage holds, copies of shared weights included.

    A stage with MTP needs the embedding. Where it is not the stage that owns it, it holds a copy whose gradient is
    summed with the owner's. The final norm is with the last decoder layer when
    there is MTP (whose input is its output), otherwise with the loss, as in Megatron-Core.
    """
    num_dense = sum(layer < model.num_dense_layers for layer in stage.layer_ids)
    has_mtp = bool(stage.mtp_layer_ids)
    norm_here = (model.num_layers - 1) in stage.layer_ids if model.mtp_num_layers else stage.has_loss
    components = _blocks(model, num_dense, len(stage.layer_ids) - num_dense) + _mtp(model, len(stage.mtp_layer_ids))
    if stage.has_embedding or has_mtp:
        components = _ends(model, Place.EMBEDDING) + components
    if norm_here:
        components += _ends(model, Place.AFTER_LAYERS)
    if stage.has_loss:
        components += _ends(model, Place.HEAD)
    return _present(components)


def weight_bytes_per_parameter(precision: str) -> int:
    """Bytes of one weight; `auto` counts as bf16, what it resolves to on a GPU."""
    return 4 if precision == "fp32" else 2


def optimizer_bytes_per_parameter(training: TrainingConfig) -> int:
    """Bytes of AdamW state per parameter: two moments in their dtypes, and an fp32 master weight beside bf16 weights.

    In fp32 the weight is its own master: Megatron-Core keeps a view of it, not a copy.
    """
    moments = sum(2 if dtype == "bf16" else 4 for dtype in (training.exp_avg_dtype, training.exp_avg_sq_dtype))
    return moments + (0 if training.precision == "fp32" else 4)


def rank_parameters(run: RunConfig, stages: Sequence[StageLayout]) -> list[RankParameters]:
    """Parameters that one rank of each pipeline rank holds.

    Args:
        run: Model and degrees of parallelism.
        stages: Layout of the stages, as `parallel.layout.stage_layouts(model, parallel)` gives it.

    Returns:
        One entry per pipeline rank; all its tensor-, expert- and data-parallel ranks hold as many.

    Weights follow the Transformer Engine layers' split: the low-rank down-projections, router and norms
    are whole on every tensor-parallel rank.
    """
    model, parallel = run.model, run.parallel
    tp = parallel.tensor_model_parallel_size
    expert_shards = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    ranks = []
    for rank, places in enumerate(placement(parallel)):
        held = [stages[place.stage] for place in places]
        components = [component for stage in held for component in stage_components(model, stage)]
        if len(held) > 1 and held[0].has_embedding and held[-1].mtp_layer_ids:
            for shared in _ends(model, Place.EMBEDDING):  # of the two stages
                components.remove(shared)
        dense = (sum(c.total for c in components if c.sharding == REPLICATED)
                 + sum(c.total for c in components if c.sharding == TENSOR) // tp)
        ranks.append(RankParameters(
            pipeline_rank=rank,
            stages=tuple(stage.stage for stage in held),
            layer_ids=tuple(layer for stage in held for layer in stage.layer_ids),
            dense_parameters=dense,
            expert_parameters=sum(c.total for c in components if c.sharding == EXPERT) // expert_shards,
        ))
    return ranks
