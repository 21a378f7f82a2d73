"""A model run over prompts, and over new tokens with what came before in a cache.

Prompts of different lengths are packed behind each other into one row, as documents that do not see each other: no
position is padding. New tokens are as many for each sequence (one; two where a draft is verified), each sequence at a
position of its own. Both go through the same layers (cached_layers.py); how they attend is different.

Shapes: T prompt tokens of all sequences, or B Q new ones; Q new tokens of a sequence, B sequences, S = T or Q with
B = 1 or B, H hidden, P rotated pairs, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.generation.cache import KeyValueCache, Places, make_cache
from dsv3_megatron.generation.cached_layers import LatentAttention, Layer, Norm, multiply_at_least, product_like
from dsv3_megatron.model.attention import LocalMLASelfAttention
from dsv3_megatron.ops.attention import causal_attention
from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.cross_entropy import linear_cross_entropy
from dsv3_megatron.ops.local_scores import is_among

# Rotary tables are made for a multiple of this many positions, not anew for every token.
_TABLE_STEP = 1024
# Tokens whose logits are in memory at once where all of them are scored.
_SCORED_TOKENS = 256


@dataclass(frozen=True)
class Prompts:
    """Sequences of ids packed into one row.

    Attributes:
        lengths: Tokens of each sequence.
        tokens_T: Ids of all sequences, one sequence after the other.
    """

    lengths: tuple[int, ...]
    tokens_T: torch.Tensor

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> Prompts:
        """Put sequences, none of them empty, behind each other."""
        ids = list(itertools.chain.from_iterable(sequences))
        return cls(tuple(map(len, sequences)), torch.tensor(ids, device=device))

    @classmethod
    def pack_distinct(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Prompts, list[int]]:
        """Put sequences behind each other, those that are alike once; with each sequence's number among them."""
        number: dict[tuple[int, ...], int] = {}
        numbers = [number.setdefault(tuple(ids), len(number)) for ids in sequences]
        return cls.pack(tuple(number), device), numbers

    @property
    def bounds(self) -> tuple[int, ...]:
        """The first position of each sequence, and the end of the last one."""
        return (0, *itertools.accumulate(self.lengths))

    def last_B(self) -> torch.Tensor:
        """Index in the row of each sequence's last token."""
        return torch.tensor(self.bounds[1:], device=self.tokens_T.device) - 1

    def shifted(self, next_B: torch.Tensor) -> torch.Tensor:
        """Give the token after each position; after a sequence's last one, `next_B`."""
        tokens_T = self.tokens_T.roll(-1)
        tokens_T[self.last_B()] = next_B
        return tokens_T


@dataclass(frozen=True)
class TokenRun:
    """Tokens on their way through the layers. Fewer than `least_rows` go with copies of the first of them.

    Attributes:
        attend: Function by which they attend in a layer, given its number.
        rotations_TP: Rotations of their positions.
        least_rows: Rows that go through a layer, and that an expert's products take, at least.
    """

    attend: Callable[[int, LatentAttention, torch.Tensor, torch.Tensor], torch.Tensor]
    rotations_TP: torch.Tensor
    least_rows: int = 1

    def through(self, layers: Sequence[Layer], x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H], in place unless rows are added on the way."""
        num_tokens = len(x_TH)
        if num_tokens < self.least_rows:
            return self._with_copies(num_tokens).through(layers, _padded(x_TH, self.least_rows))[:num_tokens]
        for index, layer in enumerate(layers):
            x_TH = layer(x_TH, self.rotations_TP, partial(self.attend, index), self.least_rows)
        return x_TH

    def _with_copies(self, num_tokens: int) -> TokenRun:
        """Describe a run of the same tokens and copies of the first behind them, of which attention sees none."""

        def attend(index: int, attention: LatentAttention, query_TND: torch.Tensor, entry_TW: torch.Tensor
                   ) -> torch.Tensor:
            context = self.attend(index, attention, query_TND[:num_tokens], entry_TW[:num_tokens])
            return _padded(context, self.least_rows)

        return TokenRun(attend, _padded(self.rotations_TP, self.least_rows), self.least_rows)


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Put copies of the first row behind the rows that there are, until they are `count`."""
    return torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])])


