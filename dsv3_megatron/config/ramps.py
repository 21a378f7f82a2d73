"""How learning rate and batch size change within a phase: pure functions of a run's position. No torch.

A position is the optimizer steps and the tokens before a step; both are in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """A linear warm-up by steps, then the way from one learning rate to another by tokens.

    Attributes:
        start: Learning rate at the end of the warm-up.
        end: Learning rate at `last_token`, and from there on.
        style: Shape of the way: "constant" (`end` from the first step on), "linear" or "cosine".
        warmup_iters: Steps of the warm-up from 0.
        first_iteration: Step at which the warm-up begins.
        first_token: Tokens taken when the way begins, which is the end of the warm-up.
        last_token: Tokens taken when the way ends.

    Source: DeepSeek-V3 report, section 4.2.
    """

    start: float
    end: float
    style: str
    warmup_iters: int
    first_iteration: int
    first_token: int
    last_token: int

    def at(self, iteration: int, tokens: int) -> float:
        """Learning rate of the step before which so many steps and tokens were taken."""
        done = max(0, iteration - self.first_iteration)
        if done < self.warmup_iters:
            return (self.end if self.style == "constant" else self.start) * (done + 1) / self.warmup_iters
        if self.style == "constant" or tokens >= self.last_token:
            return self.end
        progress = max(0, tokens - self.first_token) / max(1, self.last_token - self.first_token)
        share = 1.0 - progress if self.style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.end + share * (self.start - self.end)


@dataclass(frozen=True)
class Plateau:
    """Steps of one batch size in a row.

    Attributes:
        iteration: Steps before it.
        tokens: Tokens before it.
        samples: Sequences before it.
        num_steps: Length in optimizer steps.
        global_batch_size: Sequences in each step.
    """

    iteration: int
    tokens: int
    samples: int
    num_steps: int
    global_batch_size: int


@dataclass(frozen=True)
class BatchSize:
    """A staircase from one batch size to another along a straight line in tokens.

    The report says that the batch "is gradually increased from 3072 to 15360 in the training of the first 469B tokens"
    and gives no shape. A straight line in tokens is the plainest reading, and Megatron-LM's --rampup-batch-size is one
    too. A step's batch is the last whole number of increments that the line has passed, so each size holds for equally
    many tokens, and the end is reached when the ramp's tokens are. The increment is part of the recipe, not of the
    layout: a layout either can do every batch, or the run is refused before it starts, so that the steps of a run are
    the same however it is split.

    Attributes:
        start: Sequences at `first_token`.
        end: Sequences from `last_token` on.
        increment: Divides the difference; None: `end` from the first step on.
        first_token: Tokens taken where the line begins.
        last_token: Tokens taken where the line ends.
    """

    start: int
    end: int
    increment: int | None
    first_token: int
    last_token: int

    @property
    def num_increments(self) -> int:
        """Changes of the batch."""
        return abs(self.end - self.start) // self.increment if self.increment else 0

    def at(self, tokens: int) -> int:
        """Sequences in the step before which so many tokens were taken."""
        if not self.increment or tokens >= self.last_token:
            return self.end
        passed = self.num_increments * max(0, tokens - self.first_token) // (self.last_token - self.first_token)
        return self.start + passed * (self.increment if self.end > self.start else -self.increment)

    def sizes(self) -> list[int]:
        """Every batch size that there is, in order."""
        if not self.increment:
            return [self.end]
        step = self.increment if self.end > self.start else -self.increment
        return list(range(self.start, self.end, step)) + [self.end]

    def plateaus(self, first: Plateau, seq_length: int, *, num_steps: int | None = None, stop_token: int | None = None
                 ) -> Iterator[Plateau]:
        """The steps from a place on, by batch size: so many of them, or up to the one that reaches a token.

        Args:
            first: Place where the steps begin; its batch size and length do not matter.
            seq_length: Tokens in a sequence.
            num_steps: Steps to list; or else
            stop_token: Tokens, so many of which at least are taken when the steps end.
        """
        iteration, tokens, samples, left = first.iteration, first.tokens, first.samples, num_steps
        while (left is None or left > 0) and (stop_token is None or tokens < stop_token):
            size = self.at(tokens)
            limits = [limit for limit in (self._next_change(tokens), stop_token) if limit is not None]
            steps = left if left is not None else 0
            if limits:
                until = -(-(min(limits) - tokens) // (size * seq_length))
                steps = until if left is None else min(left, until)
            yield Plateau(iteration, tokens, samples, steps, size)
            iteration, samples, tokens = iteration + steps, samples + steps * size, tokens + steps * size * seq_length
            left = None if left is None else left - steps

    def _next_change(self, tokens: int) -> int | None:
        """The first token beyond `tokens` at which the batch is another one."""
        if not self.increment or tokens >= self.last_token:
            return None
        length = self.last_token - self.first_token
        passed = self.num_increments * max(0, tokens - self.first_token) // length
        return self.first_token - (-(passed + 1) * length // self.num_increments)
