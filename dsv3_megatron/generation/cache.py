"""What attention keeps of the positions it has seen: MLA's latents, or keys and values at their full width.

A latent entry is the normed key/value latent and the rotated shared key of a position, 512 + 64 elements a layer for
DeepSeek-V3, whatever the number of heads; the full entry is every head's key and value, 71 times as much. A cache has
no notion of how many positions of a row are in use: readers mask what lies beyond their own position, so that a
rejected draft is forgotten by writing over it.

Shapes: L layers, B rows (sequences), C capacity (positions), W latent entry, N heads, D key width, U value width,
T tokens: of prompts packed behind each other, or Q new ones of each row, T = B Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.generation.cached_layers import LatentAttention
from dsv3_megatron.generation.decode import absorbed_attention, full_attention, tile_attention
from dsv3_megatron.ops.attention import causal_attention
from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.steady_sums import LEAST_ROWS

KV_CACHES = ("latent", "full", "training")


@dataclass(frozen=True)
class Places:
    """The places that tokens take in a cache, and what new ones may see.

    Attributes:
        rows_T: int64, the cache's row of each token.
        positions_T: int64, the position of each token in that row.
        limit: Positions up to here are looked at: the largest position + 1.
        hidden_BQC: True where position c < limit comes after token q's own; None where none does.
    """

    rows_T: torch.Tensor
    positions_T: torch.Tensor
    limit: int
    hidden_BQC: torch.Tensor | None = None


class KeyValueCache(Protocol):
    """What a model's attention reads and writes, whichever it is.

    Attributes:
        least_rows: Tokens that a step computes at least, copies of one among them where there are fewer, and rows that
            an expert's products take at least. More than 1: sums are those of `ops/steady_sums.py`.
    """

    least_rows: int

    def fill(self, layer: int, places: Places, entry_TW: torch.Tensor, key_TND: torch.Tensor, value_TNU: torch.Tensor
             ) -> None:
        """Keep prompts' positions, whose keys and values are at hand."""
        ...

    def attend(self, layer: int, places: Places, attention: LatentAttention, query_TND: torch.Tensor,
               entry_TW: torch.Tensor) -> torch.Tensor:
        """Keep new positions and attend from them to all of their rows so far: [T, N, U]."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; these are numbered anew, in this order."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a position over all layers, as allocated."""
        ...


class LatentCache:
    """Latents and rotated shared keys, beside each other; decoding is absorbed.

    Args:
        config: Configuration of the model.
        num_layers: Layers that keep something here.
        num_rows: Sequences that the cache holds.
        capacity: Positions of each.
        dtype: Dtype of the entries.
        device: Device of the entries.

    Source: DeepSeek-V3 report, section 2.1.1: only the boxed vectors of eq. 1 and 3 need to be cached. c_kv is kept
    after its norm, as in the published code.
    """

    least_rows = 1

    def __init__(self, config: MLATransformerConfig, *, num_layers: int, num_rows: int, capacity: int,
                 dtype: torch.dtype, device: torch.device) -> None:
        self.latent_width = config.kv_lora_rank
        width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        # Zeros: what is masked is multiplied by a probability of 0, and 0 times what memory holds may be NaN.
        self.entries_LBCW = torch.zeros(num_layers, num_rows, capacity, width, dtype=dtype, device=device)

    def fill(self, layer: int, places: Places, entry_TW: torch.Tensor, key_TND: torch.Tensor, value_TNU: torch.Tensor
             ) -> None:
        """Keep the entries of tokens, latent and shared key beside each other; keys and values are not kept."""
        self.entries_LBCW[layer][places.rows_T, places.positions_T] = entry_TW

    def attend(self, layer: int, places: Places, attention: LatentAttention, query_TND: torch.Tensor,
               entry_TW: torch.Tensor) -> torch.Tensor:
        """Keep the entries of new tokens, and give the attention of their queries to the cache, [T, N, U]."""
        entries_BCW = self.entries_LBCW[layer]
        entries_BCW[places.rows_T, places.positions_T] = entry_TW
        return absorbed_attention(
            query_TND, entries_BCW[:, :places.limit], attention.up_NXZ,
            attention.up_NUZ, softmax_scale=attention.softmax_scale, hidden_BQC=places.hidden_BQC)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which then count from 0 in this order."""
        self.entries_LBCW = rows_kept(self.entries_LBCW, rows)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position takes, over all layers."""
        return _bytes_per_position(self.entries_LBCW)