def gathered_features(part: torch.Tensor, ranks: torch.distributed.ProcessGroup) -> torch.Tensor:
    """The features of all tensor-parallel ranks side by side, [T, each] -> [T, all], of this rank's part of them."""
    if ranks.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(ranks.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=ranks)
    return torch.cat(parts, dim=-1)


class CachedModel:
    """The layers, the head and the first MTP module of a stage that is a whole model. Gradients are off.

    Tensor-parallel ranks share a model: all of them call with the same tokens, and get the same results.

    Args:
        stage: The only stage of a replica, from local modules, in eval mode; every rank of it has all experts.

    Raises:
        ConfigError: the stage's attention is not this library's own.
    """

    def __init__(self, stage: Any) -> None:
        attention = stage.decoder.layers[0].self_attention
        if not isinstance(attention, LocalMLASelfAttention):
            raise ConfigError(f"transformer_impl: generation needs this library's attention, not "
                              f"{type(attention).__name__}; set transformer_impl=local")
        self.config = stage.config
        self.embedding: torch.Tensor = stage.embedding.word_embeddings.weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self._rotary, self._rotations_CP = attention.rotary, torch.empty(0)
        self._layers, self._norm = list(map(Layer, stage.decoder.layers)), Norm(stage.decoder.final_layernorm)
        self._head: torch.Tensor = stage.output_layer.weight
        self._ranks = stage.pg_collection.tp
        self.vocab_size = len(self._head) * self._ranks.size()
        self._multiply = product_like(self._head)
        self.num_mtp_layers: int = self.config.mtp_num_layers or 0
        self._mtp = _MTP(stage.mtp.layers[0], self._ranks) if self.num_mtp_layers else None

    def new_cache(self, kind: str, *, num_rows: int, capacity: int, is_mtp: bool = False) -> KeyValueCache:
        """An empty cache for the main model's layers, or for the MTP module's one."""
        return make_cache(kind, self.config, num_layers=1 if is_mtp else self.config.num_layers, num_rows=num_rows,
                          capacity=capacity, dtype=self.dtype, device=self.device)

    # ---- the main model ----------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Prompts, cache: KeyValueCache) -> torch.Tensor:
        """Run prompts from their first token on; row b of the cache gets sequence b.

        Returns:
            [T, 1, H] after the final norm.
        """
        return self._main(prompts.tokens_T, self._in_prompts(prompts, cache)).unsqueeze(1)

    @torch.no_grad()
    def decode(self, tokens_BQ: torch.Tensor, positions: Sequence[int], cache: KeyValueCache) -> torch.Tensor:
        """Run new tokens of every row of the cache.

        Args:
            tokens_BQ: int64 ids of the new tokens, Q for each row.
            positions: Position of each row's first new token: as many of its tokens came before.
            cache: Cache that holds those, and gets these.

        Returns:
            [Q, B, H] after the final norm.
        """
        hidden_TH = self._main(tokens_BQ.flatten(), self._in_cache(tokens_BQ.shape[1], positions, cache))
        return hidden_TH.view(*tokens_BQ.shape, -1).transpose(0, 1)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, *, least_rows: int = 1) -> torch.Tensor:
        """[..., H] -> [..., V], of the main model and of the MTP module, which share the head.

        Args:
            hidden: Hidden states after the final norm.
            least_rows: Rows that are multiplied at least, a cache's; zeros where there are fewer.
        """
        rows_TH = hidden.reshape(-1, hidden.shape[-1])
        part_TV = multiply_at_least(self._multiply, rows_TH, self._head, least_rows)
        return gathered_features(part_TV, self._ranks).reshape(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def logprobs(self, hidden_TH: torch.Tensor, tokens_T: torch.Tensor, *, least_rows: int = 1) -> torch.Tensor:
        """Log-probability of each token, fp32 [T], by the function that training computes its losses with.

        Args:
            hidden_TH: Hidden states after the final norm that the tokens were chosen from.
            tokens_T: int64 ids.
            least_rows: Rows that are multiplied at least, a cache's, also in the last of several products; zeros where
                there are fewer.
        """
        num_added = -len(tokens_T) % least_rows
        padded_TH = torch.nn.functional.pad(hidden_TH, (0, 0, 0, num_added))
        losses_T = linear_cross_entropy(padded_TH, self._head, torch.nn.functional.pad(tokens_T, (0, num_added)),
                                        vocabulary_group=self._ranks)
        return -losses_T[:len(tokens_T)]

    @torch.no_grad()
    def scores(self, hidden_TH: torch.Tensor, tokens_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token, and whether it is the likeliest.

        Args:
            hidden_TH: Hidden states after the final norm that the tokens follow.
            tokens_T: int64 ids.

        Returns:
            fp32 [T] in nats (fp64 from fp64), and bool [T].
        """
        return self._scores(hidden_TH, tokens_T, self.logits)

    def _scores(self, hidden_TH: torch.Tensor, tokens_T: torch.Tensor,
                logits: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, is_likeliest = [], []
        for rows_TH, ids_T in zip(hidden_TH.split(_SCORED_TOKENS), tokens_T.split(_SCORED_TOKENS), strict=True):
            logits_TV = logits(rows_TH)
            logits_TV = logits_TV.to(wide_dtype(logits_TV.dtype))
            chosen_T = logits_TV.gather(1, ids_T.unsqueeze(1)).squeeze(1)
            logprobs.append(chosen_T - logits_TV.logsumexp(dim=-1))
            is_likeliest.append(logits_TV.argmax(dim=-1) == ids_T)
        return torch.cat(logprobs), torch.cat(is_likeliest)

    def _main(self, tokens_T: torch.Tensor, run: TokenRun) -> torch.Tensor:
        return self._norm(run.through(self._layers, self._embed(tokens_T)))

    # ---- the MTP module ----------------------------------------------------------------------------

    @torch.no_grad()
    def mtp_prefill(self, prompts: Prompts, next_B: torch.Tensor, hidden_T1H: torch.Tensor, cache: KeyValueCache
                    ) -> torch.Tensor:
        """Run the MTP module over prompts: position i reads the main model's output there and token i + 1.

        Args:
            prompts: The sequences that `prefill` was given.
            next_B: The token after each of them.
            hidden_T1H: Hidden states that `prefill` returned.
            cache: The module's own.

        Returns:
            [T, 1, H]; the head makes of it the distribution of token i + 2.
        """
        run = self._in_prompts(prompts, cache)
        return self._draft(prompts.shifted(next_B), hidden_T1H.squeeze(1), run).unsqueeze(1)

    @torch.no_grad()
    def mtp_decode(self, next_BQ: torch.Tensor, hidden_QBH: torch.Tensor, positions: Sequence[int],
                   cache: KeyValueCache) -> torch.Tensor:
        """Run the MTP module over new positions, whose main output is `hidden_QBH` and whose next tokens are `next_BQ`.

        Returns:
            [Q, B, H].
        """
        run = self._in_cache(next_BQ.shape[1], positions, cache)
        drafting_TH = self._draft(next_BQ.flatten(), hidden_QBH.transpose(0, 1).flatten(0, 1), run)
        return drafting_TH.view(*next_BQ.shape, -1).transpose(0, 1)

    def _draft(self, next_T: torch.Tensor, hidden_TH: torch.Tensor, run: TokenRun) -> torch.Tensor:
        assert self._mtp is not None, "the model has an MTP module"
        return self._mtp(self._embed(next_T), hidden_TH, run)

    # ---- places ------------------------------------------------------------------------------------

    def _embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        if self._ranks.size() == 1:
            return torch.nn.functional.embedding(tokens_T, self.embedding)
        own_T = tokens_T - self._ranks.rank() * len(self.embedding)
        is_here_T = is_among(own_T, len(self.embedding))
        part_TH = torch.nn.functional.embedding(own_T.where(is_here_T, 0), self.embedding)
        part_TH = part_TH.where(is_here_T[:, None], 0.0)
        torch.distributed.all_reduce(part_TH, group=self._ranks)
        return part_TH

    def _rotations(self, limit: int, positions_T: torch.Tensor) -> torch.Tensor:
        """cos + i sin of positions below `limit`, [T, P]."""
        if self._rotations_CP.shape[0] < limit:
            length = math.ceil(limit / _TABLE_STEP) * _TABLE_STEP
            self._rotations_CP = torch.complex(*self._rotary(length, torch.empty(
                0, dtype=self.dtype, device=self.device)))
        return self._rotations_CP[positions_T]

    def _in_prompts(self, prompts: Prompts, cache: KeyValueCache) -> TokenRun:
        """Ordinary attention within each prompt, kept in the cache on the way."""
        positions_T = torch.cat([torch.arange(length) for length in prompts.lengths]).to(self.device)
        rows_T = torch.repeat_interleave(torch.arange(len(prompts.lengths)), torch.tensor(prompts.lengths))
        places = Places(rows_T.to(self.device), positions_T, max(prompts.lengths))

        def attend(layer: int, attention: LatentAttention, query_TND: torch.Tensor, entry_TW: torch.Tensor
                   ) -> torch.Tensor:
            key_TND, value_TNU = attention.expand(entry_TW, cache.least_rows)
            cache.fill(layer, places, entry_TW, key_TND, value_TNU)
            context_T1NV = causal_attention(
                query_TND.unsqueeze(1), key_TND.unsqueeze(1), value_TNU.unsqueeze(1),
                softmax_scale=attention.softmax_scale, document_bounds=(prompts.bounds,),
                is_steady=cache.least_rows > 1)
            return context_T1NV.squeeze(1)

        return TokenRun(attend, self._rotations(places.limit, positions_T), cache.least_rows)

    def _in_cache(self, num_new: int, positions: Sequence[int], cache: KeyValueCache) -> TokenRun:
        """Attention of new tokens to their rows of the cache."""
        positions_BQ = torch.tensor(positions).unsqueeze(1) + torch.arange(num_new)
        limit = max(positions) + num_new
        hidden_BQC = None
        if num_new > 1 or min(positions) != max(positions):
            hidden_BQC = (torch.arange(limit) > positions_BQ.unsqueeze(-1)).to(self.device)
        rows_T = torch.arange(len(positions)).repeat_interleave(num_new).to(self.device)
        places = Places(rows_T, positions_BQ.flatten().to(self.device), limit, hidden_BQC)

        def attend(layer: int, attention: LatentAttention, query_TND: torch.Tensor, entry_TW: torch.Tensor
                   ) -> torch.Tensor:
            return cache.attend(layer, places, attention, query_TND, entry_TW)

        return TokenRun(attend, self._rotations(limit, places.positions_T), cache.least_rows)


class _MTP:
    """The first MTP module. Source: DeepSeek-V3 report, eq. 21-22; embedding first, as the published `eh_proj`."""

    def __init__(self, module: Any, ranks: torch.distributed.ProcessGroup) -> None:
        self._ranks = ranks
        self._embedding_norm, self._hidden_norm = Norm(module.enorm), Norm(module.hnorm)
        self._joining: torch.Tensor = module.eh_proj.weight
        self._layers, self._norm = [Layer(module.mtp_model_layer)], Norm(module.final_layernorm)
        self._multiply = product_like(self._joining)

    def __call__(self, embedded_TH: torch.Tensor, hidden_TH: torch.Tensor, run: TokenRun) -> torch.Tensor:
        """[T, H], twice -> [T, H]."""
        joined = torch.cat([self._embedding_norm(embedded_TH), self._hidden_norm(hidden_TH)], dim=-1)
        x_TH = gathered_features(self._multiply(joined, self._joining), self._ranks)
        return self._norm(run.through(self._layers, x_TH))
