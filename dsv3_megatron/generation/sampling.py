"""Makes a distribution of logits, and draws a token from a distribution.

Every draw takes one uniform number and inverts the cumulative distribution, so that a sequence's tokens depend on the
seed, its number among the prompts and its own logits: not on which other sequences share its batch.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.model.init import parameter_seed

# Uniform numbers that a sequence draws at once.
_AHEAD = 32


@dataclass(frozen=True)
class Sampling:
    """The rule by which a token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Probability that the likeliest tokens, as few as can be, must have together to be kept; 1 keeps all.
        seed: Seed of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1234

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0

    def validate(self) -> None:
        """Check that the three settings can be.

        Raises:
            ConfigError: the first that is out of range, with the way out.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature={self.temperature} must be a number from 0 on; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps every token")
        if self.is_greedy and self.top_p < 1:
            raise ConfigError(f"top_p={self.top_p} has no effect with temperature=0, which takes the likeliest token; "
                              "give a temperature above 0, or leave out top_p")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")


def distribution(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What tokens are drawn from: softmax(logits / temperature), cut to its nucleus; all of it on one token if greedy.

    Args:
        logits_BV: Logits of any floating dtype.
        sampling: Temperature and top_p.

    Returns:
        fp64 [B, V], each row sums to 1.

    Source: Holtzman et al. 2020, arXiv 1904.09751, section 3.1 (nucleus).
    """
    if sampling.is_greedy:
        chosen_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits_BV, dtype=torch.float64).scatter_(-1, chosen_B1, 1.0)
    # The largest becomes 0 first: divided by a tiny temperature it would be infinite, and its softmax no number.
    above_BV = logits_BV.to(torch.float64, copy=True)
    above_BV.sub_(above_BV.amax(dim=-1, keepdim=True))
    probabilities_BV = above_BV.div_(sampling.temperature).softmax(dim=-1)
    if sampling.top_p == 1:
        return probabilities_BV
    sorted_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    # A token stays while those before it have not reached top_p: the likeliest one always does.
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    kept_BV = sorted_BV.masked_fill_(before_BV >= sampling.top_p, 0.0)
    kept_BV /= kept_BV.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities_BV).scatter_(-1, ids_BV, kept_BV)


def draw(weights_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative weight passes a uniform share of the whole.

    Args:
        weights_BV: fp64, not negative, not all 0 in a row; they need not sum to 1.
        uniforms_B: fp64 in [0, 1).

    Returns:
        int64 [B]; never a token of weight 0.
    """
    cumulative_BV = weights_BV.cumsum(dim=-1)
    total_B = cumulative_BV[:, -1]
    # A share rounded up to the whole would lie behind the last token.
    target_B = torch.minimum(uniforms_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    return torch.searchsorted(cumulative_BV, target_B.unsqueeze(-1), right=True).squeeze(-1)


class UniformStreams:
    """Uniform numbers of each sequence, on the CPU whatever the device, so that a seed means the same everywhere.

    Args:
        seed: Seed of all the streams.
        numbers: Each sequence's number among the prompts.
    """

    def __init__(self, seed: int, numbers: Iterable[int]) -> None:
        self._generators = [torch.Generator().manual_seed(parameter_seed(seed, f"prompt {number}"))
                            for number in numbers]
        # Numbers of each sequence that are drawn and not taken: a call of a generator costs as much as many numbers.
        self._ahead_BN = torch.empty(len(self._generators), 0, dtype=torch.float64)

    def take(self, count: int) -> torch.Tensor:
        """The next `count` numbers of each sequence, fp64 [B, count] in [0, 1)."""
        if self._ahead_BN.shape[1] < count:
            more_BN = [torch.rand(max(count, _AHEAD), dtype=torch.float64, generator=generator)
                       for generator in self._generators]
            self._ahead_BN = torch.cat([self._ahead_BN, torch.stack(more_BN)], dim=1)
        taken_BN, self._ahead_BN = self._ahead_BN[:, :count], self._ahead_BN[:, count:]
        return taken_BN

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other sequences."""
        self._generators, self._ahead_BN = [self._generators[row] for row in rows], self._ahead_BN[list(rows)]