class FullCache:
    """Keys and values of this rank's heads, as attention without latents keeps them. Arguments as of LatentCache."""

    least_rows = 1

    def __init__(self, config: MLATransformerConfig, *, num_layers: int, num_rows: int, capacity: int,
                 dtype: torch.dtype, device: torch.device) -> None:
        # Heads before positions, so that a head's keys are one matrix.
        num_heads = config.num_attention_heads // config.tensor_model_parallel_size  # this rank's
        shape = (num_layers, num_rows, num_heads, capacity)
        self.keys_LBNCD = torch.zeros(
            *shape, config.qk_head_dim + config.qk_pos_emb_head_dim, dtype=dtype, device=device)
        self.values_LBNCU = torch.zeros(*shape, config.v_head_dim, dtype=dtype, device=device)

    def fill(self, layer: int, places: Places, entry_TW: torch.Tensor, key_TND: torch.Tensor, value_TNU: torch.Tensor
             ) -> None:
        """Keep the whole keys and values of tokens; entries are not kept."""
        _, _, heads, capacity, _ = self.keys_LBNCD.shape
        # Of each token and head its row among all heads' positions: rows in one piece are written several times faster.
        heads_N = torch.arange(heads, device=places.rows_T.device)
        at = (((places.rows_T * heads).unsqueeze(1) + heads_N) * capacity + places.positions_T.unsqueeze(1)).flatten()
        for stored_LBNC, new_TN in ((self.keys_LBNCD, key_TND), (self.values_LBNCU, value_TNU)):
            stored_BNC = stored_LBNC[layer]
            stored_BNC.view(-1, stored_BNC.shape[-1]).index_copy_(0, at, new_TN.to(stored_BNC.dtype).flatten(0, 1))

    def attend(self, layer: int, places: Places, attention: LatentAttention, query_TND: torch.Tensor,
               entry_TW: torch.Tensor) -> torch.Tensor:
        """Keep the keys and values of new tokens, and give the attention of their queries to the cache, [T, N, U]."""
        self.fill(layer, places, entry_TW, *attention.expand(entry_TW))
        keys_BNCD, values_BNCU = self.keys_LBNCD[layer], self.values_LBNCU[layer]
        return full_attention(
            query_TND, keys_BNCD[:, :, :places.limit], values_BNCU[:, :, :places.limit],
            softmax_scale=attention.softmax_scale, hidden_BQC=places.hidden_BQC)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which then count from 0 in this order."""
        self.keys_LBNCD, self.values_LBNCU = rows_kept(self.keys_LBNCD, rows), rows_kept(self.values_LBNCU, rows)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position takes, over all layers."""
        return _bytes_per_position(self.keys_LBNCD.transpose(2, 3)) + _bytes_per_position(
            self.values_LBNCU.transpose(2, 3))


class TrainingCache(FullCache):
    """Keys and values as FullCache keeps them; attention is computed by what training computes it with.

    On a CPU that is tiles of fp32 products (ops/attention.py), of which a step makes those of its new tokens, of all
    rows at once. Elsewhere it computes every position's attention anew at each step, of which the new tokens' is taken.
    Log-probabilities have the bits of a training forward that sums accordingly (`ops/steady_sums.py`), as that of a run
    of GRPO does. Arguments as of LatentCache.
    """

    # One row, and few rows, go through products and experts that are faster and sum in another order.
    least_rows = LEAST_ROWS

    def __init__(self, config: MLATransformerConfig, *, dtype: torch.dtype, device: torch.device, **sizes: int) -> None:
        # In the dtype that a CPU's attention multiplies in: what is kept is not made wide again at each step.
        super().__init__(config, dtype=wide_dtype(dtype) if device.type == "cpu" else dtype, device=device, **sizes)

    def attend(self, layer: int, places: Places, attention: LatentAttention, query_TND: torch.Tensor,
               entry_TW: torch.Tensor) -> torch.Tensor:
        """Keep the keys and values of new tokens, and give the attention of their queries to the cache, [T, N, U]."""
        self.fill(layer, places, entry_TW, *attention.expand(entry_TW, self.least_rows))
        keys_BNCD, values_BNCU = self.keys_LBNCD[layer], self.values_LBNCU[layer]
        if query_TND.device.type == "cpu":
            return tile_attention(query_TND, keys_BNCD[:, :, :places.limit], values_BNCU[:, :, :places.limit],
                                  softmax_scale=attention.softmax_scale, hidden_BQC=places.hidden_BQC)
        return _whole_attention(query_TND, keys_BNCD.transpose(1, 2), values_BNCU.transpose(1, 2),
                                places.positions_T, attention.softmax_scale)


