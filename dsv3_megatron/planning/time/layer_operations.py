"""The operations of transformer layers and of what a stage has beside them, in the order of the modules.

Letters as in `operations.py`; R routed rows of a rank, H hidden. Experts get equally many rows; `Shape.imbalance` is
how many times the mean the busiest rank has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import lru_cache

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.weights import Place, Split, Weight, layer_weights, weights_at
from dsv3_megatron.kernels.head_loss_tiles import fused_bytes
from dsv3_megatron.metrics.rank_state import has_final_norm
from dsv3_megatron.ops.row_bytes import record_bytes
from dsv3_megatron.parallel.layout import StageLayout
from dsv3_megatron.planning.time.dispatch_bytes import Carried
from dsv3_megatron.planning.time.latent_passing import EXPANSION, exchange_operations, ring_operations
from dsv3_megatron.planning.time.operations import (
    FP8_BYTES,
    Collective,
    CoreAttention,
    Linears,
    Movement,
    Product,
    Shape,
    TokenExchange,
    WorkItem,
    WorkPart,
    layer_linears,
    linear_operations,
    norm_operations,
    short_name,
)

# -- a layer -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8192)
def layer_operations(model: ModelConfig, linears: Linears, shape: Shape) -> tuple[WorkItem, ...]:
    """Everything a transformer layer does for a micro-batch on one rank; dense or MoE, as its linears say."""
    operations = [*_attention(model, linears, shape)]
    is_moe = linears.shape("experts.linear_fc1") is not None
    operations += (_moe if is_moe else _dense)(model, linears, shape)
    placed = {operation.name for operation in operations}
    operations += _with_weights(model, (weight for weight in layer_weights(model, is_moe=is_moe)
                                        if short_name(weight) not in placed), linears, shape)
    if "full" in shape.recomputed:
        operations += [_again(operation) for operation in operations if operation.part is WorkPart.FORWARD]
    return tuple(operations)


def _again(operation: WorkItem) -> WorkItem:
    return dataclasses.replace(operation, part=WorkPart.INPUT, is_again=True)


def _with_weights(model: ModelConfig, weights: Iterable[Weight], linears: Linears, shape: Shape
                  ) -> Iterator[WorkItem]:
    """Norms and products: on the rank's part of the sequence, or where the weight is split, on all of it."""
    for weight in weights:
        rows = shape.local_tokens if weight.split is Split.REPLICATED else shape.tokens
        if weight.is_expert:
            yield from linear_operations(short_name(weight), linears, _routed_rows(model, shape), shape,
                                         groups=model.num_experts // shape.ep)
        elif weight.is_matrix:
            # All but the way out of attention read what a norm gives.
            yield from linear_operations(short_name(weight), linears, rows, shape,
                                         is_input_again=weight.split is not Split.ROW and _has_norms_again(shape))
        elif weight.is_trained:
            yield from norm_operations(short_name(weight), rows, weight.numel(model), shape)


def _attention(model: ModelConfig, linears: Linears, shape: Shape) -> Iterator[WorkItem]:
    whole, local, wide, hidden = shape.tokens, shape.local_tokens, shape.value_bytes, model.hidden_size
    heads = model.num_attention_heads // shape.tp
    weights = weights_at(model, Place.ATTENTION)
    ups = [weight for weight in weights if weight.split is Split.COLUMN and not weight.reads_hidden_states]
    # Norms, the ways down to the latents, and full-rank queries.
    first = (weight for weight in weights if weight not in ups and weight.split is not Split.ROW)
    yield from _with_weights(model, first, linears, shape)
    gathered = model.kv_lora_rank + model.qk_rope_head_dim + (model.q_lora_rank or hidden)
    yield from _gathered("latents", whole * gathered * wide, shape)
    if shape.passes_latents:
        ups = [weight for weight in ups if short_name(weight) != EXPANSION]
    for weight in reversed(ups):  # in any order: this one keeps the last bits of sums over a layer
        yield from _with_weights(model, [weight], linears, shape)
        if "mla_up_proj" in shape.recomputed:
            yield from linear_operations(short_name(weight), linears, whole, shape, is_again=True)
    # Queries turned; keys put together from their two parts, and values cut off: in a ring, of each block.
    read_and_written = 2 * model.qk_rope_head_dim
    if not shape.passes_latents:
        read_and_written += model.qk_head_dim + model.qk_nope_head_dim + 2 * model.v_head_dim
    assembled = whole * heads * read_and_written * wide
    yield Movement(WorkPart.FORWARD, "rotary and heads", "copy", assembled)
    if "mla_up_proj" in shape.recomputed:
        yield Movement(WorkPart.INPUT, "rotary and heads", "copy", assembled, is_again=True)
    yield Movement(WorkPart.INPUT, "rotary and heads", "copy", assembled)
    if shape.passes_latents:
        yield from ring_operations(model, linears, heads, shape)
    else:
        yield from exchange_operations(model, heads, shape)
        yield from _core_attention(model, heads, shape)
    yield from _with_weights(model, (weight for weight in weights if weight.split is Split.ROW), linears, shape)
    yield from _scattered("attention output", whole * hidden * wide, shape)
    for part in (WorkPart.FORWARD, WorkPart.INPUT):
        yield Movement(part, "residual", "add", 3 * local * hidden * wide)


def _core_attention(model: ModelConfig, heads: int, shape: Shape) -> Iterator[WorkItem]:
    # A query meets S/2 keys on average; backward has the scores and the gradient of the probabilities to make, and
    # the gradients of queries, keys and values.
    pairs = shape.tokens * shape.seq_length / 2 * heads
    forward = 2 * pairs * (model.qk_head_dim + model.v_head_dim)
    width = model.qk_head_dim if shape.pads_values else model.v_head_dim
    computed_forward = 2 * pairs * (model.qk_head_dim + width)
    computed = 2 * pairs * (3 * model.qk_head_dim + 2 * width)
    yield CoreAttention(WorkPart.FORWARD, "core_attention", forward, computed_forward, shape.seq_length, False)
    yield CoreAttention(WorkPart.INPUT, "core_attention", 2 * forward, computed, shape.seq_length, True)
    moved = 2 * model.v_head_dim * shape.value_bytes + model.qk_head_dim * (4 + shape.value_bytes)
    yield Movement(WorkPart.INPUT, "core_attention", "attention_backward", shape.tokens * heads * moved)


def _ffn(prefix: str, linears: Linears, rows: float, shape: Shape) -> Iterator[WorkItem]:
    """SwiGLU between two linears."""
    first = linears.shape(f"{prefix}linear_fc1")
    assert first is not None
    width, wide = first[0] // 2, shape.value_bytes
    yield from linear_operations(f"{prefix}linear_fc1", linears, rows, shape, is_input_again=_has_norms_again(shape))
    yield Movement(WorkPart.FORWARD, f"{prefix}swiglu", "swiglu", rows * 3 * width * wide)
    second = linears.precision(f"{prefix}linear_fc2")
    if second.is_fp8 and second.cached_input != "bf16":
        yield Movement(WorkPart.FORWARD, f"{prefix}swiglu input kept", "cast", rows * 2 * width * (wide + FP8_BYTES))
    if second.is_fp8 or ("moe_act" in shape.recomputed and prefix):
        read = FP8_BYTES if second.is_fp8 and second.cached_input != "bf16" else wide
        yield Movement(WorkPart.INPUT, f"{prefix}swiglu", "swiglu", rows * width * (2 * read + wide), is_again=True)
    yield from linear_operations(f"{prefix}linear_fc2", linears, rows, shape, is_input_again=second.is_fp8)
    yield Movement(WorkPart.INPUT, f"{prefix}swiglu", "swiglu_backward", rows * 5 * width * wide)


def _has_norms_again(shape: Shape) -> bool:
    """Whether what norms give is made again in backward."""
    return "layernorm" in shape.recomputed


def _dense(model: ModelConfig, linears: Linears, shape: Shape) -> Iterator[WorkItem]:
    whole, local, hidden, wide = shape.tokens, shape.local_tokens, model.hidden_size, shape.value_bytes
    yield from _with_weights(model, weights_at(model, Place.FFN_INPUT), linears, shape)
    yield from _gathered("ffn input", whole * hidden * wide, shape)
    yield from _ffn("", linears, whole, shape)
    yield from _scattered("ffn output", whole * hidden * wide, shape)
    for part in (WorkPart.FORWARD, WorkPart.INPUT):
        yield Movement(part, "residual", "add", 3 * local * hidden * wide)


def _moe(model: ModelConfig, linears: Linears, shape: Shape) -> Iterator[WorkItem]:
    whole, local, hidden, wide = shape.tokens, shape.local_tokens, model.hidden_size, shape.value_bytes
    rows = _routed_rows(model, shape)
    groups = model.num_experts // shape.ep
    sends_fp8 = _sends_fp8(linears, shape)
    travelling = FP8_BYTES if sends_fp8 else wide
    yield from _with_weights(model, weights_at(model, Place.FFN_INPUT), linears, shape)
    yield from linear_operations("router", linears, local, shape)
    yield Movement(WorkPart.FORWARD, "router", "routing", 8 * local * model.num_experts)
    if sends_fp8:
        yield Movement(WorkPart.FORWARD, "dispatch cast", "cast", local * hidden * (wide + FP8_BYTES))
        yield Movement(WorkPart.INPUT, "dispatch cast", "cast", local * hidden * (wide + FP8_BYTES))
    # Forward: rows go out, to be computed, and come back. Backward: gradients likewise. Gates are behind their row on
    # the way out, and their gradients behind the row's on the way back.
    out = record_bytes(hidden) if sends_fp8 else hidden * wide
    for part, with_out, with_back in ((WorkPart.FORWARD, Carried.ROUTING, Carried.NOTHING),
                                      (WorkPart.INPUT, Carried.NOTHING, Carried.GATES)):
        yield TokenExchange(part, "dispatch", local * shape.imbalance, out, with_out)
        yield Movement(part, "rows in experts' order", "permute_narrow" if sends_fp8 else "permute",
                       2 * rows * hidden * travelling)
        yield Movement(part, "rows in tokens' order", "permute", 2 * rows * hidden * wide)
        yield TokenExchange(part, "combine", local * shape.imbalance, hidden * wide, with_back)
    yield from _experts(linears, rows, groups, shape)
    if model.num_shared_experts:
        yield from _gathered("shared experts' input", whole * hidden * wide, shape)
        yield from _ffn("shared_experts.", linears, whole, shape)
        yield from _scattered("shared experts' output", whole * hidden * wide, shape)
    for part in (WorkPart.FORWARD, WorkPart.INPUT):
        yield Movement(part, "residual", "add", 4 * local * hidden * wide)


def _routed_rows(model: ModelConfig, shape: Shape) -> float:
    return shape.local_tokens * model.moe_router_topk * shape.etp * shape.imbalance


def _sends_fp8(linears: Linears, shape: Shape) -> bool:
    """Whether tokens travel to this layer's experts in FP8: as the run says, where they take FP8."""
    return shape.dispatches_fp8 and linears.precision("experts.linear_fc1").fprop == "fp8"


def _experts(linears: Linears, rows: float, groups: int, shape: Shape) -> Iterator[WorkItem]:
    first = linears.shape("experts.linear_fc1")
    assert first is not None
    width, wide = first[0] // 2, shape.value_bytes
    yield from linear_operations("experts.linear_fc1", linears, rows, shape, groups=groups,
                                 casts=not _sends_fp8(linears, shape))
    is_fp8 = linears.precision("experts.linear_fc2").fprop == "fp8"
    # In FP8 one kernel computes the activation and brings it into FP8.
    written = FP8_BYTES if is_fp8 else wide
    yield Movement(WorkPart.FORWARD, "experts.swiglu", "swiglu", rows * width * (2 * wide + written))
    if "moe_act" in shape.recomputed and not is_fp8:  # FP8 computes it again within the backward's kernel
        yield Movement(WorkPart.INPUT, "experts.swiglu", "swiglu", rows * width * 3 * wide, is_again=True)
    yield from linear_operations("experts.linear_fc2", linears, rows, shape, groups=groups, casts=not is_fp8)
    yield Movement(WorkPart.INPUT, "experts.swiglu", "swiglu_backward", rows * 5 * width * wide)


def _gathered(name: str, num_bytes: float, shape: Shape) -> Iterator[WorkItem]:
    """All-gather forward, reduce-scatter backward, over the tensor-parallel ranks."""
    if shape.tp > 1:
        yield Collective(WorkPart.FORWARD, name, num_bytes)
        yield Collective(WorkPart.INPUT, name, num_bytes)


_scattered = _gathered  # the other way round, and as many bytes


# -- the ends ----------------------------------------------------------------------------------------------------


def _head(model: ModelConfig, name: str, shape: Shape) -> Iterator[WorkItem]:
    """Output head and cross-entropy, both in the run's own precision."""
    tokens, hidden, rows = shape.tokens, model.hidden_size, model.vocab_size // shape.tp
    logits = Product(WorkPart.FORWARD, name, shape.plain_kind, "fprop", 1, tokens, rows, hidden)
    yield logits
    yield Product(WorkPart.INPUT, name, shape.plain_kind, "dgrad", 1, tokens, hidden, rows)
    # Fused, the weight's gradient does not wait.
    part = WorkPart.INPUT if shape.has_fused_head else WorkPart.WEIGHT
    yield Product(part, name, shape.plain_kind, "wgrad", 1, rows, hidden, tokens)
    if shape.has_fused_head:
        yield _again(logits)
        # The gradients of the logits are results and operands of these products.
        moved = fused_bytes(tokens, hidden, rows, value_bytes=shape.value_bytes)
        yield Movement(WorkPart.FORWARD, f"{name} loss", "loss", moved.partial_sums)
        yield Movement(WorkPart.INPUT, f"{name} loss", "loss", moved.hidden_gradient)
    else:
        yield from _chunked_loss(name, tokens * rows, shape)
    yield from _gathered(f"{name} input", tokens * hidden * shape.value_bytes, shape)


def _chunked_loss(name: str, logits: float, shape: Shape) -> Iterator[WorkItem]:
    # ops/chunked_head_loss.py: logits in fp32, their maximum, softmax in place, its maximum; kept in the run's
    # precision, scaled in fp32 and brought back: 46 bytes.
    is_wide = shape.value_bytes == 4
    yield Movement(WorkPart.FORWARD, f"{name} loss", "loss", logits * (16 if is_wide else 34))
    yield Movement(WorkPart.INPUT, f"{name} loss", "loss", logits * (8 if is_wide else 12))
    if shape.splits_backward:  # the gradients of the logits are computed again
        yield Movement(WorkPart.WEIGHT, f"{name} loss", "loss", logits * (8 if is_wide else 12))


def _embedding(model: ModelConfig, name: str, shape: Shape) -> Iterator[WorkItem]:
    moved = 2 * shape.tokens * model.hidden_size
    yield Movement(WorkPart.FORWARD, name, "copy", moved * shape.value_bytes)
    yield Movement(WorkPart.WEIGHT, name, "copy", moved * 4)
    yield from _scattered(name, shape.tokens * model.hidden_size * shape.value_bytes, shape)


def _mtp(model: ModelConfig, linears: dict[str, Linears], depth: int, shape: Shape) -> Iterator[WorkItem]:
    prefix, name = f"mtp.layers.{depth}", f"mtp {depth + 1}"
    local, hidden = shape.local_tokens, model.hidden_size
    yield from _embedding(model, f"{name} embedding", shape)
    begin = weights_at(model, Place.MTP_BEGIN)
    yield from _with_weights(model, (weight for weight in begin if not weight.is_matrix), linears[prefix], shape)
    for part in (WorkPart.FORWARD, WorkPart.INPUT):
        yield Movement(part, "concatenation", "copy", 4 * local * hidden * shape.value_bytes)
    yield from _gathered("eh_proj input", shape.tokens * 2 * hidden * shape.value_bytes, shape)
    yield from _with_weights(model, (weight for weight in begin if weight.is_matrix), linears[prefix], shape)
    yield from layer_operations(model, linears[f"{prefix}.mtp_model_layer"], shape)
    yield from norm_operations("final_layernorm", local, hidden, shape)


@lru_cache(maxsize=4096)
def _end_operations(model: ModelConfig, linears: tuple[tuple[str, Linears], ...], shape: Shape, has_embedding: bool,
                    mtp_layer_ids: tuple[int, ...], has_norm: bool, has_loss: bool) -> tuple[WorkItem, ...]:
    operations: list[WorkItem] = []
    if has_embedding:
        operations += _embedding(model, "embedding", shape)
    if has_norm:
        operations += norm_operations("final_layernorm", shape.local_tokens, model.hidden_size, shape)
    for depth in mtp_layer_ids:
        operations += _mtp(model, dict(linears), depth, shape)
    if model.mtp_num_layers and bool(mtp_layer_ids) != has_loss:
        # The stage with the modules puts the hidden states of all depths together; that with the losses, the gradients.
        part = WorkPart.INPUT if has_loss else WorkPart.FORWARD
        moved = 2 * (1 + model.mtp_num_layers) * shape.local_tokens * model.hidden_size * shape.value_bytes
        operations.append(Movement(part, "hidden states of all depths", "copy", moved))
    if has_loss:
        for depth in range(model.mtp_num_layers):
            operations += _head(model, f"mtp {depth + 1} head", shape)
        operations += _head(model, "head", shape)
    return tuple(operations)


def end_operations(run: RunConfig, stage: StageLayout, shape: Shape) -> tuple[WorkItem, ...]:
    """What a stage does beside its transformer layers: embedding, final norm, MTP modules, head and losses."""
    linears = tuple((name, own) for name, own in layer_linears(run).items() if name.startswith("mtp."))
    return _end_operations(run.model, linears, shape, stage.has_embedding, stage.mtp_layer_ids,
                           has_final_norm(run.model, stage), stage.has_loss)


def stage_operations(run: RunConfig, stage: StageLayout, shape: Shape) -> Iterator[tuple[WorkItem, ...]]:
    """The operations of each layer of a stage, then of its ends."""
    linears = layer_linears(run)
    for layer in stage.layer_ids:
        yield layer_operations(run.model, linears[f"decoder.layers.{layer}"], shape)
    yield end_operations(run, stage, shape)
