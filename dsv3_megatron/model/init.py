"""Initial weights that depend on the seed and the parameter's name only, not on the layout.

The same seed gives the same model under every split into tensor, pipeline and expert ranks, so a run can
be compared with another layout's, and a change of layout is not a change of the experiment. Each whole
parameter is drawn by a generator seeded with its global name; a rank keeps its part.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.model.global_names import whole_parameters


def initialize_weights(chunks: list[torch.nn.Module], groups: ProcessGroupCollection, *, std: float, seed: int) -> None:
    """Draw every matrix from N(0, std^2) and set every norm's weight to 1, in place.

    Args:
        chunks: This rank's stages.
        groups: The run's process groups.
        std: Standard deviation, of all learnable matrices alike.
        seed: Seed of the model's weights.

    Source: DeepSeek-V3 report, section 4.2 (std 0.006, all learnable parameters).
    """
    for chunk in chunks:
        for whole in whole_parameters(chunk, groups):
            if len(whole.shape) == 1:
                whole.local.fill_(1.0)
                continue
            generator = torch.Generator(device=whole.local.device)
            generator.manual_seed(parameter_seed(seed, whole.name))
            full = torch.empty(whole.shape, dtype=torch.float32, device=whole.local.device)
            full.normal_(0.0, std, generator=generator)
            whole.local.copy_(whole.take(full))


def parameter_seed(seed: int, name: str) -> int:
    """Seed of one parameter's generator: 63 bits of a hash of the model's seed and the name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
