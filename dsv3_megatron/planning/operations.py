"""What one micro-batch makes a rank do on a pipeline stage: products, attention, bytes moved, tokens exchanged.

Each operation belongs to the forward (F), the backward for the input (I) or the backward for the weights (W), on one
rank. Products and attention add up to `metrics.flops.flops_per_token`; what is computed again in backward, casts to FP8
and everything element-wise is beside that.

Letters: T tokens of a micro-batch on a rank, t their part under sequence parallelism, R routed rows of a rank, H hidden.
Experts get equally many rows; `imbalance` is how many times the mean the busiest rank has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from dsv3_megatron.config.memory import recomputed_modules
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.precision import Fp8Config, LinearPrecision, linear_shapes, precision_map
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.parallel.layout import StageLayout
from dsv3_megatron.planning.memory_state import has_final_norm

# Bytes of a value in FP8 with its scale for 128 of them, in fp32.
FP8_BYTES = 1 + 4 / 128
_E5M6_BYTES = 1.5


class Part(StrEnum):
    """Of a micro-batch's work on a stage."""

    FORWARD = "F"
    INPUT = "I"
    WEIGHT = "W"


@dataclass(frozen=True)
class Product:
    """Matrix products of equal shape in one kernel, as of `hardware.ProductPoint`."""

    part: Part
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
        """Operations."""
        return 2 * self.groups * self.rows * self.columns * self.inner


@dataclass(frozen=True)
class Attention:
    """Core attention over the causal half of the scores.

    Attributes:
        part: When.
        name: What.
        flops: Those of `metrics.flops`, twice the forward's in backward.
        computed_flops: Those that a kernel without a score matrix in memory computes.
    """

    part: Part
    name: str
    flops: float
    computed_flops: float
    seq_length: int
    is_backward: bool
    is_again: bool = False


@dataclass(frozen=True)
class Movement:
    """An element-wise kernel: bytes read and written, and the operations that `metrics.flops` counts for it."""

    part: Part
    name: str
    kind: str
    num_bytes: float
    flops: float = 0.0
    is_again: bool = False


@dataclass(frozen=True)
class Exchange:
    """Tokens to or from the ranks of their experts: rows of `row_bytes` for each of T tokens and destination."""

    part: Part
    name: str
    tokens: float
    row_bytes: float
    is_again: bool = False


@dataclass(frozen=True)
class Collective:
    """An all-gather or a reduce-scatter over the tensor-parallel ranks, of so many bytes in all."""

    part: Part
    name: str
    num_bytes: float
    is_again: bool = False


Operation = Product | Attention | Movement | Exchange | Collective


@dataclass(frozen=True)
class Shape:
    """All that decides about the operations of a layer beside the model and its linears' precisions.

    Attributes:
        micro_batch_size: Sequences.
        seq_length: Tokens of each.
        tp: Tensor-parallel ranks.
        etp: Of each expert.
        ep: Expert-parallel ranks.
        value_bytes: Of an activation, 2 or 4.
        plain_kind: Of a product that is not in FP8: "bf16" or "fp32".
        dispatches_fp8: Whether tokens travel in FP8.
        recomputed: Names as of `config.memory.RECOMPUTE_MODULES`, or "full".
        fuses_experts: On a CPU experts are one operation, which moves what it needs in cache.
        imbalance: Rows of the busiest rank over the mean.
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
    imbalance: float = 1.0

    @classmethod
    def of(cls, run: RunConfig, *, is_cpu: bool = False, imbalance: float = 1.0) -> Shape:
        """Of a run, with what `auto` precision is on the device."""
        training, parallel = run.training, run.parallel
        is_wide = training.precision == "fp32" or (is_cpu and training.precision == "auto")
        recomputed = {"full"} if training.recompute_granularity == "full" else recomputed_modules(training)
        return cls(training.micro_batch_size, training.seq_length, parallel.tensor_model_parallel_size,
                   parallel.expert_tensor_parallel_size, parallel.expert_model_parallel_size, 4 if is_wide else 2,
                   "fp32" if is_wide else "bf16", run.fp8.dispatches_fp8, frozenset(recomputed), imbalance)

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_batch_size * self.seq_length

    @property
    def local_tokens(self) -> float:
        """t."""
        return self.tokens / self.tp


_PLAIN = LinearPrecision("bf16", "bf16", "bf16", "bf16")


@dataclass(frozen=True)
class Linears:
    """Shapes [out, in] of a layer's linears on one rank, and their precisions; by the end of their names."""

    shapes: tuple[tuple[str, tuple[int, int]], ...]
    precisions: tuple[tuple[str, LinearPrecision], ...]

    def shape(self, name: str) -> tuple[int, int] | None:
        """Out and in; None if the layer has no such linear."""
        return dict(self.shapes).get(name)

    def precision(self, name: str) -> LinearPrecision:
        """Of one linear."""
        return dict(self.precisions).get(name, _PLAIN)


