"""fp32 to bf16, to nearest or stochastically, with noise that can be drawn again.

Stochastic rounding goes up with a probability equal to the distance from the lower neighbour, so that its expectation
is the value itself: a moving average whose steps are smaller than half a bf16 step moves on average, where rounding to
nearest leaves it standing still for ever.

bf16 is the upper half of fp32: adding 16 uniform random bits to the lower half and dropping it rounds stochastically.
The bits of element i of a tensor are table[i mod T] xor key, with one fixed table of uniform bits and a key from the
seed, the tensor's name, the block i div T and the step. Over the steps an element's bits are uniform and independent of
each other; at one step those of two elements are pairwise independent, as the table's are. Nothing is drawn from a
generator with a state, so that a run that is resumed, or goes on over other data-, pipeline- or expert-parallel ranks,
rounds as it would have. (Under tensor parallelism an element's number is that in its rank's slice.)

Source of the rule: Gupta et al. 2015, arXiv 1502.02551, section 3.
"""

from __future__ import annotations

import hashlib

import torch

# Elements that share a key: a block of fp32 moments and the noise stay in a core's cache.
BLOCK = 1 << 17


def noise_key(seed: int, name: str, step: int, block: int) -> int:
    """16 bits that decide, with the table, how the elements of a block are rounded at a step."""
    digest = hashlib.blake2b(f"{seed}:{name}:{step}:{block}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "little")


def noise_table(salt: int, device: torch.device) -> torch.Tensor:
    """BLOCK uniform values of 16 bits, int32: the same wherever and whenever it is called; another for another salt."""
    generator = torch.Generator().manual_seed(0x5EED + salt)
    return torch.randint(0, 1 << 16, (BLOCK,), dtype=torch.int32, generator=generator).to(device)


def round_stochastically(wide: torch.Tensor, noise: torch.Tensor, out: torch.Tensor) -> None:
    """Round fp32 values to bf16.

    Args:
        wide: fp32; its memory is used and holds nothing of meaning afterwards. Finite, infinite or the NaN of
            arithmetic.
        noise: int32, as many values in 0 .. 2^16 - 1.
        out: bf16, receives the result: one of the two neighbours of each value, the value itself where it is one.
    """
    bits = wide.view(torch.int32)
    bits.add_(noise).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(bits)