def _whole_attention(query_TND: torch.Tensor, keys_BCND: torch.Tensor, values_BCNU: torch.Tensor,
                     positions_T: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """Attention of all positions of each row, of which the last ones' is taken: [T, N, U]."""
    num_rows = keys_BCND.shape[0]
    query_BQND = query_TND.view(num_rows, -1, *query_TND.shape[1:])
    ends = (positions_T.view(num_rows, -1)[:, -1] + 1).tolist()
    context = []
    for row, end in enumerate(ends):
        num_new = query_BQND.shape[1]
        query_SND = query_TND.new_zeros(end, *query_TND.shape[1:])
        query_SND[end - num_new:] = query_BQND[row]
        context_SNU = causal_attention(query_SND, keys_BCND[row, :end].contiguous(),
                                       values_BCNU[row, :end].contiguous(), softmax_scale=softmax_scale)
        context.append(context_SNU[end - num_new:])
    return torch.cat(context)


class NoCache:
    """Keeps nothing: for sequences that are run over once and not gone on with."""

    least_rows, bytes_per_token = 1, 0

    def fill(self, layer: int, places: Places, entry_TW: torch.Tensor, key_TND: torch.Tensor, value_TNU: torch.Tensor
             ) -> None:
        """Do nothing with the positions of prompts."""

    def attend(self, layer: int, places: Places, attention: LatentAttention, query_TND: torch.Tensor,
               entry_TW: torch.Tensor) -> torch.Tensor:
        """Refuse: there is nothing to attend to."""
        raise AssertionError("no position was kept")

    def keep(self, rows: Sequence[int]) -> None:
        """Do nothing: there are no rows."""


def make_cache(kind: str, config: MLATransformerConfig, *, num_layers: int, num_rows: int, capacity: int,
               dtype: torch.dtype, device: torch.device) -> KeyValueCache:
    """The cache called `kind`, empty.

    Raises:
        ConfigError: there is no such cache.
    """
    if kind not in KV_CACHES:
        raise ConfigError(f"kv_cache={kind!r} must be one of {', '.join(KV_CACHES)}")
    made: dict[str, type[LatentCache] | type[FullCache]] = {
        "latent": LatentCache, "full": FullCache, "training": TrainingCache}
    return made[kind](config, num_layers=num_layers, num_rows=num_rows, capacity=capacity, dtype=dtype, device=device)


def rows_kept(stored_LB: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Keep some rows of all layers, in a given order; what is stored may be overwritten, and only rows that move are
    copied.

    Args:
        stored_LB: What a cache has stored, [L, B, ...].
        rows: Rows to keep; one that comes several times is copied so often.
    """
    moved = [(new, old) for new, old in enumerate(rows) if new != old]
    if len(rows) > stored_LB.shape[1] or 2 * len(moved) > len(rows):
        return stored_LB[:, list(rows)]
    if moved:
        places, sources = map(list, zip(*moved, strict=True))
        stored_LB[:, places] = stored_LB[:, sources]
    return stored_LB[:, :len(rows)]


def _bytes_per_position(stored_LBC: torch.Tensor) -> int:
    layers, rows, positions = stored_LBC.shape[:3]
    return stored_LBC.numel() * stored_LBC.element_size() // (rows * positions)