def layer_linears(run: RunConfig) -> dict[str, Linears]:
    """The linears of each layer, by the layer's global name; equal layers have the same object."""
    parallel = run.parallel
    return _layer_linears(run.model, parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size,
                          _frozen(run.fp8))


def _frozen(fp8: Fp8Config) -> tuple[tuple[str, object], ...]:
    """A key for a cache: its list of overrides cannot be one."""
    values = {**vars(fp8), "fp8_override": tuple(fp8.fp8_override)}
    return tuple(sorted(values.items()))


@lru_cache(maxsize=256)
def _layer_linears(model: ModelConfig, tp: int, etp: int, fp8_values: tuple[tuple[str, object], ...]
                   ) -> dict[str, Linears]:
    values = dict(fp8_values)
    values["fp8_override"] = list(values["fp8_override"])  # type: ignore[call-overload]
    fp8 = Fp8Config(**values)  # type: ignore[arg-type]
    parallel = ParallelConfig(tensor_model_parallel_size=tp, expert_tensor_parallel_size=etp)
    precisions = precision_map(fp8, model) if fp8.is_enabled else {}
    layers: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in linear_shapes(model, parallel).items():
        prefix, _, rest = name.partition(".self_attention.")
        if not rest:
            prefix, _, rest = name.partition(".mlp.")
        if not rest:
            prefix, _, rest = name.rpartition(".")
        layers.setdefault(prefix, {})[rest] = shape
    known: dict[Linears, Linears] = {}  # equal layers share one object, so that it can stand for them
    found = {}
    for prefix, shapes in layers.items():
        own = Linears(tuple(shapes.items()), tuple(
            (rest, precision) for rest in shapes for precision in _found(precisions, prefix, rest)))
        found[prefix] = known.setdefault(own, own)
    return found


def _found(precisions: dict[str, LinearPrecision], prefix: str, rest: str) -> Iterator[LinearPrecision]:
    for between in (".self_attention.", ".mlp.", "."):
        name = f"{prefix}{between}{rest}"
        if name in precisions:
            yield precisions[name]


# -- a linear ----------------------------------------------------------------------------------------------------


