"""How far each pair of a rotary embedding turns from one token to the next."""

from __future__ import annotations

import math

import torch


def plain_frequencies(dim: int, base: float) -> torch.Tensor:
    """Radians per token of each rotated pair, base^(-2i / dim), fp64 [dim / 2].

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    return 1.0 / (base ** exponents)


def yarn_frequencies(dim: int, base: float, *, factor: float, original_length: int, beta_fast: float,
                     beta_slow: float) -> torch.Tensor:
    """Radians per token of each rotated pair of a context that YaRN has extended, fp64 [dim / 2].

    Frequencies that turn more than beta_fast times within the original context are kept, those that turn less than
    beta_slow times are divided by the factor, and between the two the share of the second grows linearly.

    Args:
        dim: Rotary width, even.
        base: Theta, the base of the frequencies.
        factor: Factor of the extension, at least 1.
        original_length: Context before it, in tokens.
        beta_fast: Rotations beyond which a frequency is kept.
        beta_slow: Rotations below which a frequency is divided.

    Source: YaRN, arXiv 2309.00071, section 3.2; DeepSeek-V3 report, section 4.3. The ends of the ramp are those of the
    published code, also where they come out in the wrong order because a context is so short that no pair turns
    beta_slow times, or so long that every pair turns beta_fast times.
    """
    plain = plain_frequencies(dim, base)

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / ((high - low) or 0.001)
    interpolated_share = ramp.clamp(0, 1)
    return plain / factor * interpolated_share + plain * (1 - interpolated_share)
