"""Core attention of ranks that share a sequence, on a ledger: in a ring of latents, and heads against tokens.

Conventions as in `operation_passes.py`. The ring looks at one block of tokens at a time: what it makes of a block is
gone before the next one is expanded. So what is written down is the block that costs most, a rank's own, of which it
looks at everything; of any other it looks at one half with all queries, or with one half of them at all.
"""

from __future__ import annotations

from dataclasses import replace

from dsv3_megatron.ops.row_bytes import record_bytes
from dsv3_megatron.planning.memory.ledger import Tensor
from dsv3_megatron.planning.memory.operation_passes import LinearPass, Operations, core_attention_pass
from dsv3_megatron.planning.memory.settings import WIDE

# ops/block_attention.py: tiles of a CPU, and those of a GPU where no fused kernel is.
_TILE_BYTES = {"cpu": 1 << 20, "cuda": 512 << 20}


class RingAttentionPass:
    """Attention to blocks made of latents that ranks pass (`parallel/latent_ring.py`); `output` is the caller's.

    Keeps queries, what was passed, the result and the log-sum-exp; under `all_gather` what all ranks passed.
    """

    def __init__(self, ops: Operations, query: Tensor, passed: Tensor) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops, self.query, self.passed = ops, query, passed
        self.rows = s.tokens * s.heads
        self.is_fused = s.device == "cuda" and s.narrow < WIDE
        working = self._queries()
        wide = ledger.make("wide context", self.rows * s.value * WIDE)
        self.statistics = ledger.make("attention log-sum-exp", self.rows * WIDE)
        self.gathered = ledger.make("latents of all ranks", (s.cp if self._gathers else 0) * self._travelling())
        arriving = self._arriving()
        key, linear = self._expand()
        if self.is_fused:
            result = self.rows * s.query * s.narrow
            ledger.pulse(result + max(result, self.rows * s.value * WIDE))
        else:
            ledger.pulse(self.rows * (s.query + s.value) * WIDE + 2 * _TILE_BYTES[s.device])
        ledger.drop(key, linear.output, linear.x, *arriving)
        narrow = ledger.make("context", self.rows * s.value * s.narrow)
        ledger.drop(wide, *working)
        ledger.keep(query, passed, narrow)
        self.output = narrow
        self.output.is_held = s.holds_attention_result

    @property
    def _gathers(self) -> bool:
        return self.ops.s.cp_comm == "all_gather"

    def _queries(self) -> list[Tensor]:
        """Queries as products in tiles want them; a kernel takes them as they are."""
        ops = self.ops
        return [] if self.is_fused else [ops.ledger.make("scaled queries", self.rows * ops.s.query * WIDE)]

    def _arriving(self) -> list[Tensor]:
        """The next block, on its way; where it is narrow, also the one that is there, and what was made of it again."""
        ledger, is_narrow = self.ops.ledger, self.ops.s.narrows_latents
        own = [ledger.make("latents as they were", self.passed.size)] if is_narrow else []
        blocks = 0 if self._gathers else 1 + is_narrow
        return [*own, *(ledger.make("latents on their way", self._travelling()) for _ in range(blocks))]

    def _travelling(self) -> int:
        """Bytes of a block on its way."""
        s = self.ops.s
        narrow = s.local_tokens * (record_bytes(s.latent) + s.rope * s.narrow)
        return narrow if s.narrows_latents else self.passed.size

    def _expand(self) -> tuple[Tensor, LinearPass]:
        """Keys of a block, and the product that they and the values are of."""
        ops, s, ledger = self.ops, self.ops.s, self.ops.ledger
        latent = ledger.make("latent of a block", s.tokens * s.latent * s.narrow if s.tp > 1 else 0)
        shared = ledger.make("shared key of a block", s.tokens * s.rope * s.narrow if s.tp > 1 else 0)
        linear = ops.linear(latent, "keys and values", s.tokens, "self_attention.linear_kv_up_proj")
        key = ledger.make("key", self.rows * s.query * s.narrow)
        ledger.drop(latent, shared)
        return key, linear

    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """Go back to the gradients of queries and of what was passed, by name; `grad` is used up."""
        ledger, s = self.ops.ledger, self.ops.s
        for tensor in (self.query, self.passed):
            ledger.need(tensor)
        working = [*self._queries(), ledger.make("wide gradient of query", self.rows * s.query * WIDE)]
        if not self.is_fused:
            working.append(ledger.make("wide gradient of context", self.rows * s.value * WIDE))
            ledger.pulse(2 * self.rows * s.value * WIDE)
        numel = s.local_tokens * (s.latent + s.rope)
        home = ledger.make("wide gradient of passed latents", numel * WIDE)
        # The next block, a gradient that is sent home and one that comes.
        around = [*self._arriving(), ledger.make("gradients on their way", 2 * numel * WIDE)]
        self._backward_block()
        ledger.drop(*around)
        results = {"query": ledger.make("gradient of query", self.rows * s.query * s.narrow),
                   "passed": ledger.make("gradient of passed latents", numel * s.narrow)}
        ledger.drop(home, *working, self.query, self.passed, self.output, self.statistics, self.gathered, grad)
        return results

    def _backward_block(self) -> None:
        """Keys and values again, their gradients, and through both to the latents."""
        ops, ledger, s = self.ops, self.ops.ledger, self.ops.s
        key, linear = self._expand()
        both = s.query + s.value
        wide = ledger.make("wide gradients of keys and values", self.rows * both * WIDE)
        grads = ledger.make("gradients of keys and values", self.rows * both * s.narrow)
        if self.is_fused:
            # Outputs, their gradients and values as wide as keys; the kernel's three gradients, one of them in fp32.
            padded = self.rows * s.query * s.narrow
            ledger.pulse(2 * padded + max(padded + 3 * padded + self.rows * s.query * WIDE - grads.size, 3 * padded))
        else:
            ledger.pulse(self.rows * both * WIDE + 3 * _TILE_BYTES[s.device])
        ledger.drop(wide)
        grad_up = ledger.make("gradient of keys and values", self.rows * (s.nope + s.value) * s.narrow)
        latent = linear.backward(grad_up, may_wait=False)
        ledger.drop(key, linear.output, grads, grad_up, ops.scatter(latent, s.latent))


