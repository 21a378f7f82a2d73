"""What one micro-batch makes a rank do on a pipeline stage: products, attention, bytes moved, tokens exchanged.

Each operation belongs to the forward (F), the backward for the input (I) or the backward for the weights (W), on one
rank. Products and attention add up to `metrics.flops.flops_per_token`; what is computed again in backward, casts to FP8
and everything element-wise is beside that.

`layer_operations.py` puts layers and stages together from these.

Letters: T tokens of a micro-batch on a rank, t their part under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from dsv3_megatron.config.memory import recomputed_modules
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.pipeline import SPLIT_BACKWARD
from dsv3_megatron.config.precision import Fp8Config, LinearPrecision, precision_map
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.weights import Weight, sections
from dsv3_megatron.ops.head_loss_choices import chosen_head_loss
from dsv3_megatron.planning.memory.settings import pads_values
from dsv3_megatron.planning.time.dispatch_bytes import Carried

# Bytes of a value in FP8 with its scale for 128 of them, in fp32.
FP8_BYTES = 1 + 4 / 128
_E5M6_BYTES = 1.5


class WorkPart(StrEnum):
    """The three parts of a micro-batch's work on a stage: forward, backward for inputs, backward for weights."""

    FORWARD = "F"
    INPUT = "I"
    WEIGHT = "W"


@dataclass(frozen=True)
class Product:
    """Matrix products of equal shape in one kernel, as in `hardware.ProductPoint`."""

    part: WorkPart
    name: str
    kind: str
    purpose: str
    groups: int
    rows: float
    columns: int
    inner: float
    is_again: bool = False

    @property
    def flops(self) -> float:
        """Floating-point operations of the product, two for each multiply-add."""
        return 2 * self.groups * self.rows * self.columns * self.inner


@dataclass(frozen=True)
class CoreAttention:
    """Core attention over the causal half of the scores.

    Attributes:
        part: Part of the micro-batch's work in which it is done.
        name: Name of the operation.
        flops: FLOPs as `metrics.flops` counts them, twice the forward's in backward.
        computed_flops: FLOPs that a kernel without a score matrix in memory computes.
        seq_length: Tokens that see one another, of which the kernel's rate depends.
        is_backward: The backward pass is meant.
        of_blocks: Keys come in blocks of several ranks, for which there is another kernel.
    """

    part: WorkPart
    name: str
    flops: float
    computed_flops: float
    seq_length: int
    is_backward: bool
    is_again: bool = False
    of_blocks: bool = False


@dataclass(frozen=True)
class Movement:
    """An element-wise kernel: bytes read and written, and the operations that `metrics.flops` counts for it."""

    part: WorkPart
    name: str
    kind: str
    num_bytes: float
    flops: float = 0.0
    is_again: bool = False


@dataclass(frozen=True)
class TokenExchange:
    """Tokens to or from the ranks of their experts: rows of `row_bytes` for each of T tokens and destination.

    Attributes:
        part: Part of the micro-batch's work in which it is done.
        name: Name of the operation.
        tokens: Tokens of the rank.
        row_bytes: Bytes of a row's values.
        carried: What travels with the rows.
    """

    part: WorkPart
    name: str
    tokens: float
    row_bytes: int
    carried: Carried = Carried.NOTHING
    is_again: bool = False


@dataclass(frozen=True)
class Collective:
    """An all-gather or a reduce-scatter over the tensor-parallel ranks, of so many bytes in all."""

    part: WorkPart
    name: str
    num_bytes: float
    is_again: bool = False


@dataclass(frozen=True)
class SequenceExchange:
    """A message among the ranks that share a sequence, for which compute waits: so many bytes go out of each rank."""

    part: WorkPart
    name: str
    num_bytes: float
    is_again: bool = False


@dataclass(frozen=True)
class LatentRing:
    """Blocks that go from rank to rank, each while another one is computed with.

    Attributes:
        part: Part of the micro-batch's work in which it is done.
        name: Name of the operation.
        steps: Messages, one after the other.
        num_bytes: Bytes of each.
        beside: What is computed meanwhile, of all steps together.
    """

    part: WorkPart
    name: str
    steps: int
    num_bytes: float
    beside: tuple[Product | CoreAttention | Movement, ...]
    is_again: bool = False


WorkItem = Product | CoreAttention | Movement | TokenExchange | Collective | SequenceExchange | LatentRing