def _linear(name: str, linears: Linears, rows: float, shape: Shape, *, groups: int = 1, casts: bool = True,
            is_again: bool = False) -> Iterator[Operation]:
    """Forward, dgrad and wgrad of a linear on `rows` rows in all, with the casts to FP8 around them.

    Args:
        name: Of the linear.
        linears: Of its layer.
        rows: Over all groups.
        shape: The setting.
        groups: Experts.
        casts: Whether the input is still to be brought into FP8; the dispatch has done so with the experts'.
        is_again: The forward alone, in backward.
    """
    out_in = linears.shape(name)
    assert out_in is not None
    (out, inner), precision = out_in, linears.precision(name)
    per_group, wide = rows / groups, shape.value_bytes

    def kind(of: str) -> str:
        return "fp8" if of == "fp8" else shape.plain_kind

    first = Part.INPUT if is_again else Part.FORWARD
    if precision.fprop == "fp8" and casts:
        yield Movement(first, f"{name} input cast", "cast", rows * inner * (wide + FP8_BYTES), is_again=is_again)
        if precision.cached_input == "e5m6" and not is_again:
            yield Movement(first, f"{name} input kept", "cast_wide", rows * inner * (wide + _E5M6_BYTES))
    yield Product(first, name, kind(precision.fprop), "fprop", groups, per_group, out, inner, is_again)
    if is_again:
        return
    if "fp8" in (precision.dgrad, precision.wgrad):
        yield Movement(Part.INPUT, f"{name} gradient cast", "cast", rows * out * (wide + FP8_BYTES))
    yield Product(Part.INPUT, name, kind(precision.dgrad), "dgrad", groups, per_group, inner, out)
    if precision.wgrad == "fp8":
        yield Movement(Part.WEIGHT, f"{name} gradient by channel", "cast_transposed", rows * out * (wide + FP8_BYTES))
        kept = _E5M6_BYTES if precision.cached_input == "e5m6" else FP8_BYTES
        kind_of_input = "requantize_transposed" if precision.cached_input != "bf16" else "cast_transposed"
        kept = wide if precision.cached_input == "bf16" else kept
        yield Movement(Part.WEIGHT, f"{name} input by channel", kind_of_input, rows * inner * (kept + FP8_BYTES))
    yield Product(Part.WEIGHT, name, kind(precision.wgrad), "wgrad", groups, out, inner, per_group)


def _norm(name: str, rows: float, width: int, shape: Shape) -> Iterator[Operation]:
    """RMSNorm. The gradient of its weight is counted with the input's, as one kernel makes both."""
    wide = shape.value_bytes
    forward = Movement(Part.FORWARD, name, "norm", 2 * rows * width * wide, 2 * rows * width)
    yield forward
    if "layernorm" in shape.recomputed:
        yield Movement(Part.INPUT, name, "norm", forward.num_bytes, is_again=True)
    yield Movement(Part.INPUT, name, "norm_backward", 3 * rows * width * wide, 4 * rows * width)


# -- a layer -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8192)
def layer_operations(model: ModelConfig, linears: Linears, shape: Shape) -> tuple[Operation, ...]:
    """Everything a transformer layer does for a micro-batch on one rank; dense or MoE, as its linears say."""
    operations = [*_attention(model, linears, shape)]
    if linears.shape("experts.linear_fc1") is not None:
        operations += _moe(model, linears, shape)
    else:
        operations += _dense(model, linears, shape)
    if "full" in shape.recomputed:
        operations += [_again(operation) for operation in operations if operation.part is Part.FORWARD]
    return tuple(operations)


def _again(operation: Operation) -> Operation:
    import dataclasses

    return dataclasses.replace(operation, part=Part.INPUT, is_again=True)


def _attention(model: ModelConfig, linears: Linears, shape: Shape) -> Iterator[Operation]:
    whole, local, wide, hidden = shape.tokens, shape.local_tokens, shape.value_bytes, model.hidden_size
    heads = model.num_attention_heads // shape.tp
    prefix = ""
    yield from _norm("input_layernorm", local, hidden, shape)
    gathered = model.kv_lora_rank + model.qk_rope_head_dim
    ups = ["linear_kv_up_proj"]
    if linears.shape("linear_q_proj"):
        yield from _linear("linear_q_proj", linears, whole, shape)
        gathered += hidden
    else:
        yield from _linear("linear_q_down_proj", linears, local, shape)
        yield from _norm("q_layernorm", local, model.q_lora_rank or 0, shape)
        gathered += model.q_lora_rank or 0
        ups.append("linear_q_up_proj")
    yield from _linear("linear_kv_down_proj", linears, local, shape)
    yield from _norm("kv_layernorm", local, model.kv_lora_rank, shape)
    yield from _gathered("latents", whole * gathered * wide, shape)
    for name in ups:
        yield from _linear(f"{prefix}{name}", linears, whole, shape)
        if "mla_up_proj" in shape.recomputed:
            yield from _linear(name, linears, whole, shape, is_again=True)
    # Queries turned; keys put together from their two parts, and values cut off.
    read_and_written = (2 * model.qk_rope_head_dim + model.qk_head_dim + model.qk_nope_head_dim + 2 * model.v_head_dim)
    assembled = whole * heads * read_and_written * wide
    yield Movement(Part.FORWARD, "rotary and heads", "copy", assembled)
    if "mla_up_proj" in shape.recomputed:
        yield Movement(Part.INPUT, "rotary and heads", "copy", assembled, is_again=True)
    yield Movement(Part.INPUT, "rotary and heads", "copy", assembled)
    yield from _core_attention(model, heads, shape)
    yield from _linear("linear_proj", linears, whole, shape)
    yield from _scattered("attention output", whole * hidden * wide, shape)
    for part in (Part.FORWARD, Part.INPUT):
        yield Movement(part, "residual", "add", 3 * local * hidden * wide)


