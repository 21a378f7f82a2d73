"""How the head and its loss are computed, as far as memory and time follow from it. No torch: the planner asks too.

    fused     kernels/head_loss.py: logits stay in registers; backward makes them again
    chunked   ops/chunked_head_loss.py: fp32 logits of some tokens at a time, probabilities kept up to a size
"""

from __future__ import annotations

BACKENDS = ("auto", "fused", "chunked")

# Of "chunked": a chunk's fp32 logits should stay in the last-level cache of a CPU. A GPU has none that would hold them,
# and reads and writes the fp32 weight gradient once a chunk: 8 H / tokens bytes a logit.
CPU_CHUNK_TOKENS = 256
GPU_CHUNK_TOKENS = 2048
# Of "chunked": bytes of probabilities that one head keeps for backward at most.
KEPT_BYTES = 1 << 30
# Hopper is the first with the tensor memory accelerator, through which the kernels read.
FUSED_CAPABILITY = 9


def chunk_tokens_on(device: str) -> int:
    """Tokens at a time of the chunked way on a "cpu" or a "cuda" device."""
    return CPU_CHUNK_TOKENS if device == "cpu" else GPU_CHUNK_TOKENS


def multiplies_kept(device: str, *, value_bytes: int, is_wide_product: bool, is_kept: bool, is_split: bool) -> bool:
    """Whether backward of "chunked" multiplies kept probabilities as they are, all tokens at once.

    A GPU's chunks are left as they are. Wide probabilities are added to the main gradient chunk by chunk, without a
    rounding between.

    Args:
        device: "cpu" or "cuda".
        value_bytes: Bytes of a hidden state, and of a kept probability.
        is_wide_product: Operands of products are fp32 copies of narrow numbers.
        is_kept: Forward kept probabilities.
        is_split: Each tensor-parallel rank has a part of the vocabulary.
    """
    return device == "cpu" and value_bytes == 2 and not is_wide_product and is_kept and not is_split


def choose_head_loss(device: str, *, capability: int, value_bytes: int, hidden: int) -> tuple[str, str]:
    """Choose "fused" or "chunked", and say why.

    Args:
        device: "cpu" or "cuda".
        capability: Major compute capability of the GPU, 0 on a CPU.
        value_bytes: Bytes of a hidden state and of a weight.
        hidden: Width of the hidden states.
    """
    if device != "cuda":
        return "chunked", device
    if capability < FUSED_CAPABILITY:
        return "chunked", f"compute capability {capability}.x has no TMA"
    if value_bytes != 2:
        return "chunked", f"{8 * value_bytes}-bit numbers: tensor cores would round them"
    if hidden % 8:
        return "chunked", f"rows of {hidden} numbers do not start at multiples of 16 bytes"
    return "fused", "Hopper or later, 16-bit numbers"


def chosen_head_loss(device: str, value_bytes: int, hidden: int) -> str:
    """What `choose_head_loss` chooses on a CPU, or on a GPU that is taken to be Hopper's or later."""
    capability = FUSED_CAPABILITY if device == "cuda" else 0
    return choose_head_loss(device, capability=capability, value_bytes=value_bytes, hidden=hidden)[0]
