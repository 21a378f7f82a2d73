"""A model's own modules run over prompts, and over new tokens with what came before in a cache.

Megatron-Core's layers cannot be handed a latent cache, and its dispatcher moves tokens between ranks that one process
does not have; so the layers' parts are called here in their order. Weights are those of the modules, none is copied.

Prompts of different lengths are packed behind each other into one row, as documents that do not see each other: no
position is padding. New tokens are as many for each sequence (one; two where a draft is verified), each sequence at a
position of its own.

Shapes: T prompt tokens of all sequences, Q new tokens of a sequence, B sequences, S = T or Q with B = 1 or B,
H hidden, K experts per token, R routed rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.generation.cache import KeyValueCache, Places, make_cache
from dsv3_megatron.model.attention import LocalMLASelfAttention
from dsv3_megatron.ops.attention import causal_attention
from dsv3_megatron.ops.experts import swiglu_experts
from dsv3_megatron.ops.linear import linear_forward

# Rotary tables are made for a multiple of this many positions, not anew for every token.
_TABLE_STEP = 1024
# Attention of one layer: module, normed input -> what the output projection reads.
_Attend = Callable[[LocalMLASelfAttention, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Prompts:
    """Sequences of ids packed into one row.

    Attributes:
        lengths: Tokens of each.
        tokens_T: Their ids, one sequence after the other.
    """

    lengths: tuple[int, ...]
    tokens_T: torch.Tensor

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> Prompts:
        """Put sequences, none of them empty, behind each other."""
        ids = list(itertools.chain.from_iterable(sequences))
        return cls(tuple(map(len, sequences)), torch.tensor(ids, device=device))

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where each begins, and the end."""
        return (0, *itertools.accumulate(self.lengths))

    def last_B(self) -> torch.Tensor:
        """Index in the row of each sequence's last token."""
        return torch.tensor(self.bounds[1:], device=self.tokens_T.device) - 1

    def shifted(self, next_B: torch.Tensor) -> torch.Tensor:
        """At each position the token after it; after a sequence's last one, `next_B`."""
        tokens_T = self.tokens_T.roll(-1)
        tokens_T[self.last_B()] = next_B
        return tokens_T


