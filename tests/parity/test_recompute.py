"""A whole model under recomputation by name: bit for bit the same gradients, loads counted once, and memory saved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.memory import RECOMPUTE_MODULES
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.live_bytes import count_live_bytes
from dsv3_megatron.model.recomputed_modules import set_recomputed
from dsv3_megatron.optim.router_bias import routers
from tests.parity.architectures import variant

SEQUENCES, LENGTH = 2, 24
TOKENS, FP64 = SEQUENCES * LENGTH, 8


def forward_backward(model):
    """Loss, gradients, loads, and the bytes that the forward pass leaves for backward."""
    for _, router in routers([model], model.config.num_layers):
        router.tokens_per_expert.zero_()
    for parameter in model.parameters():
        parameter.grad = None
    tokens = torch.randint(0, 48, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).unsqueeze(0)
    with count_live_bytes() as live:
        losses = model(input_ids=tokens[:, :-1], position_ids=positions, attention_mask=None, labels=tokens[:, 1:])
        loss = losses.main_BS.sum() + 0.3 * sum(mtp.sum() for mtp in losses.mtp_BS)
        del losses
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    loads = {row: router.tokens_per_expert.clone() for row, router in routers([model], model.config.num_layers)}
    return loss, gradients, loads, live.at_end


def same(first, second):
    return (torch.equal(first[0], second[0]) and all(torch.equal(first[1][name], second[1][name]) for name in first[1])
            and all(torch.equal(first[2][row], second[2][row]) for row in first[2]))


@pytest.mark.parametrize("name", ["groups", "full-rank-query"])
def test_gradients_and_loads_are_the_same_and_memory_is_saved(build, name):
    architecture = variant(name)
    model, _ = build(architecture)
    forward_backward(model)  # tables of positions are made once
    plain = forward_backward(model)
    assert all(int(load.sum()) == TOKENS * architecture.moe_router_topk for load in plain[2].values())
    saved = {}
    for names in (*((one,) for one in RECOMPUTE_MODULES), RECOMPUTE_MODULES):
        set_recomputed([model], names)
        result = forward_backward(model)
        assert same(plain, result), names
        saved[names] = plain[3] - result[3]
    blocks = architecture.num_layers + architecture.mtp_num_layers
    moe_blocks = architecture.num_moe_layers + architecture.mtp_num_layers
    width = architecture.num_attention_heads * (2 * architecture.qk_head_dim + architecture.v_head_dim)
    assert saved["mla_up_proj",] == blocks * TOKENS * width * FP64
    assert saved["moe_act",] == moe_blocks * TOKENS * architecture.moe_ffn_hidden_size * FP64
    # Before attention and FFN, of the latents, and one of the norms before the head: the other is an input of the MTP
    # module, which keeps it.
    norms = 2 * architecture.hidden_size + (architecture.q_lora_rank or 0) + architecture.kv_lora_rank
    assert saved["layernorm",] >= blocks * TOKENS * norms * FP64
    assert saved[RECOMPUTE_MODULES] >= sum(saved[one,] for one in RECOMPUTE_MODULES)


def test_whole_layers(build):
    model, _ = build(variant("groups"))
    plain = forward_backward(model)
    full, _ = build(variant("groups"), recompute_granularity="full")
    result = forward_backward(full)
    assert same(plain, result)
    assert result[3] < plain[3] / 2


def test_what_cannot_be():
    run = preset("tiny")
    cases = [
        ({"recompute_granularity": "some"}, "recompute_granularity='some' must be one of selective, full, or none"),
        ({"recompute_modules": ["layernorm"]}, "recompute_modules=layernorm needs recompute_granularity=selective, "
                                               "not none"),
        ({"recompute_granularity": "full", "recompute_modules": ["moe_act"]},
         "needs recompute_granularity=selective, not full: full recomputes whole layers"),
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
         "recompute_modules=mlp: the modules that can be recomputed are layernorm, mla_up_proj, moe_act"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            run.override(**changes).validate()
    dense = dataclasses.replace(run, model=variant("all-dense")).override(
        seq_length=24, recompute_granularity="selective", recompute_modules=["moe_act"])
    with pytest.raises(ConfigError, match="recompute_modules=moe_act matches nothing: all 3 layers are dense"):
        dense.validate(1)