@dataclass(frozen=True)
class Shape:
    """All that decides about the operations of a layer beside the model and its linears' precisions.

    Attributes:
        micro_batch_size: Sequences in a micro-batch.
        seq_length: Tokens of each, on all ranks that share it.
        tp: Tensor-parallel ranks.
        etp: Expert-tensor-parallel ranks, over which each expert is split.
        ep: Expert-parallel ranks.
        value_bytes: Bytes of an activation, 2 or 4.
        plain_kind: Kind of a product that is not in FP8: "bf16" or "fp32".
        dispatches_fp8: Whether tokens travel in FP8.
        recomputed: Names out of `config.memory.RECOMPUTE_MODULES`, or "full".
        splits_backward: Whether the schedule has weight gradients wait.
        imbalance: Rows of the busiest rank over the mean.
        has_fused_head: The head and its loss are one operation, whose logits are never in memory.
        pads_values: Values are brought to the keys' width for core attention.
        cp: Context-parallel ranks, which share a sequence.
        cp_comm: How core attention gets to the tokens of others, as `cp_comm_type`.
        narrows_latents: Latents go to other ranks in FP8.
    """

    micro_batch_size: int
    seq_length: int
    tp: int
    etp: int
    ep: int
    value_bytes: int
    plain_kind: str
    dispatches_fp8: bool
    recomputed: frozenset[str]
    splits_backward: bool
    imbalance: float = 1.0
    has_fused_head: bool = False
    pads_values: bool = False
    cp: int = 1
    cp_comm: str = "p2p"
    narrows_latents: bool = False

    @classmethod
    def of(cls, run: RunConfig, *, is_cpu: bool = False, imbalance: float = 1.0) -> Shape:
        """Make the shape of a run, with what `auto` precision is on the device."""
        training, parallel = run.training, run.parallel
        is_wide = training.precision_on(is_cpu=is_cpu) == "fp32"
        device = "cpu" if is_cpu else "cuda"
        is_fused = chosen_head_loss(device, 4 if is_wide else 2, run.model.hidden_size) == "fused"
        recomputed = {"full"} if training.recompute_granularity == "full" else recomputed_modules(training)
        return cls(training.micro_batch_size, training.seq_length, parallel.tensor_model_parallel_size,
                   parallel.expert_tensor_parallel_size, parallel.expert_model_parallel_size, 4 if is_wide else 2,
                   "fp32" if is_wide else "bf16", run.fp8.dispatches_fp8, frozenset(recomputed),
                   parallel.pipeline_model_parallel_size > 1 and parallel.schedule in SPLIT_BACKWARD, imbalance,
                   is_fused, pads_values(run, device=device, precision="fp32" if is_wide else "bf16"),
                   parallel.context_parallel_size, parallel.cp_comm_type, parallel.cp_fp8_latents)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that are this rank's, or those of the ranks that share its part, T."""
        return self.micro_batch_size * self.seq_length // self.cp

    @property
    def passes_latents(self) -> bool:
        """Whether ranks attend to blocks of other ranks' tokens, made of latents that they pass."""
        return self.cp > 1 and self.cp_comm != "a2a"

    @property
    def local_tokens(self) -> float:
        """Tokens of a micro-batch on one tensor-parallel rank, t."""
        return self.tokens / self.tp


_PLAIN = LinearPrecision("bf16", "bf16", "bf16", "bf16")


@dataclass(frozen=True)
class Linears:
    """Shapes [out, in] of a layer's matrices on one rank, and precisions of those in FP8's map; by `short_name`."""

    shapes: tuple[tuple[str, tuple[int, int]], ...]
    precisions: tuple[tuple[str, LinearPrecision], ...]

    def shape(self, name: str) -> tuple[int, int] | None:
        """Out and in; None if the layer has no such linear."""
        return dict(self.shapes).get(name)

    def precision(self, name: str) -> LinearPrecision:
        """The precision of one linear, by its name."""
        return dict(self.precisions).get(name, _PLAIN)


def layer_linears(run: RunConfig) -> dict[str, Linears]:
    """The linears of each layer and MTP module, by its global name; equal layers have the same object."""
    parallel = run.parallel
    return _layer_linears(run.model, parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size,
                          run.fp8)


