"""Transformer Engine's modules on the GPU against the local ones with the same weights.

That the two trees mean the same is shown without a GPU (tests/parity/test_transformer_engine_spec.py); here are
Transformer Engine's own constructors and kernels. Weights are copied by global name.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.gpu.test_local_modules import BF16_GRADIENT, BF16_LOSS, BF16_MEDIAN_GRADIENT, check_model_step

pytestmark = pytest.mark.gpu

# Plain torch modules in Transformer Engine's places, on a CPU: 3.0% in the worst gradient, 1.8% in the median. cos and
# sin are rounded to bf16 there and not in the local modules, and the two trees round in other places.
YARN = {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "original_max_position_embeddings": 256}


def with_engine(runs, **changes):
    return runs.run_config(precision="bf16", transformer_impl="transformer_engine", **changes)


def test_against_the_cpu(runs, engine, cpu_step):
    step = runs.model_step(with_engine(runs), cpu_step.choices_TK)
    assert runs.share_of_equal_choices(step, cpu_step) > 0.97
    check_model_step(runs, step, cpu_step, BF16_GRADIENT, BF16_MEDIAN_GRADIENT, BF16_LOSS)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, YARN, {"mtp_num_layers": 2},
                                     {"num_shared_experts": 2, "num_dense_layers": 0}],
                         ids=["tiny", "full-rank-query", "yarn", "mtp-2", "two-shared-all-moe"])
def test_against_local_modules(runs, engine, changes):
    local = runs.model_step(runs.run_config(precision="bf16", **changes))
    step = runs.model_step(with_engine(runs, **changes), local.choices_TK)
    assert runs.share_of_equal_choices(step, local) > 0.97
    check_model_step(runs, step, local, BF16_GRADIENT, BF16_MEDIAN_GRADIENT, BF16_LOSS)


def test_widths_of_v3(runs, engine):
    """Heads of 128 + 64 / 128 and the latents of DeepSeek-V3, two layers of it."""
    changes = {"hidden_size": 1024, "num_layers": 2, "num_attention_heads": 8, "q_lora_rank": 1536, "kv_lora_rank": 512,
               "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_ffn_hidden_size": 256,
               "ffn_hidden_size": 1024}
    local = runs.model_step(runs.run_config(precision="bf16", **changes))
    step = runs.model_step(with_engine(runs, **changes), local.choices_TK)
    check_model_step(runs, step, local, BF16_GRADIENT, BF16_MEDIAN_GRADIENT, BF16_LOSS)


def test_other_weights_fail(runs, engine):
    """The comparison sees one changed norm."""
    local = runs.model_step(runs.run_config(precision="bf16"))
    name = "decoder.layers.1.self_attention.kv_layernorm.weight"
    wrong = dataclasses.replace(local, gradients={**local.gradients, name: local.gradients[name] * 1.2})
    with pytest.raises(AssertionError, match="kv_layernorm"):
        check_model_step(runs, wrong, local, BF16_GRADIENT, BF16_MEDIAN_GRADIENT, BF16_LOSS)


def test_parameters(runs, engine, gpu):
    """On the GPU, initialised by this library (equal to the local tree's), marked for their reductions."""
    from dsv3_megatron.model.build import build_stages
    from dsv3_megatron.model.global_names import whole_parameters

    held = []
    for impl in ("local", "transformer_engine"):
        run = runs.run_config(precision="bf16", transformer_impl=impl)
        with runs.process_groups(run) as groups:
            stage = build_stages(run, groups, precision="bf16")[0][0]
            held.append({whole.name: whole for whole in whole_parameters(stage, groups)})
    local, engines = held
    assert local.keys() == engines.keys()
    for name, ours in local.items():
        theirs = engines[name]
        assert theirs.local.device == gpu and theirs.local.dtype == torch.bfloat16, name
        assert torch.equal(ours.local, theirs.local), name
        for mark, default in (("allreduce", True), ("sequence_parallel", False)):
            assert getattr(theirs.parameter, mark, default) == getattr(ours.parameter, mark, default), (name, mark)


def test_auto_chooses_it(engine):
    from dsv3_megatron.model.specs import resolve_transformer_impl

    assert resolve_transformer_impl("auto") == "transformer_engine"