def _core_attention(model: ModelConfig, heads: int, shape: Shape) -> Iterator[Operation]:
    # A query meets S/2 keys on average; backward has the scores and the gradient of the probabilities to make, and
    # the gradients of queries, keys and values.
    pairs = shape.tokens * shape.seq_length / 2 * heads
    forward = 2 * pairs * (model.qk_head_dim + model.v_head_dim)
    computed = 2 * pairs * (3 * model.qk_head_dim + 2 * model.v_head_dim)
    yield Attention(Part.FORWARD, "core_attention", forward, forward, shape.seq_length, False)
    yield Attention(Part.INPUT, "core_attention", 2 * forward, computed, shape.seq_length, True)
    moved = 2 * model.v_head_dim * shape.value_bytes + model.qk_head_dim * (4 + shape.value_bytes)
    yield Movement(Part.INPUT, "core_attention", "attention_backward", shape.tokens * heads * moved)


def _ffn(prefix: str, linears: Linears, rows: float, shape: Shape) -> Iterator[Operation]:
    """SwiGLU between two linears."""
    first = linears.shape(f"{prefix}linear_fc1")
    assert first is not None
    width, wide = first[0] // 2, shape.value_bytes
    yield from _linear(f"{prefix}linear_fc1", linears, rows, shape)
    yield Movement(Part.FORWARD, f"{prefix}swiglu", "swiglu", rows * 3 * width * wide)
    yield from _linear(f"{prefix}linear_fc2", linears, rows, shape)
    yield Movement(Part.INPUT, f"{prefix}swiglu", "swiglu_backward", rows * 5 * width * wide)


def _dense(model: ModelConfig, linears: Linears, shape: Shape) -> Iterator[Operation]:
    whole, local, hidden, wide = shape.tokens, shape.local_tokens, model.hidden_size, shape.value_bytes
    yield from _norm("pre_mlp_layernorm", local, hidden, shape)
    yield from _gathered("ffn input", whole * hidden * wide, shape)
    yield from _ffn("", linears, whole, shape)
    yield from _scattered("ffn output", whole * hidden * wide, shape)
    for part in (Part.FORWARD, Part.INPUT):
        yield Movement(part, "residual", "add", 3 * local * hidden * wide)


def _moe(model: ModelConfig, linears: Linears, shape: Shape) -> Iterator[Operation]:
    whole, local, hidden, wide = shape.tokens, shape.local_tokens, model.hidden_size, shape.value_bytes
    rows = local * model.moe_router_topk * shape.etp * shape.imbalance
    groups = model.num_experts // shape.ep
    travelling = FP8_BYTES if shape.dispatches_fp8 else wide
    yield from _norm("pre_mlp_layernorm", local, hidden, shape)
    yield Product(Part.FORWARD, "router", shape.plain_kind, "fprop", 1, local, model.num_experts, hidden)
    yield Product(Part.INPUT, "router", shape.plain_kind, "dgrad", 1, local, hidden, model.num_experts)
    yield Product(Part.WEIGHT, "router", shape.plain_kind, "wgrad", 1, model.num_experts, hidden, local)
    yield Movement(Part.FORWARD, "router", "routing", 8 * local * model.num_experts)
    if shape.dispatches_fp8:
        yield Movement(Part.FORWARD, "dispatch cast", "cast", local * hidden * (wide + FP8_BYTES))
        yield Movement(Part.INPUT, "dispatch cast", "cast", local * hidden * (wide + FP8_BYTES))
    # Forward: rows go out, to be computed, and come back. Backward: gradients likewise.
    for part in (Part.FORWARD, Part.INPUT):
        yield Exchange(part, "dispatch", local * shape.imbalance, hidden * travelling)
        yield Movement(part, "rows in experts' order", "permute_narrow" if shape.dispatches_fp8 else "permute",
                       2 * rows * hidden * travelling)
        yield Movement(part, "rows in tokens' order", "permute", 2 * rows * hidden * wide)
        yield Exchange(part, "combine", local * shape.imbalance, hidden * wide)
    yield from _experts(linears, rows, groups, shape)
    if model.num_shared_experts:
        yield from _gathered("shared experts' input", whole * hidden * wide, shape)
        yield from _ffn("shared_experts.", linears, whole, shape)
        yield from _scattered("shared experts' output", whole * hidden * wide, shape)
    for part in (Part.FORWARD, Part.INPUT):
        yield Movement(part, "residual", "add", 4 * local * hidden * wide)


