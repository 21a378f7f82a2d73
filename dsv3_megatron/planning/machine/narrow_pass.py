"""What modules take beside the operations that are counted: a pass over the run's layers, too narrow to compute much.

The stage has the run's layers, experts, heads and split, and widths and sequences so small that what is left of a pass
is Python, autograd, and the many small calls between the large ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import Batch
from dsv3_megatron.model.build import build_stages, wrap_stages
from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.model.losses import sum_losses
from dsv3_megatron.model.packed_documents import forward_stage

_SEQ_LENGTH = 16
_WIDTH = 8  # of a head, and of what else a rank holds of a layer


def narrowed(run: RunConfig) -> RunConfig:
    """The run with as many layers, heads and experts, and next to no width."""
    tensor = run.parallel.tensor_model_parallel_size
    expert_tensor = run.parallel.expert_tensor_parallel_size
    return run.override(
        hidden_size=4 * _WIDTH, q_lora_rank=2 * _WIDTH, kv_lora_rank=2 * _WIDTH, qk_nope_head_dim=_WIDTH,
        qk_rope_head_dim=_WIDTH, v_head_dim=_WIDTH, ffn_hidden_size=2 * _WIDTH * tensor,
        moe_ffn_hidden_size=2 * _WIDTH * expert_tensor, vocab_size=16 * _WIDTH, seq_length=_SEQ_LENGTH,
        max_position_embeddings=_SEQ_LENGTH)


def narrow_pass(run: RunConfig, groups: ProcessGroupCollection) -> Callable[[], None]:
    """Builds this rank's stages and returns one micro-batch's forward and backward over them; called by all ranks.

    Args:
        run: A run of one phase; precision fp32.
        groups: Process groups of its layout.
    """
    run = narrowed(run)
    stages, config = build_stages(run, groups, precision="fp32")
    wrapped = wrap_stages(stages, config, groups)
    size = run.training.micro_batch_size
    tokens = torch.randint(0, run.model.vocab_size, (size, _SEQ_LENGTH + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(size, _SEQ_LENGTH),
                  torch.arange(_SEQ_LENGTH).repeat(size, 1), torch.arange(size), None)
    def call() -> None:
        for stage, module in zip(wrapped, stages, strict=True):
            if not module.pre_process:
                shape = (module.num_hidden_inputs * _SEQ_LENGTH // groups.tp.size(), size, run.model.hidden_size)
                module.set_input_tensor(torch.zeros(shape, requires_grad=True))
            output = forward_stage(stage, batch, run.data)
            if module.post_process:
                sum_losses(batch.loss_mask_BS, TokenLosses(*output), mtp_weight=0.1)[0].backward()
            else:
                output.backward(torch.zeros_like(output))

    return call