class ExchangedAttentionPass:
    """Attention to whole sequences by a part of the heads (`parallel/head_exchange.py`); `output` is the caller's.

    Args:
        ops: Operations on the caller's ledger.
        query: Queries of a part of the tokens, by all heads.
        key: Keys of them.
        key_value: Keys without their rotary part, and values, of them. All three are used up.
        work: Bytes beside all three when they are made again; None: what core attention looks at is kept.
    """

    def __init__(self, ops: Operations, query: Tensor, key: Tensor, key_value: Tensor, work: int | None) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops = ops
        rows = s.tokens * s.heads
        sizes = {"query": query.size, "key": key.size, "value": rows * s.value * s.narrow}
        operands = [self._exchange(name, size) for name, size in sizes.items()]
        if work is not None:
            ledger.make_again(*operands, work=work + query.size + key.size + key_value.size)
        ledger.drop(query, key, key_value)
        self.core = core_attention_pass(replace(ops, s=s.of_some_heads()), *operands)
        ledger.drop(*operands)
        self.output = self._exchange("context", self.core.output.size)
        ledger.drop(self.core.output)

    def _exchange(self, name: str, size: int) -> Tensor:
        """What has travelled, put in order: beside it, what was sent and what came."""
        self.ops.ledger.pulse(2 * size)
        made = self.ops.ledger.make(name, size)
        self.ops.ledger.pulse(2 * size)
        return made

    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """Go back to the gradients of queries, keys and values, by name; `grad` is used up."""
        back = self._exchange("gradient of context", grad.size)
        self.ops.ledger.drop(grad)
        results = self.core.backward(back)
        for name in ("value", "key", "query"):
            whole = results[name]
            results[name] = self._exchange(f"gradient of {name}", whole.size)
            self.ops.ledger.drop(whole)
        return results