def _experts(linears: Linears, rows: float, groups: int, shape: Shape) -> Iterator[Operation]:
    first = linears.shape("experts.linear_fc1")
    assert first is not None
    width, wide = first[0] // 2, shape.value_bytes
    yield from _linear("experts.linear_fc1", linears, rows, shape, groups=groups, casts=not shape.dispatches_fp8)
    is_fp8 = linears.precision("experts.linear_fc2").fprop == "fp8"
    # In FP8 one kernel computes the activation and brings it into FP8.
    written = FP8_BYTES if is_fp8 else wide
    yield Movement(Part.FORWARD, "experts.swiglu", "swiglu", rows * width * (2 * wide + written))
    if "moe_act" in shape.recomputed and not is_fp8:  # FP8 computes it again within the backward's kernel
        yield Movement(Part.INPUT, "experts.swiglu", "swiglu", rows * width * 3 * wide, is_again=True)
    yield from _linear("experts.linear_fc2", linears, rows, shape, groups=groups, casts=not is_fp8)
    yield Movement(Part.INPUT, "experts.swiglu", "swiglu_backward", rows * 5 * width * wide)


def _gathered(name: str, num_bytes: float, shape: Shape) -> Iterator[Operation]:
    """All-gather forward, reduce-scatter backward, over the tensor-parallel ranks."""
    if shape.tp > 1:
        yield Collective(Part.FORWARD, name, num_bytes)
        yield Collective(Part.INPUT, name, num_bytes)


_scattered = _gathered  # the other way round, and as many bytes


# -- the ends ----------------------------------------------------------------------------------------------------


def _head(model: ModelConfig, name: str, shape: Shape) -> Iterator[Operation]:
    """Output head and cross-entropy, both in the run's own precision."""
    tokens, hidden, rows = shape.tokens, model.hidden_size, model.vocab_size // shape.tp
    yield Product(Part.FORWARD, name, shape.plain_kind, "fprop", 1, tokens, rows, hidden)
    yield Product(Part.INPUT, name, shape.plain_kind, "dgrad", 1, tokens, hidden, rows)
    yield Product(Part.WEIGHT, name, shape.plain_kind, "wgrad", 1, rows, hidden, tokens)
    # Maximum and sum of exponentials in one reading; gradients in the place of the logits.
    yield Movement(Part.FORWARD, f"{name} loss", "loss", tokens * rows * shape.value_bytes)
    yield Movement(Part.INPUT, f"{name} loss", "loss", 2 * tokens * rows * shape.value_bytes)
    yield from _gathered(f"{name} input", tokens * hidden * shape.value_bytes, shape)


def _embedding(model: ModelConfig, name: str, shape: Shape) -> Iterator[Operation]:
    moved = 2 * shape.tokens * model.hidden_size
    yield Movement(Part.FORWARD, name, "copy", moved * shape.value_bytes)
    yield Movement(Part.WEIGHT, name, "copy", moved * 4)
    yield from _scattered(name, shape.tokens * model.hidden_size * shape.value_bytes, shape)


