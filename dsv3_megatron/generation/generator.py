"""Prompts in batches, and their tokens as they come.

A batch is prefilled at once and decoded until its last sequence has ended; a sequence that ends earlier leaves it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.generation.cache import KV_CACHES
from dsv3_megatron.generation.forward import CachedModel
from dsv3_megatron.generation.sampling import Sampling, UniformStreams
from dsv3_megatron.generation.speculative import PlainDecoder, SpeculativeDecoder

SPECULATIVE = ("mtp",)
# Why a sequence ended.
END_OF_TEXT, MAX_NEW_TOKENS, CONTEXT, ASKED = "end-of-text", "max-new-tokens", "context", "asked"


@dataclass(frozen=True)
class Options:
    """The settings of a generation.

    Attributes:
        max_new_tokens: Most new tokens of each prompt.
        max_length: Positions of a sequence, prompt included: the model's context.
        sampling: Rule by which tokens are chosen.
        kv_cache: "latent", "full" or "training".
        speculative: "mtp", or None for one token a step.
        batch_size: Prompts that are decoded together.
        stop_ids: Tokens that end a sequence; the first of them does.
        has_ended: Says after each step, of a prompt's number and its newest ids, whether its sequence shall end behind
            them. None: nothing but the settings above ends one.
    """

    max_new_tokens: int
    max_length: int
    sampling: Sampling = field(default_factory=Sampling)
    kv_cache: str = "latent"
    speculative: str | None = None
    batch_size: int = 1
    stop_ids: tuple[int, ...] = ()
    has_ended: Callable[[int, Sequence[int]], bool] | None = None

    def validate(self, num_mtp_layers: int) -> None:
        """Check the settings against each other and the model.

        Raises:
            ConfigError: the first that is wrong, with the way out.
        """
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.kv_cache not in KV_CACHES:
            raise ConfigError(f"kv_cache={self.kv_cache!r} must be one of {', '.join(KV_CACHES)}")
        if self.speculative not in (None, *SPECULATIVE):
            raise ConfigError(f"speculative={self.speculative!r} must be one of {', '.join(SPECULATIVE)}; leave it out "
                              "for one token a step")
        if self.speculative == "mtp" and num_mtp_layers == 0:
            raise ConfigError("speculative=mtp needs a checkpoint with an MTP module, and this one has none "
                              "(mtp_num_layers=0); leave out --speculative")
        self.sampling.validate()

    def check_prompt(self, ids: Sequence[int], vocab_size: int, where: str) -> None:
        """Check that a prompt can be continued.

        Args:
            ids: Tokens of the prompt.
            vocab_size: Rows of the model's embedding.
            where: What to call it in messages.

        Raises:
            ConfigError: the prompt is empty, leaves no room for a token, or has an id that the model does not have.
        """
        if not ids:
            raise ConfigError(f"{where} is empty; a model goes on from at least one token")
        if len(ids) >= self.max_length:
            raise ConfigError(f"{where} has {len(ids)} tokens, and the model's context is max_position_embeddings="
                              f"{self.max_length} with at least one new token in it; shorten the prompt")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ConfigError(f"{where} has the ids {min(ids)} to {max(ids)}; they must lie in 0..{vocab_size - 1} "
                              f"(the model's vocab_size={vocab_size})")


@dataclass(frozen=True)
class NewTokens:
    """What came next of one prompt.

    Attributes:
        prompt: Number of the prompt among those that were given.
        ids: New ids, the end token not among them.
        ended: Reason of its end; None while it goes on.
        end_id: The end token that ended it; None where none did.
        states_TH: Hidden states that the new ids, and the end token behind them, were chosen from.
    """

    prompt: int
    ids: tuple[int, ...]
    ended: str | None
    end_id: int | None = None
    states_TH: torch.Tensor | None = None


@dataclass
class GenerationStatistics:
    """What a generation took so far; tokens are those that count towards the output, the end token included."""

    num_prompt_tokens: int = 0
    num_first_tokens: int = 0
    num_decoded_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_steps: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    cache_bytes_per_token: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of new tokens in all."""
        return self.num_first_tokens + self.num_decoded_tokens

    @property
    def decoded_tokens_per_s(self) -> float:
        """Tokens per second of the steps after the prefill; 0 before the first."""
        return self.num_decoded_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafts that stood; None where none was made."""
        return self.num_accepted / self.num_drafts if self.num_drafts else None


@dataclass
class _Sequence:
    """A prompt that is being continued."""

    prompt: int
    room: int
    room_ends: str


class Generator:
    """Continues prompts with a model.

    Args:
        model: The model.
        options: Settings of the generation, validated.

    Attributes:
        statistics: Counts and times of everything generated so far.
    """

    def __init__(self, model: CachedModel, options: Options) -> None:
        options.validate(model.num_mtp_layers)
        self.model, self.options = model, options
        self.statistics = GenerationStatistics()

    def generate(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None) -> Iterator[NewTokens]:
        """Continue each prompt, batch after batch.

        Args:
            prompts: Ids of each prompt.
            numbers: Number of each, which its draws follow from; None: its place among the prompts.

        Yields:
            New tokens of a prompt, whichever has some; the last of each says why it ended.

        Raises:
            ConfigError: before anything is computed, a prompt that cannot be continued.
        """
        for number, ids in enumerate(prompts):
            self.options.check_prompt(ids, self.model.vocab_size, f"prompt {number + 1}")
        return itertools.chain.from_iterable(
            self._continue(first, prompts[first: first + self.options.batch_size],
                           (numbers or range(len(prompts)))[first: first + self.options.batch_size])
            for first in range(0, len(prompts), self.options.batch_size))

    def _continue(self, first: int, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> Iterator[NewTokens]:
        options, statistics = self.options, self.statistics
        active = [self._sequence(first + row, len(ids)) for row, ids in enumerate(prompts)]
        made = SpeculativeDecoder if options.speculative else PlainDecoder
        with torch.inference_mode():
            started = time.perf_counter()
            decoder = made(
                self.model, prompts, sampling=options.sampling, kv_cache=options.kv_cache,
                streams=UniformStreams(options.sampling.seed, numbers),
                max_new_tokens=max(sequence.room for sequence in active))
            new = decoder.start()
        statistics.prefill_s += time.perf_counter() - started
        statistics.num_prompt_tokens += sum(map(len, prompts))
        statistics.cache_bytes_per_token = decoder.cache_bytes_per_token
        events, counted = self._take(active, new, decoder.states)
        statistics.num_first_tokens += counted
        yield from events
        while going := [row for row, event in enumerate(events) if event.ended is None]:
            before = _drafts(decoder)
            with torch.inference_mode():
                started = time.perf_counter()
                if len(going) < len(active):
                    decoder.keep(going)
                new = decoder.step()
            statistics.decode_s += time.perf_counter() - started
            statistics.num_steps += 1
            drafts, accepted = (now - then for now, then in zip(_drafts(decoder), before, strict=True))
            statistics.num_drafts += drafts
            statistics.num_accepted += accepted
            active = [active[row] for row in going]
            events, counted = self._take(active, new, decoder.states)
            statistics.num_decoded_tokens += counted
            yield from events

    def _sequence(self, prompt: int, length: int) -> _Sequence:
        left = self.options.max_length - length
        if left < self.options.max_new_tokens:
            return _Sequence(prompt, left, CONTEXT)
        return _Sequence(prompt, self.options.max_new_tokens, MAX_NEW_TOKENS)

    def _take(self, active: Sequence[_Sequence], new: Sequence[list[int]], states: Sequence[torch.Tensor]
              ) -> tuple[list[NewTokens], int]:
        """What each sequence makes of its new tokens and their hidden states, and how many of these counted."""
        events, counted = [], 0
        for sequence, ids, states_TH in zip(active, new, states, strict=True):
            ids, ended, end_id = ids[:sequence.room], None, None
            end = next((at for at, token in enumerate(ids) if token in self.options.stop_ids), None)
            if end is not None:
                end_id = ids[end]
                ids, ended = ids[:end], END_OF_TEXT
                counted += 1
            elif len(ids) == sequence.room:
                ended = sequence.room_ends
            elif self.options.has_ended is not None and self.options.has_ended(sequence.prompt, ids):
                ended = ASKED
            sequence.room -= len(ids)
            counted += len(ids)
            chosen = len(ids) + (end_id is not None)
            events.append(NewTokens(sequence.prompt, tuple(ids), ended, end_id, states_TH[:chosen]))
        return events, counted


def _drafts(decoder: PlainDecoder) -> tuple[int, int]:
    return (decoder.num_drafts, decoder.num_accepted) if isinstance(decoder, SpeculativeDecoder) else (0, 0)
