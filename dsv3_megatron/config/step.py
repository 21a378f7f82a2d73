"""What a training step is taken with, and a phase of a run may change: batch, sequence, learning rate, loss weights.

Plain frozen data, no torch. Flags that exist in Megatron-LM keep its spelling and meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.config.fields import InPhases, option


@dataclass(frozen=True)
class StepConfig:
    """The fields of `TrainingConfig` that phases change. Source: DeepSeek-V3 report, section 4.2."""

    seq_length: int = option(4096, in_phases=InPhases.CHANGED, help="tokens in a sequence")
    micro_batch_size: int = option(1, in_phases=InPhases.CHANGED, help="sequences in one forward pass")
    global_batch_size: int = option(
        8, in_phases=InPhases.CHANGED, help="sequences in one optimizer step, over all replicas")
    lr: float = option(2.2e-4, in_phases=InPhases.CHANGED, help="peak learning rate")
    mtp_loss_scaling_factor: float = option(
        0.3, in_phases=InPhases.CHANGED, help="lambda: weight of the MTP loss")
    moe_router_bias_update_rate: float = option(
        1e-3, in_phases=InPhases.CHANGED, help="gamma: step of the balancing bias, each optimizer step")