def _mtp(model: ModelConfig, linears: dict[str, Linears], depth: int, shape: Shape) -> Iterator[Operation]:
    prefix, name = f"mtp.layers.{depth}", f"mtp {depth + 1}"
    local, hidden = shape.local_tokens, model.hidden_size
    yield from _embedding(model, f"{name} embedding", shape)
    for norm in ("enorm", "hnorm"):
        yield from _norm(norm, local, hidden, shape)
    for part in (Part.FORWARD, Part.INPUT):
        yield Movement(part, "concatenation", "copy", 4 * local * hidden * shape.value_bytes)
    yield from _gathered("eh_proj input", shape.tokens * 2 * hidden * shape.value_bytes, shape)
    yield from _linear("eh_proj", linears[prefix], shape.tokens, shape)
    yield from layer_operations(model, linears[f"{prefix}.mtp_model_layer"], shape)
    yield from _norm("final_layernorm", local, hidden, shape)
    yield from _head(model, f"{name} head", shape)


@lru_cache(maxsize=4096)
def _end_operations(model: ModelConfig, linears: tuple[tuple[str, Linears], ...], shape: Shape, has_embedding: bool,
                    mtp_layer_ids: tuple[int, ...], has_norm: bool, has_loss: bool) -> tuple[Operation, ...]:
    operations: list[Operation] = []
    if has_embedding:
        operations += _embedding(model, "embedding", shape)
    if has_norm:
        operations += _norm("final_layernorm", shape.local_tokens, model.hidden_size, shape)
    for depth in mtp_layer_ids:
        operations += _mtp(model, dict(linears), depth, shape)
    if has_loss:
        operations += _head(model, "head", shape)
    return tuple(operations)


def end_operations(run: RunConfig, stage: StageLayout, shape: Shape) -> tuple[Operation, ...]:
    """What a stage does beside its transformer layers: embedding, final norm, MTP modules, head and losses."""
    linears = tuple((name, own) for name, own in layer_linears(run).items() if name.startswith("mtp."))
    return _end_operations(run.model, linears, shape, stage.has_embedding, stage.mtp_layer_ids,
                           has_final_norm(run.model, stage), stage.has_loss)


def stage_operations(run: RunConfig, stage: StageLayout, shape: Shape) -> Iterator[tuple[Operation, ...]]:
    """The operations of each layer of a stage, then of its ends."""
    linears = layer_linears(run)
    for layer in stage.layer_ids:
        yield layer_operations(run.model, linears[f"decoder.layers.{layer}"], shape)
    yield end_operations(run, stage, shape)


def model_flops(operations: Iterator[Operation] | tuple[Operation, ...]) -> float:
    """Operations that `metrics.flops` counts."""
    return sum(operation.flops for operation in operations
               if not operation.is_again and isinstance(operation, Product | Attention | Movement))


# -- tokens on the wire ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def expected_destinations(model: ModelConfig, num_parts: int) -> float:
    """To how many of `num_parts` equal parts of the experts a token goes on average, its own part's among them.

    Experts are chosen evenly among those of the groups that are kept, and groups evenly. Parts are nodes, or ranks.

    Source: DeepSeek-V3 report, section 2.1.2: a token goes to at most `moe_router_group_topk` groups.
    """
    experts, groups, kept, top = (model.num_experts, model.moe_router_num_groups, model.moe_router_group_topk,
                                  model.moe_router_topk)
    if num_parts <= 1:
        return 1.0
    size, part = experts // groups, experts // num_parts
    in_reach = size * kept
    if part <= size:  # within one group, which is kept with probability kept / groups
        return num_parts * kept / groups * (1 - _none(part, in_reach, top))
    held = part // size  # groups of a part
    touched = 0.0
    for of_part in range(1, min(held, kept) + 1):
        chance = math.comb(held, of_part) * math.comb(groups - held, kept - of_part) / math.comb(groups, kept)
        touched += chance * (1 - _none(of_part * size, in_reach, top))
    return num_parts * touched


def _none(marked: int, total: int, draws: int) -> float:
    """Probability that none of `draws` without replacement is among the marked."""
    return math.comb(total - marked, draws) / math.comb(total, draws) if total - marked >= draws else 0.0
