"""What ranks that share a sequence do and send for core attention: a ring of latents, or heads against tokens.

A rank's tokens are an early and a late part of the sequence, so that every rank computes as many scores as any other.
Of blocks of the ring (`parallel/latent_ring.py`), CP of them:

- Rank 0's late tokens come behind everything: it makes keys and values of all blocks whole, and the others wait for it.
  Backward it makes all of them again, and goes back through each.
- A block goes on while another one is computed with, forward and backward, where a gradient in fp32 goes home beside
  it. What messages take longer than all that is computed with the blocks that come is waited for, and at the end
  the last gradient. "all_gather" waits for all blocks at once, and has no second round.
- "a2a" sends queries, keys, values and the result, and waits for each.

Letters as in `operations.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.ops.row_bytes import record_bytes
from dsv3_megatron.planning.time.operations import (
    CoreAttention,
    LatentRing,
    Linears,
    Movement,
    Product,
    SequenceExchange,
    Shape,
    WorkItem,
    WorkPart,
    linear_operations,
)

# The product that makes keys and values of latents.
EXPANSION = "linear_kv_up_proj"
_GRADIENT_BYTES = 4


def ring_operations(model: ModelConfig, linears: Linears, heads: int, shape: Shape) -> Iterator[WorkItem]:
    """Core attention to blocks made of latents, and what makes them.

    Args:
        model: The model.
        linears: Linears of the layer.
        heads: Attention heads of the rank.
        shape: The setting; its sequences are split.
    """
    forward, backward = [list(_of_block(model, linears, heads, shape, part)) for part in
                         (WorkPart.FORWARD, WorkPart.INPUT)]
    attention = _attention_to_block(model, heads, shape)
    others = shape.cp - 1
    for part, expansion in ((WorkPart.FORWARD, forward), (WorkPart.INPUT, backward)):
        block = [*expansion, attention[part]]
        for number in range(shape.cp):
            yield from (_beside_the_models(each, part) if number and not isinstance(each, CoreAttention) else each
                        for each in block)
        latents = shape.local_tokens * (model.kv_lora_rank + model.qk_rope_head_dim)
        narrow = record_bytes(model.kv_lora_rank) + model.qk_rope_head_dim * shape.value_bytes
        passed = shape.local_tokens * narrow if shape.narrows_latents else latents * shape.value_bytes
        grads = latents * _GRADIENT_BYTES
        going = passed if part is WorkPart.FORWARD else passed + grads
        if shape.cp_comm == "all_gather":
            going = 0.0 if part is WorkPart.FORWARD else grads
            if part is WorkPart.FORWARD:
                yield SequenceExchange(part, "latents of all ranks", others * passed)
        if going:
            yield LatentRing(part, "latents on their way", others, going, tuple(block * others))
        if part is WorkPart.INPUT:
            yield SequenceExchange(part, "the last gradient", grads)


def exchange_operations(model: ModelConfig, heads: int, shape: Shape) -> Iterator[WorkItem]:
    """What travels so that each rank has all tokens of some heads, and back; nothing where no sequence is split."""
    if shape.cp == 1:
        return
    rows = shape.tokens * heads * shape.value_bytes
    there = ("heads for tokens", rows * (2 * model.qk_head_dim + model.v_head_dim))
    back = ("tokens for heads", rows * model.v_head_dim)
    again = (there,) if "mla_up_proj" in shape.recomputed else ()
    for part, is_again, sent in ((WorkPart.FORWARD, False, (there, back)), (WorkPart.INPUT, False, (there, back)),
                                 (WorkPart.INPUT, True, again)):
        for name, num_bytes in sent:
            # Put in the order of ranks, and back in that of the sequence.
            yield Movement(part, name, "copy", 4 * num_bytes, is_again=is_again)
            yield SequenceExchange(part, name, num_bytes * (shape.cp - 1) / shape.cp, is_again)


def _of_block(model: ModelConfig, linears: Linears, heads: int, shape: Shape, part: WorkPart
              ) -> Iterator[Product | Movement]:
    """A block's keys and values, what is done with them beside attention, and backward the way back through them."""
    rows, wide = shape.tokens * heads, shape.value_bytes
    key, value, nope = model.qk_head_dim, model.v_head_dim, model.qk_nope_head_dim
    own = list(linear_operations(EXPANSION, linears, shape.tokens, shape))
    assembled = Movement(part, "keys of a block", "copy", rows * (nope + key) * wide)
    # Values brought to the keys' width; the sum over blocks in fp32.
    padded = rows * (value + key) * wide
    if part is WorkPart.FORWARD:
        yield from (each for each in own if each.part is WorkPart.FORWARD)
        yield assembled
        yield Movement(part, "sum over blocks", "copy", padded + rows * (2 * value * 4 + key * wide))
        return
    for each in own:
        is_again = each.part is WorkPart.FORWARD
        yield dataclasses.replace(each, part=part, is_again=is_again)
    yield dataclasses.replace(assembled, is_again=True)
    yield assembled
    # Result and gradient padded too; gradients of queries, keys and values added in fp32, and brought back.
    sums = rows * (key * 8 + (key + value) * (8 + wide) + (2 * key + value) * wide)
    yield Movement(part, "sum over blocks", "copy", 3 * padded + sums)


def _attention_to_block(model: ModelConfig, heads: int, shape: Shape) -> dict[WorkPart, CoreAttention]:
    """A rank's scores, in equal parts for each block."""
    # As many as of a whole sequence, over the ranks; on average a query meets half of the keys.
    pairs = shape.tokens * shape.seq_length / 2 * heads / shape.cp
    key, value = model.qk_head_dim, model.v_head_dim
    flops = 2 * pairs * (key + value)
    width = key if shape.value_bytes < 4 else value
    return {part: CoreAttention(part, "core_attention", (2 if is_backward else 1) * flops,
                                2 * pairs * ((3 * key + 2 * width) if is_backward else key + width),
                                shape.seq_length // shape.cp, is_backward, of_blocks=True)
            for part, is_backward in ((WorkPart.FORWARD, False), (WorkPart.INPUT, True))}


def _beside_the_models(operation: Product | Movement, part: WorkPart) -> Product | Movement:
    """An operation on another rank's block, which the model's own operations have once already."""
    return dataclasses.replace(operation, part=part, is_again=True)
