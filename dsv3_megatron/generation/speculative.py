"""Decoding a batch step by step: one token a step, or a drafted one verified and one more.

The MTP module predicts the token after the next. Once the next token is chosen the module has drafted its successor;
the main model then runs over both at once, which costs hardly more than one where memory traffic decides, and says
whether the draft stands. The rule keeps the main model's distribution exactly, whatever the draft: greedy output is
that of plain decoding, sampled output has its distribution.

The first MTP module drafts; deeper ones are not used. Main model and module each have a cache.

Shapes: B sequences, Q new tokens, T prompt tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.generation.forward import CachedModel, Prompts
from dsv3_megatron.generation.sampling import Sampling, UniformStreams, distribution, draw


def verify(draft_B: torch.Tensor, drafted_BV: torch.Tensor, target_BV: torch.Tensor, after_BV: torch.Tensor,
           uniforms_B2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept or replace a drafted token so that what comes out is distributed as the main model says.

    A draft x ~ q stands with probability min(1, p(x) / q(x)); in place of a rejected one comes a token drawn from the
    part of p above q. After an accepted draft comes the main model's next token.

    Args:
        draft_B: int64, x, drawn from q.
        drafted_BV: fp64, q.
        target_BV: fp64, p: the main model's distribution of the same token.
        after_BV: fp64, the main model's distribution of the token after x.
        uniforms_B2: fp64 in [0, 1), for the decision and for the draw.

    Returns:
        is_accepted_B: bool.
        token_B: int64, the token after x where x was accepted, else the one in its place.

    Source: Leviathan et al. 2023, arXiv 2211.17192, algorithm 1 and appendix A.1 (exactness).
    """
    of_draft = draft_B.unsqueeze(-1)
    p_B, q_B = (t.gather(-1, of_draft).squeeze(-1) for t in (target_BV, drafted_BV))
    is_accepted_B = uniforms_B2[:, 0] * q_B < p_B
    above_BV = (target_BV - drafted_BV).clamp_(min=0)
    # Rejection means p(x) < q(x), so p is above q elsewhere; where that is lost to rounding the two are equal.
    above_BV = torch.where(above_BV.sum(-1, keepdim=True) > 0, above_BV, target_BV)
    return is_accepted_B, draw(torch.where(is_accepted_B.unsqueeze(-1), after_BV, above_BV), uniforms_B2[:, 1])