@lru_cache(maxsize=256)
def _layer_linears(model: ModelConfig, tp: int, etp: int, fp8: Fp8Config) -> dict[str, Linears]:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, expert_tensor_parallel_size=etp)
    precisions = precision_map(fp8, model) if fp8.is_enabled else {}
    known: dict[Linears, Linears] = {}  # equal layers share one object, so that it can stand for them
    found = {}
    for section in sections(model):
        matrices = [weight for weight in section.weights if weight.is_matrix]
        if not section.ours or not matrices:
            continue
        own = Linears(tuple((short_name(weight), weight.local_matrix(model, parallel)) for weight in matrices), tuple(
            (short_name(weight), precisions[section.ours + weight.module]) for weight in matrices
            if section.ours + weight.module in precisions))
        found[section.ours.removesuffix(".")] = known.setdefault(own, own)
    return found


def short_name(weight: Weight) -> str:
    """Name of the operations with a weight: that of its module within attention or FFN."""
    return weight.module.removeprefix("self_attention.").removeprefix("mlp.")


# -- a linear ----------------------------------------------------------------------------------------------------


def linear_operations(name: str, linears: Linears, rows: float, shape: Shape, *, groups: int = 1, casts: bool = True,
            is_again: bool = False, is_input_again: bool = False) -> Iterator[Product | Movement]:
    """Forward, dgrad and wgrad of a linear on `rows` rows in all, with the casts to FP8 around them.

    Args:
        name: Name of the linear.
        linears: Shapes and precisions of its layer's linears.
        rows: Rows over all groups.
        shape: The setting.
        groups: Experts that the rows are divided among; 1: a linear without experts.
        casts: Whether the input is still to be brought into FP8; the dispatch has done so with the experts'.
        is_again: The forward alone, in backward.
        is_input_again: The input is made again in backward, and with it its FP8 copy.
    """
    out_in = linears.shape(name)
    assert out_in is not None
    (out, inner), precision = out_in, linears.precision(name)
    per_group, wide = rows / groups, shape.value_bytes

    def kind(of: str) -> str:
        return "fp8" if of == "fp8" else shape.plain_kind

    first = WorkPart.INPUT if is_again else WorkPart.FORWARD
    if precision.fprop == "fp8" and casts:
        yield Movement(first, f"{name} input cast", "cast", rows * inner * (wide + FP8_BYTES), is_again=is_again)
        if precision.cached_input == "e5m6" and not is_again:
            yield Movement(first, f"{name} input kept", "cast_wide", rows * inner * (wide + _E5M6_BYTES))
    yield Product(first, name, kind(precision.fprop), "fprop", groups, per_group, out, inner, is_again)
    if is_again:
        return
    if "fp8" in (precision.dgrad, precision.wgrad):
        yield Movement(WorkPart.INPUT, f"{name} gradient cast", "cast", rows * out * (wide + FP8_BYTES))
    yield Product(WorkPart.INPUT, name, kind(precision.dgrad), "dgrad", groups, per_group, inner, out)
    if precision.wgrad == "fp8":
        if is_input_again and precision.cached_input != "bf16":
            yield Movement(WorkPart.WEIGHT, f"{name} input cast", "cast", rows * inner * (wide + FP8_BYTES),
                           is_again=True)
        yield Movement(WorkPart.WEIGHT, f"{name} gradient by channel", "cast_transposed",
                       rows * out * (wide + FP8_BYTES))
        kept = _E5M6_BYTES if precision.cached_input == "e5m6" else FP8_BYTES
        kind_of_input = "requantize_transposed" if precision.cached_input != "bf16" else "cast_transposed"
        kept = wide if precision.cached_input == "bf16" else kept
        yield Movement(WorkPart.WEIGHT, f"{name} input by channel", kind_of_input, rows * inner * (kept + FP8_BYTES))
    yield Product(WorkPart.WEIGHT, name, kind(precision.wgrad), "wgrad", groups, out, inner, per_group)


def norm_operations(name: str, rows: float, width: int, shape: Shape) -> Iterator[WorkItem]:
    """RMSNorm. The gradient of its weight is counted with the input's, as one kernel makes both."""
    wide = shape.value_bytes
    forward = Movement(WorkPart.FORWARD, name, "norm", 2 * rows * width * wide, 2 * rows * width)
    yield forward
    if "layernorm" in shape.recomputed:
        yield Movement(WorkPart.INPUT, name, "norm", forward.num_bytes, is_again=True)
    yield Movement(WorkPart.INPUT, name, "norm_backward", 3 * rows * width * wide, 4 * rows * width)


def model_flops(operations: Iterator[WorkItem] | tuple[WorkItem, ...]) -> float:
    """Operations that `metrics.flops` counts."""
    return sum(operation.flops for operation in operations
               if not operation.is_again and isinstance(operation, Product | CoreAttention | Movement))
