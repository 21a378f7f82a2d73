"""Which modules compute again in backward what others would keep, chosen by name as in Megatron-Core.

    layernorm     every RMSNorm: before attention and FFN, of the latents, of the MTP modules, before the head
    mla_up_proj   queries, keys and values: up-projections, norms of the latents, rotary embedding
    moe_act       the SwiGLU output of shared and routed experts (on a CPU the routed experts' is never kept)

In FP8 the SwiGLU output of every FFN is made again in any case (`ops/fp8/kept_swiglu.py`), and no FP8 copy is kept of
what a norm computes again.

Megatron-Core's `layernorm` leaves the latents' norms to `mla_up_proj`; the report recomputes all of them. Its other
names are not known here. With Transformer Engine's modules the names go to Megatron-Core, which does it in its own way.

Source: DeepSeek-V3 report, sections 3.2.3 and 3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dsv3_megatron.model.attention import LocalMLASelfAttention
from dsv3_megatron.model.experts import GroupedExperts, LocalSharedExperts
from dsv3_megatron.model.norm import RMSNorm

_MODULES: dict[str, tuple[type[torch.nn.Module], ...]] = {
    "layernorm": (RMSNorm,),
    "mla_up_proj": (LocalMLASelfAttention,),
    "moe_act": (LocalSharedExperts, GroupedExperts),
}


def set_recomputed(stages: Iterable[torch.nn.Module], names: Iterable[str]) -> None:
    """Have the modules of these names, and no others, recompute; may be called again between steps.

    Args:
        stages: Local modules, bare or wrapped.
        names: Names out of `config.memory.RECOMPUTE_MODULES`.
    """
    chosen = tuple(kind for name in names for kind in _MODULES[name])
    known = tuple(kind for kinds in _MODULES.values() for kind in kinds)
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, known):
                module.is_recomputed = isinstance(module, chosen)  # type: ignore[assignment]
