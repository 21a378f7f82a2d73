"""How many ways a run is split, and whether those ways fit the model, the batch and the machine.

Plain frozen data, no torch. Flags keep Megatron-LM's spelling. Sequence parallelism has no flag: it
is on exactly when tensor parallelism is, because MoE under tensor parallelism needs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.expert_dispatch import DISPATCHERS, FLEX_BACKENDS, members_of_nodes, resolve_dispatcher
from dsv3_megatron.config.fields import ConfigError, InPhases, divisors, nearest, option
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.pipeline import (
    PAIRABLE,
    PAIRED,
    SCHEDULES,
    microbatches_problem,
    num_model_copies,
    ranks_problem,
    require_schedule,
    stages_per_rank,
    stages_problem,
)

CP_COMM_TYPES = ("p2p", "all_gather", "a2a")
# Of 132, which the DeepSeek-V3 report leaves to communication (section 3.2.2).
COMMUNICATION_SMS = 20
# Fields that say when messages go, not between whom.
_NO_LAYOUT = ("overlap_grad_reduce", "overlap_param_gather")
# NCCL has no more channels.
_MOST_SMS = 64


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. Data parallelism is what the world size leaves over."""

    tensor_model_parallel_size: int = option(
        1, in_phases=InPhases.CHANGED, help="ranks each attention and dense layer is split over")
    pipeline_model_parallel_size: int = option(
        1, in_phases=InPhases.CHANGED, help="pipeline ranks the layers are split over")
    num_virtual_stages_per_pipeline_rank: int = option(
        1, in_phases=InPhases.CHANGED,
        help="model chunks each pipeline rank holds; more than 1: the interleaved schedule")
    pipeline_schedule: str = option(
        "auto", in_phases=InPhases.CHANGED, choices=("auto", *SCHEDULES),
        help="what a pipeline rank runs when; auto: interleaved with virtual stages, else 1f1b")
    overlap_moe_expert_parallel_comm: bool = option(
        False, help="interleaved schedule: run a forward and a backward pass as a pair that hides the experts' "
                    "all-to-alls; dualpipe and dualpipev always do")
    pipeline_model_parallel_layout: str | None = option(
        None, help="layers of each stage, Megatron-Core's notation, e.g. 'Ett|tt|ttmL', or 'E|ttt|ttt|mL' with "
                   "the embedding, and the MTP modules and the loss, in stages of their own, or 'Ettt|ttt|m|L' with "
                   "the loss apart from the MTP modules; none: balanced")
    expert_model_parallel_size: int = option(
        1, in_phases=InPhases.CHANGED, help="ranks the experts of a layer are spread over")
    expert_tensor_parallel_size: int = option(1, help="ranks each expert is split over")
    context_parallel_size: int = option(
        1, in_phases=InPhases.CHANGED, help="ranks a sequence is split over, each with an early and a late part of it")
    cp_comm_type: str = option(
        "p2p", in_phases=InPhases.CHANGED, choices=CP_COMM_TYPES,
        help="what ranks that share a sequence pass each other to attend. p2p: latents, block after block in a ring; "
             "all_gather: all latents at once; a2a: expanded keys, values and queries, heads against tokens")
    cp_fp8_latents: bool = option(
        False, help="latents travel in FP8 to the ranks that share a sequence, with the heads' shared key as it is; "
                    "for cp_comm_type p2p and all_gather")
    moe_token_dispatcher_type: str = option(
        "auto", choices=DISPATCHERS,
        help="how tokens get to their experts. node: over the network once for each node, and on to each rank there; "
             "alltoall: a row for each expert; flex: by the library of moe_flex_dispatcher_backend; auto: node where "
             "the experts are on several nodes, else alltoall")
    moe_flex_dispatcher_backend: str = option(
        "deepep", choices=FLEX_BACKENDS, help="library of the dispatcher flex, which must be installed; not tested")
    ranks_per_node: int | None = option(
        None, help="ranks of a node, for the dispatcher node; none: as many as the launcher started on this one")
    overlap_grad_reduce: bool = option(
        True, help="reduce the gradients of a layer as soon as a step's last pass has computed them, under the passes "
                   "that are left; off: all at the end")
    overlap_param_gather: bool = option(
        True, help="gather the updated weights under the first passes of the next step, each layer's before it is "
                   "needed; off: right after the update")
    num_communication_sms: int | None = option(
        None, help="multiprocessors of a GPU that NCCL uses at most and that persistent kernels leave to it; 0: no "
                   f"limit; none: {COMMUNICATION_SMS} with expert, pipeline or context parallelism, else 0")

    @property
    def communication_sms(self) -> int:
        """Multiprocessors of a GPU that are for communication while something is computed; 0: none in particular.

        Where messages go between ranks beside computation, which they do under expert and pipeline parallelism, kernels
        that want every multiprocessor wait for those that NCCL holds.
        """
        if self.num_communication_sms is not None:
            return self.num_communication_sms
        return COMMUNICATION_SMS if self.has_messages_beside_computation else 0

    @property
    def has_messages_beside_computation(self) -> bool:
        """Whether tokens, activations or latents go between ranks."""
        return max(self.expert_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size) > 1

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between the tensor-parallel regions are split along the sequence."""
        return self.tensor_model_parallel_size > 1

    @property
    def passes_latents(self) -> bool:
        """Whether ranks attend to blocks of other ranks' tokens, which are made of latents that they pass."""
        return self.context_parallel_size > 1 and self.cp_comm_type != "a2a"

    @property
    def sequence_multiple(self) -> int:
        """What the length of a sequence must be a multiple of, so that each rank has equal parts of it.

        A sequence that is split has two chunks for each rank, and a rank's part is cut again by tensor parallelism.
        """
        tp, cp = max(1, self.tensor_model_parallel_size), max(1, self.context_parallel_size)
        return tp if cp == 1 else math.lcm(2 * cp, tp * cp)

    @property
    def schedule(self) -> str:
        """The pipeline schedule, one of `pipeline.SCHEDULES`."""
        if self.pipeline_schedule != "auto":
            return self.pipeline_schedule
        return "interleaved" if self.num_virtual_stages_per_pipeline_rank > 1 else "1f1b"

    @property
    def has_pairs(self) -> bool:
        """Whether a forward and a backward pass run as a pair that hides the experts' all-to-alls."""
        return self.schedule in PAIRED or self.overlap_moe_expert_parallel_comm

    @property
    def stages_per_rank(self) -> int:
        """Stages of one copy of the model that a pipeline rank holds."""
        return stages_per_rank(self.schedule, self.num_virtual_stages_per_pipeline_rank)

    @property
    def num_model_copies(self) -> int:
        """Copies of the model along one pipeline: 2 under dualpipe, which sums their gradients."""
        return num_model_copies(self.schedule)

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the model: ranks times stages of one copy per rank."""
        return self.pipeline_model_parallel_size * self.stages_per_rank

    @property
    def model_parallel_size(self) -> int:
        """Smallest number of ranks that holds the attention layers once."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def minimum_world_size(self) -> int:
        """Smallest number of processes this layout runs on."""
        experts = (self.expert_tensor_parallel_size * self.expert_model_parallel_size
                   * self.pipeline_model_parallel_size)
        size = self.model_parallel_size
        while size % experts:
            size += self.model_parallel_size
        return size

    def token_dispatcher(self, ranks_per_node: int) -> str:
        """Which way tokens get to their experts: "node", "alltoall" or "flex".

        Args:
            ranks_per_node: Ranks of a node where the setting of that name does not say it.

        Raises:
            ConfigError: the ranks are not spread evenly over nodes, and "node" was asked for.
        """
        return resolve_dispatcher(self.moe_token_dispatcher_type, self.expert_model_parallel_size,
                                  self.expert_tensor_parallel_size, self.ranks_per_node or ranks_per_node)

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the attention layers among `world_size` processes."""
        return world_size // self.model_parallel_size

    def takes_batch(self, num_sequences: int, micro_batch_size: int, world_size: int) -> bool:
        """Whether so many sequences can be a step's batch: whole micro-batches on each replica, as many as the
        schedule takes."""
        unit = micro_batch_size * self.data_parallel_size(world_size)
        if num_sequences % unit:
            return False
        return self.pipeline_model_parallel_size == 1 or not microbatches_problem(
            self.schedule, self.pipeline_model_parallel_size, num_sequences // unit, "pipeline_schedule")

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Replicas of each expert among `world_size` processes."""
        return world_size // (self.expert_tensor_parallel_size * self.expert_model_parallel_size
                              * self.pipeline_model_parallel_size)

    def replicas_of_weights(self, world_size: int) -> int:
        """Ranks that hold the same attention weights among `world_size` processes, and add up their gradients.

        Each replica has them once for each rank that a sequence is split over, and dualpipe twice as often.
        """
        return self.data_parallel_size(world_size) * self.context_parallel_size * self.num_model_copies

    def validate(self, model: ModelConfig, seq_length: int) -> None:
        """Check the rules between the layout and the model.

        Raises:
            ConfigError: one message with the rule, the values, the field and the way out.
        """
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size",
                     "num_virtual_stages_per_pipeline_rank", "expert_model_parallel_size",
                     "expert_tensor_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_communication_sms is not None and not 0 <= self.num_communication_sms <= _MOST_SMS:
            raise ConfigError(f"num_communication_sms={self.num_communication_sms} must be 0 to {_MOST_SMS}, the most "
                              "that NCCL uses; leave it out, or try 20")
        tp, etp, ep = (self.tensor_model_parallel_size, self.expert_tensor_parallel_size,
                       self.expert_model_parallel_size)
        shared_width = model.num_shared_experts * model.moe_ffn_hidden_size
        _must_divide("tensor_model_parallel_size", tp, [
            ("num_attention_heads", model.num_attention_heads), ("ffn_hidden_size", model.ffn_hidden_size),
            ("num_shared_experts * moe_ffn_hidden_size", shared_width), ("vocab_size", model.vocab_size),
            ("seq_length", seq_length)])
        _must_divide("expert_model_parallel_size", ep, [("num_experts", model.num_experts)])
        _must_divide("expert_tensor_parallel_size", etp, [("moe_ffn_hidden_size", model.moe_ffn_hidden_size)])
        self._validate_context(model, seq_length)
        self._validate_dispatch()
        self._validate_schedule(model)
        # In a layout of its own the first and the last stage may do without transformer layers, and that of the MTP
        # modules.
        ends = 2 + (model.mtp_num_layers > 0)
        most = model.num_layers + ends * (self.pipeline_model_parallel_layout is not None)
        if self.num_stages > most:
            raise ConfigError(
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size} x {self.stages_per_rank_field} "
                f"makes {self.num_stages} stages, more than num_layers={model.num_layers}; use at most {most} stages"
                + (f" with embedding{', MTP modules' * (ends > 2)} and loss in stages of their own"
                   if most > model.num_layers else "")
            )

    def _validate_context(self, model: ModelConfig, seq_length: int) -> None:
        """The rules of a split sequence."""
        if self.cp_comm_type not in CP_COMM_TYPES:
            raise ConfigError(f"cp_comm_type={self.cp_comm_type!r} must be one of {', '.join(CP_COMM_TYPES)}")
        if self.cp_fp8_latents and self.cp_comm_type == "a2a":
            raise ConfigError("cp_fp8_latents narrows the latents that ranks pass, and cp_comm_type=a2a passes none; "
                              "leave it out, or set cp_comm_type=p2p")
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        if cp == 1:
            return
        unit = self.sequence_multiple
        if seq_length % unit:
            below = seq_length // unit * unit
            ways = " or ".join(str(length) for length in (below, below + unit) if length)
            raise ConfigError(
                f"seq_length={seq_length} must be a multiple of {unit}: context_parallel_size={cp} cuts a sequence "
                f"into {2 * cp} equal parts, two for each rank, and tensor_model_parallel_size={tp} cuts those of a "
                f"rank again; try seq_length={ways}")
        heads = model.num_attention_heads // tp
        if self.cp_comm_type == "a2a" and heads % cp:
            raise ConfigError(
                f"context_parallel_size={cp} must divide num_attention_heads / tensor_model_parallel_size = {heads} "
                f"with cp_comm_type=a2a, which divides heads; try {divisors(heads, near=cp)}, or cp_comm_type=p2p")

    def _validate_dispatch(self) -> None:
        for name, allowed in (("moe_token_dispatcher_type", DISPATCHERS),
                              ("moe_flex_dispatcher_backend", FLEX_BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.ranks_per_node is not None:
            if self.ranks_per_node < 1:
                raise ConfigError(f"ranks_per_node={self.ranks_per_node} must be at least 1")
            # Also where another dispatcher asks for none: the number would be wrong.
            members_of_nodes(self.expert_model_parallel_size, self.expert_tensor_parallel_size, self.ranks_per_node)
        if self.moe_token_dispatcher_type == "flex" and self.has_pairs:
            raise ConfigError(
                f"moe_token_dispatcher_type=flex cannot be hidden by a pair of passes, and this run's schedule, "
                f"{self.schedule}, has pairs; set moe_token_dispatcher_type=node, or a schedule without pairs")

    @property
    def stages_per_rank_field(self) -> str:
        """The setting that says how many stages a rank holds, with its value, for messages."""
        if self.pipeline_schedule in ("auto", "interleaved", "1f1b"):
            return f"num_virtual_stages_per_pipeline_rank={self.num_virtual_stages_per_pipeline_rank}"
        return f"{self.stages_per_rank} (pipeline_schedule={self.pipeline_schedule})"

    def _splits(self, model: ModelConfig, **changes: Any) -> bool:
        """Whether a model could be split over a pipeline with other values of these fields."""
        other = dataclasses.replace(self, **changes)
        try:
            other._validate_schedule(model)
        except ConfigError:
            return False
        return other.num_stages <= model.num_layers

    def _validate_schedule(self, model: ModelConfig) -> None:
        """The rules between the schedule and the ranks; those of its micro-batches are in TrainingConfig."""
        name, ranks = self.pipeline_schedule, self.pipeline_model_parallel_size
        chunks = self.num_virtual_stages_per_pipeline_rank
        require_schedule(name, "pipeline_schedule", "auto")
        problem = stages_problem(self.schedule, chunks, "pipeline_schedule", unset=1,
                                 name="num_virtual_stages_per_pipeline_rank")
        if problem and self.schedule != "interleaved":
            raise ConfigError(f"{problem}; leave it at 1, or set pipeline_schedule=interleaved")
        if chunks > 1 and ranks == 1:
            raise ConfigError(
                f"num_virtual_stages_per_pipeline_rank={chunks} needs "
                "pipeline_model_parallel_size of at least 2: the interleaved schedule is a pipeline schedule"
            )
        if name not in ("auto", "1f1b") and ranks == 1:
            raise ConfigError(f"pipeline_schedule={name} needs pipeline_model_parallel_size of at least 2; without a "
                              "pipeline leave it at auto")
        if problem:
            way = "try 2, or " if self._splits(model, num_virtual_stages_per_pipeline_rank=2) else "set "
            raise ConfigError(f"{problem}; {way}pipeline_schedule=1f1b")
        if self.overlap_moe_expert_parallel_comm and self.schedule not in PAIRABLE:
            raise ConfigError("overlap_moe_expert_parallel_comm=true needs a schedule that can run a forward and a "
                              f"backward pass as a pair: interleaved, {' or '.join(PAIRED)}; this run's is "
                              f"{self.schedule}" + self._way_to_pairs(model))
        problem = ranks_problem(self.schedule, ranks, "pipeline_schedule")
        if problem:
            raise ConfigError(f"{problem}; {self._way_from_odd(model)}")

    def _way_to_pairs(self, model: ModelConfig) -> str:
        """What makes a run whose schedule has no pairs one whose schedule has."""
        if self.pipeline_model_parallel_size == 1:
            return ", without a pipeline; leave it off"
        if self.pipeline_schedule == "auto" and self._splits(model, num_virtual_stages_per_pipeline_rank=2):
            return "; try num_virtual_stages_per_pipeline_rank=2"
        changes: list[dict[str, Any]] = [
            {"pipeline_schedule": name, "num_virtual_stages_per_pipeline_rank": stages}
            for name, stages in (("interleaved", 2), ("dualpipev", 1), ("dualpipe", 1))]
        for change in changes:
            if self._splits(model, **change):
                return "; try " + " with ".join(f"{name}={value}" for name, value in change.items() if value != 1)
        return f"; leave it off, or use fewer pipeline ranks: num_layers={model.num_layers} are too few for such stages"

    def _way_from_odd(self, model: ModelConfig) -> str:
        ranks = self.pipeline_model_parallel_size
        ways = nearest((ranks - 1, ranks + 1), near=ranks, is_accepted=lambda other: self._splits(
            model, pipeline_model_parallel_size=other))
        folded = "pipeline_schedule=dualpipev" if self._splits(model, pipeline_schedule="dualpipev") else ""
        return "try " + (", or ".join(filter(None, (ways, folded))) or "pipeline_schedule=1f1b")

    def validate_world_size(self, world_size: int) -> None:
        """Check that the layout fills `world_size` processes.

        Raises:
            ConfigError: naming the degrees, their product and the sizes that would do.
        """
        dense = self.model_parallel_size
        experts = (self.expert_tensor_parallel_size * self.expert_model_parallel_size
                   * self.pipeline_model_parallel_size)
        for product, names in (
            (dense, "tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = "
                    f"{self.tensor_model_parallel_size} x {self.pipeline_model_parallel_size} x "
                    f"{self.context_parallel_size}"),
            (experts, "expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size = "
                      f"{self.expert_tensor_parallel_size} x {self.expert_model_parallel_size} x "
                      f"{self.pipeline_model_parallel_size}"),
        ):
            if world_size % product:
                raise ConfigError(
                    f"{names} = {product} must divide world_size={world_size}; start a multiple of "
                    f"{self.minimum_world_size} processes or lower a degree"
                )


def is_same_layout(*fields: Mapping[str, Any]) -> bool:
    """Whether runs with these fields of a `ParallelConfig` have the same on each rank."""
    layouts = [{name: value for name, value in each.items() if name not in _NO_LAYOUT} for each in fields]
    return all(layout == layouts[0] for layout in layouts)


def _must_divide(name: str, degree: int, targets: list[tuple[str, int]]) -> None:
    for target_name, value in targets:
        if value % degree:
            ways = divisors(math.gcd(*(value for _, value in targets)), near=degree)
            raise ConfigError(f"{name}={degree} must divide {target_name}={value}; try {ways}")