class PlainDecoder:
    """One token a step for every sequence of a batch.

    Args:
        model: The model.
        sequences: Prompts' ids, none empty.
        sampling: Rule by which tokens are chosen.
        streams: Uniform numbers of each sequence.
        kv_cache: "latent", "full" or "training".
        max_new_tokens: Tokens after the longest prompt that there is room for.

    Attributes:
        states: Hidden states that each sequence's newest tokens were chosen from, [new tokens, H] each.
    """

    def __init__(self, model: CachedModel, sequences: Sequence[Sequence[int]], *, sampling: Sampling,
                 streams: UniformStreams, kv_cache: str, max_new_tokens: int) -> None:
        self.states: list[torch.Tensor] = []
        self.model, self.sampling, self.streams = model, sampling, streams
        self.prompts = Prompts.pack(sequences, model.device)
        # Sequences that are alike go through the model once.
        self._distinct, self._numbers = Prompts.pack_distinct(sequences, model.device)
        self.kv_cache, self.capacity = kv_cache, max(self.prompts.lengths) + max_new_tokens
        self.cache = model.new_cache(kv_cache, num_rows=len(self._distinct.lengths), capacity=self.capacity)
        # As many tokens of each sequence are in the cache; the newest token is not.
        self.positions = list(self.prompts.lengths)
        self.newest_B = torch.empty(0, dtype=torch.int64)

    def start(self) -> list[list[int]]:
        """Run the prompts; the first token of each."""
        self._prefill()
        return self.newest_B.unsqueeze(-1).tolist()

    def step(self) -> list[list[int]]:
        """The next tokens of each sequence, at least one."""
        hidden_1BH = self.model.decode(self.newest_B.unsqueeze(-1), self.positions, self.cache)
        self.positions = [position + 1 for position in self.positions]
        self.newest_B, self.states = self._choose(hidden_1BH[0]), list(hidden_1BH.transpose(0, 1))
        return self.newest_B.unsqueeze(-1).tolist()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        self.cache.keep(rows)
        self.streams.keep(rows)
        self.positions = [self.positions[row] for row in rows]
        self.newest_B = self.newest_B[list(rows)]

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that a position takes in the caches."""
        return self.cache.bytes_per_token

    def _prefill(self) -> torch.Tensor:
        """Run the prompts and choose their next tokens; the main model's [T, 1, H] of the distinct ones."""
        hidden_T1H = self.model.prefill(self._distinct, self.cache)
        self.cache.keep(self._numbers)
        last_B1H = hidden_T1H[self._distinct.last_B()[self._numbers]]
        self.newest_B, self.states = self._choose(last_B1H[:, 0]), list(last_B1H)
        return hidden_T1H

    def _of_all(self, hidden_T1H: torch.Tensor) -> torch.Tensor:
        """Hidden states of all prompts, of those of the distinct ones."""
        bounds = self._distinct.bounds
        return torch.cat([hidden_T1H[bounds[number]: bounds[number + 1]] for number in self._numbers])

    def _choose(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        logits_BV = self._logits(hidden_BH)
        if self.sampling.is_greedy:
            return logits_BV.argmax(dim=-1)
        return draw(distribution(logits_BV, self.sampling), self._uniforms(1)[:, 0])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., V], which are numbers.

        Raises:
            ConfigError: one of them is NaN or infinite.
        """
        logits = self.model.logits(hidden, least_rows=self.cache.least_rows)
        # A NaN is the lowest and the highest of any numbers.
        if not all(bool(extreme.isfinite()) for extreme in logits.aminmax()):
            raise ConfigError(f"the logits behind position {max(self.positions)} are not finite, in "
                              f"{self.model.dtype}: the weights are damaged or the values overflow; try --precision "
                              "fp32, or another checkpoint")
        return logits

    def _uniforms(self, count: int) -> torch.Tensor:
        return self.streams.take(count).to(self.model.device)


class SpeculativeDecoder(PlainDecoder):
    """One token a step, and one more where the MTP module's draft stands. Arguments as of PlainDecoder.

    Attributes:
        num_drafts: Drafts verified so far.
        num_accepted: Drafts that stood, so far.

    Source: DeepSeek-V3 report, section 5.4.3.
    """

    def __init__(self, model: CachedModel, sequences: Sequence[Sequence[int]], *, sampling: Sampling,
                 streams: UniformStreams, kv_cache: str, max_new_tokens: int) -> None:
        # A draft after the last token is run before it is dropped.
        super().__init__(model, sequences, sampling=sampling, streams=streams, kv_cache=kv_cache,
                         max_new_tokens=max_new_tokens + 1)
        self.mtp_cache = model.new_cache(kv_cache, num_rows=len(sequences), capacity=self.capacity, is_mtp=True)
        self.drafted_BV, self.draft_B = torch.empty(0), torch.empty(0, dtype=torch.int64)
        self.num_drafts = self.num_accepted = 0

    def start(self) -> list[list[int]]:
        """Run the prompts, choose the first token of each, and draft a second; returns the new ids of each row."""
        hidden_T1H = self._of_all(self._prefill())
        drafting_T1H = self.model.mtp_prefill(self.prompts, self.newest_B, hidden_T1H, self.mtp_cache)
        self._draft(drafting_T1H[self.prompts.last_B(), 0])
        return self.newest_B.unsqueeze(-1).tolist()

    def step(self) -> list[list[int]]:
        """Verify the drafts, add one or two tokens to each row, and draft again; returns the new ids of each row."""
        tokens_B2 = torch.stack([self.newest_B, self.draft_B], dim=-1)
        hidden_2BH = self.model.decode(tokens_B2, self.positions, self.cache)
        target_BV, after_BV = distribution(self._logits(hidden_2BH).flatten(0, 1), self.sampling).chunk(2)
        uniforms_B2 = torch.zeros_like(target_BV[:, :2]) if self.sampling.is_greedy else self._uniforms(2)
        is_accepted_B, token_B = verify(self.draft_B, self.drafted_BV, target_BV, after_BV, uniforms_B2)
        accepted = is_accepted_B.tolist()
        self.num_drafts += len(accepted)
        self.num_accepted += sum(accepted)
        new = [[draft, token] if stands else [token]
               for stands, draft, token in zip(accepted, self.draft_B.tolist(), token_B.tolist(), strict=True)]
        self.states = [hidden_2BH[:len(ids), row] for row, ids in enumerate(new)]
        self._draft_after(is_accepted_B, token_B, hidden_2BH[:1 + any(accepted)])
        self.positions = [position + len(tokens) for position, tokens in zip(self.positions, new, strict=True)]
        self.newest_B = token_B
        return new

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these from both caches and from the drafts."""
        super().keep(rows)
        self.mtp_cache.keep(rows)
        self.drafted_BV, self.draft_B = self.drafted_BV[list(rows)], self.draft_B[list(rows)]

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one position takes in the main model's cache and the MTP module's."""
        return super().cache_bytes_per_token + self.mtp_cache.bytes_per_token

    def _draft_after(self, is_accepted_B: torch.Tensor, token_B: torch.Tensor, hidden_QBH: torch.Tensor) -> None:
        """Run the MTP module over the positions that have become certain, and draft after the newest token.

        With an accepted draft these are two: the first is followed by the draft, the second by the newest token. Where
        it was rejected the second is not, and the next step writes over what it leaves in the cache.
        """
        next_BQ = torch.stack([torch.where(is_accepted_B, self.draft_B, token_B), token_B], -1)[:, :len(hidden_QBH)]
        drafting_QBH = self.model.mtp_decode(next_BQ, hidden_QBH, self.positions, self.mtp_cache)
        last_B = is_accepted_B.long()
        self._draft(drafting_QBH[last_B, torch.arange(len(last_B), device=last_B.device)])

    def _draft(self, hidden_BH: torch.Tensor) -> None:
        self.drafted_BV = distribution(self._logits(hidden_BH), self.sampling)
        if self.sampling.is_greedy:
            self.draft_B = self.drafted_BV.argmax(dim=-1)
        else:
            self.draft_B = draw(self.drafted_BV, self._uniforms(1)[:, 0])
