"""A model whose layers, heads and experts are on several ranks, run over prompts and over new tokens with a cache.

Every rank of a model has all tokens and goes through the same calls. A stage's ranks run its layers, each its part of
them (split_layers.py), and hand the hidden states to the ranks of all stages; logits come back from the last one the
same way. So each rank has what it would have alone, and what reads a `CachedModel` reads this. The main model only:
MTP modules, which draft, are left out.

It is made for layouts that a checkpoint is trained under, whatever they are, rather than for speed: stages wait for one
another.

Shapes: T tokens, H hidden, V vocabulary (v its part on this tensor-parallel rank).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.generation.cache import KeyValueCache, make_cache
from dsv3_megatron.generation.cached_layers import Norm, product_like
from dsv3_megatron.generation.forward import CachedModel, TokenRun
from dsv3_megatron.generation.split_layers import SplitLayer
from dsv3_megatron.model.attention import LocalMLASelfAttention
from dsv3_megatron.model.rotary import RotaryTables
from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.parallel.placement import placement


@dataclass(frozen=True)
class _OwnStage:
    """A stage's layers on this rank, the number of the first in this rank's cache, and the final norm if it is here."""

    layers: list[SplitLayer]
    first_layer: int
    norm: Norm | None


class SplitModel(CachedModel):
    """The layers and the head of a model, as far as they are on this rank. Gradients are off.

    Args:
        stages: This rank's stages, from local modules, in eval mode.
        parallel: Layout that they were built for.
        groups: The run's process groups.
        model_config: Configuration of the stages.

    Raises:
        ConfigError: a stage's attention is not this library's own.
    """

    def __init__(self, stages: Sequence[Any], parallel: ParallelConfig, groups: ProcessGroupCollection,
                 model_config: MLATransformerConfig) -> None:
        self.config, self._groups = model_config, groups
        self.device, self.num_mtp_layers = next(stages[0].parameters()).device, 0
        self.dtype: torch.dtype = model_config.params_dtype
        self._rotary, self._rotations_CP = RotaryTables(model_config), torch.empty(0)
        # Empty where another stage has them.
        self.embedding = self._head = torch.empty(0)
        self._ranks = groups.tp
        self._own: dict[int, _OwnStage] = {}
        self.num_layers = 0
        places = placement(parallel)
        # Of DualPipe's two copies of the model, that which enters at the first rank.
        self._owners = {place.stage: rank for rank, held in enumerate(places) for place in held if not place.direction}
        for stage, place in zip(stages, places[groups.pp.rank()], strict=True):
            if not place.direction:
                self._take(place.stage, stage)
        vocabulary = torch.tensor(len(self.embedding) * groups.tp.size(), device=self.device)
        torch.distributed.all_reduce(vocabulary, op=torch.distributed.ReduceOp.MAX, group=groups.pp)
        self.vocab_size = int(vocabulary)

    def _take(self, number: int, stage: Any) -> None:
        for layer in stage.decoder.layers:
            if not isinstance(layer.self_attention, LocalMLASelfAttention):
                raise ConfigError(f"transformer_impl: generation needs this library's attention, not "
                                  f"{type(layer.self_attention).__name__}; set transformer_impl=local")
        norm = getattr(stage.decoder, "final_layernorm", None)
        layers = [SplitLayer(layer, self._groups) for layer in stage.decoder.layers]
        self._own[number] = _OwnStage(layers, self.num_layers, None if norm is None else Norm(norm))
        self.num_layers += len(layers)
        if number == 0:
            self.embedding = stage.embedding.word_embeddings.weight
        if number == len(self._owners) - 1:
            self._head = stage.output_layer.weight
            self._multiply = product_like(self._head)

    def new_cache(self, kind: str, *, num_rows: int, capacity: int, is_mtp: bool = False) -> KeyValueCache:
        """An empty cache for this rank's layers.

        Raises:
            ConfigError: a cache of whole keys, which are those of all heads.
        """
        if kind != "latent":
            raise ConfigError(f"kv_cache={kind!r}: a model that several ranks share keeps latents; give latent")
        return make_cache(kind, self.config, num_layers=self.num_layers, num_rows=num_rows, capacity=capacity,
                          dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, *, least_rows: int = 1) -> torch.Tensor:
        """[..., H] -> [..., V], on every rank; arguments as of CachedModel."""
        compute = partial(super().logits, hidden, least_rows=least_rows)
        return self._from_stage(len(self._owners) - 1, compute, (*hidden.shape[:-1], self.vocab_size))

    @torch.no_grad()
    def scores(self, hidden_TH: torch.Tensor, tokens_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token and whether it is the likeliest, on every rank; as of CachedModel."""
        dtype, logits = wide_dtype(self.dtype), super().logits

        def compute() -> torch.Tensor:
            # One tensor is handed on: its second row is 1 where a token is the likeliest.
            return torch.stack([part.to(dtype) for part in self._scores(hidden_TH, tokens_T, logits)])

        logprobs_T, is_likeliest_T = self._from_stage(len(self._owners) - 1, compute, (2, len(tokens_T)), dtype)
        return logprobs_T, is_likeliest_T > 0

    def logprobs(self, hidden_TH: torch.Tensor, tokens_T: torch.Tensor, *, least_rows: int = 1) -> torch.Tensor:
        """Log-probability of each token, fp32 [T], on every rank."""
        return self.scores(hidden_TH, tokens_T)[0]

    # ---- parts of a pass ----------------------------------------------------------------------------

    def _main(self, tokens_T: torch.Tensor, run: TokenRun) -> torch.Tensor:
        shape = (len(tokens_T), self.config.hidden_size)
        x_TH = torch.empty(0)
        for number in range(len(self._owners)):
            x_TH = self._from_stage(number, partial(self._through, number, tokens_T, x_TH, run), shape)
        return x_TH

    def _through(self, number: int, tokens_T: torch.Tensor, x_TH: torch.Tensor, run: TokenRun) -> torch.Tensor:
        own = self._own[number]
        if number == 0:
            x_TH = self._embed(tokens_T)
        x_TH = replace(run, attend=lambda index, *rest: run.attend(own.first_layer + index, *rest)).through(
            own.layers, x_TH)
        return x_TH if own.norm is None else own.norm(x_TH)

    def _from_stage(self, number: int, compute: Callable[[], torch.Tensor], shape: tuple[int, ...],
                    dtype: torch.dtype | None = None) -> torch.Tensor:
        """What a stage's ranks compute, on the ranks of all stages."""
        group, owner = self._groups.pp, self._owners[number]
        if group.rank() == owner:
            result = compute().contiguous()
        else:
            result = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        if group.size() > 1:
            torch.distributed.broadcast(result, group=group, group_src=owner)
        return result