class CachedModel:
    """The layers, the head and the first MTP module of a stage that is a whole model.

    Args:
        stage: The only stage of a run of one process, from local modules, in eval mode.

    Raises:
        ConfigError: its attention is not this library's own.
    """

    def __init__(self, stage: Any) -> None:
        attention = stage.decoder.layers[0].self_attention
        if not isinstance(attention, LocalMLASelfAttention):
            raise ConfigError(f"transformer_impl: generation needs this library's attention, not "
                              f"{type(attention).__name__}; set transformer_impl=local")
        self.stage, self.config = stage, stage.config
        self.rotary = attention.rotary
        self.embedding: torch.Tensor = stage.embedding.word_embeddings.weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.num_mtp_layers: int = self.config.mtp_num_layers or 0

    def new_cache(self, kind: str, *, num_rows: int, capacity: int, is_mtp: bool = False) -> KeyValueCache:
        """An empty cache for the main model's layers, or for the MTP module's one."""
        return make_cache(kind, self.config, num_layers=1 if is_mtp else self.config.num_layers, num_rows=num_rows,
                          capacity=capacity, dtype=self.dtype, device=self.device)

    # ---- the main model ----------------------------------------------------------------------------

    def prefill(self, prompts: Prompts, cache: KeyValueCache) -> torch.Tensor:
        """Run prompts from their first token on; row b of the cache gets sequence b.

        Returns:
            [T, 1, H] after the final norm.
        """
        return self._main(self._embed(prompts.tokens_T.unsqueeze(1)), self._in_prompts(prompts, cache))

    def decode(self, tokens_BQ: torch.Tensor, positions: Sequence[int], cache: KeyValueCache) -> torch.Tensor:
        """Run new tokens of every row of the cache.

        Args:
            tokens_BQ: int64.
            positions: Of each row's first new token: as many of its tokens came before.
            cache: Holds those; gets these.

        Returns:
            [Q, B, H] after the final norm.
        """
        return self._main(self._embed(tokens_BQ.t()), self._in_cache(tokens_BQ.shape[1], positions, cache))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., V], of the main model and of the MTP module, which share the head."""
        return linear_forward(hidden, self.stage.output_layer.weight)

    def _main(self, x_SBH: torch.Tensor, attend: _Attend) -> torch.Tensor:
        for index, layer in enumerate(self.stage.decoder.layers):
            x_SBH = _run_layer(layer, index, x_SBH, attend)
        return self.stage.decoder.final_layernorm(x_SBH)

    # ---- the MTP module ----------------------------------------------------------------------------

    def mtp_prefill(self, prompts: Prompts, next_B: torch.Tensor, hidden_T1H: torch.Tensor, cache: KeyValueCache
                    ) -> torch.Tensor:
        """Run the MTP module over prompts: position i reads the main model's output there and token i + 1.

        Args:
            prompts: As of `prefill`.
            next_B: The token after each of them.
            hidden_T1H: What `prefill` returned.
            cache: The module's own.

        Returns:
            [T, 1, H]; the head makes of it the distribution of token i + 2.
        """
        return self._mtp(prompts.shifted(next_B).unsqueeze(1), hidden_T1H, self._in_prompts(prompts, cache))

    def mtp_decode(self, next_BQ: torch.Tensor, hidden_QBH: torch.Tensor, positions: Sequence[int],
                   cache: KeyValueCache) -> torch.Tensor:
        """Run the MTP module over new positions, whose main output is `hidden_QBH` and whose next tokens are `next_BQ`.

        Returns:
            [Q, B, H].
        """
        return self._mtp(next_BQ.t(), hidden_QBH, self._in_cache(next_BQ.shape[1], positions, cache))

    def _mtp(self, next_SB: torch.Tensor, hidden_SBH: torch.Tensor, attend: _Attend) -> torch.Tensor:
        """Source: DeepSeek-V3 report, eq. 21-22; embedding first, as the published `eh_proj` has it."""
        module = self.stage.mtp.layers[0]
        joined = torch.cat([module.enorm(self._embed(next_SB)), module.hnorm(hidden_SBH)], dim=-1)
        x_SBH, _ = module.eh_proj(joined)
        return module.final_layernorm(_run_layer(module.mtp_model_layer, 0, x_SBH, attend))

    # ---- places ------------------------------------------------------------------------------------

    def _embed(self, tokens_SB: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(tokens_SB, self.embedding)

    def _rotations(self, limit: int, positions_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [S, B, pairs] of positions below `limit`."""
        return self.rotary(math.ceil(limit / _TABLE_STEP) * _TABLE_STEP, self.embedding, positions_BS)

    def _in_prompts(self, prompts: Prompts, cache: KeyValueCache) -> _Attend:
        """Ordinary attention within each prompt, kept in the cache on the way."""
        positions = torch.cat([torch.arange(length) for length in prompts.lengths]).to(self.device)
        rows = torch.repeat_interleave(torch.arange(len(prompts.lengths)), torch.tensor(prompts.lengths))
        places = Places(rows.to(self.device), positions, max(prompts.lengths))
        cos, sin = self._rotations(places.limit, positions.unsqueeze(0))

        def attend(attention: LocalMLASelfAttention, layer: int, x_T1H: torch.Tensor) -> torch.Tensor:
            query, latent, shared_key = attention.project(x_T1H, cos, sin)
            key, value = attention.expand(latent, shared_key)
            cache.fill(layer, places, latent[:, 0], shared_key[:, 0], key[:, 0], value[:, 0])
            return causal_attention(query, key, value, softmax_scale=attention.softmax_scale,
                                    document_bounds=(prompts.bounds,))

        return attend

    def _in_cache(self, num_new: int, positions: Sequence[int], cache: KeyValueCache) -> _Attend:
        """Attention of new tokens to their rows of the cache."""
        starts_B = torch.tensor(positions)
        positions_QB = starts_B + torch.arange(num_new).unsqueeze(1)
        limit = max(positions) + num_new
        hidden_BQC = None
        if num_new > 1 or min(positions) != max(positions):
            hidden_BQC = (torch.arange(limit) > positions_QB.t().unsqueeze(-1)).to(self.device)
        rows_QB = torch.arange(len(positions)).expand_as(positions_QB).to(self.device)
        places = Places(rows_QB, positions_QB.to(self.device), limit, hidden_BQC)
        cos, sin = self._rotations(limit, places.positions.t())

        def attend(attention: LocalMLASelfAttention, layer: int, x_QBH: torch.Tensor) -> torch.Tensor:
            query, latent, shared_key = attention.project(x_QBH, cos, sin)
            return cache.attend(layer, places, attention, query, latent, shared_key)

        return attend


def _run_layer(layer: Any, index: int, x_SBH: torch.Tensor, attend: _Attend) -> torch.Tensor:
    """Attention and FFN, each with its norm before and its residual around."""
    attention = layer.self_attention
    context_SBNV = attend(attention, index, layer.input_layernorm(x_SBH))
    output_SBH, _ = attention.linear_proj(context_SBNV.flatten(2))
    x_SBH = x_SBH + output_SBH
    normed_SBH = layer.pre_mlp_layernorm(x_SBH)
    if isinstance(layer.mlp, MoELayer):
        return x_SBH + _run_experts(layer.mlp, normed_SBH)
    return x_SBH + layer.mlp(normed_SBH)[0]


def _run_experts(moe: Any, x_SBH: torch.Tensor) -> torch.Tensor:
    """Shared experts and, of each token, its routed ones. Source: DeepSeek-V3 report, eq. 12-16."""
    x_TH = x_SBH.flatten(0, 1)
    _scores, gates_TK, ids_TK = moe.router.choose(x_TH)
    expert_R = ids_TK.flatten()
    order_R = expert_R.argsort(stable=True)
    counts = torch.bincount(expert_R, minlength=moe.config.num_moe_experts).tolist()
    weights = moe.experts
    sorted_RH = swiglu_experts(x_TH[order_R // ids_TK.shape[1]], counts, weights.linear_fc1.weight,
                               weights.linear_fc2.weight, gates_TK.flatten()[order_R])
    routed_RH = torch.empty_like(sorted_RH)
    routed_RH[order_R] = sorted_RH
    output_SBH = routed_RH.view(*ids_TK.shape, -1).sum(1).view_as(x_SBH)
    return output_SBH if moe.shared_experts is None else output_SBH + moe.shared_experts(x_SBH)
