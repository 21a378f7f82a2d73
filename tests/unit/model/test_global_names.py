"""The part of a whole weight that a rank holds; that every layout has the parts of one model is in test_layouts."""

from __future__ import annotations

import pytest

from dsv3_megatron.config.presets import preset
from tests.unit.model.test_counts import build_without_memory, megatron_core, one_of

__all__ = ["megatron_core"]  # a fixture


@pytest.mark.parametrize("rank", [0, 1])
def test_of_a_gate_above_an_up_projection_a_rank_holds_rows_of_both(rank: int, megatron_core: None) -> None:
    from dsv3_megatron.model.global_names import LocalSlice, whole_parameters

    run = preset("tiny").override(tensor_model_parallel_size=2, expert_tensor_parallel_size=2)
    with one_of(2, rank, run.parallel) as groups:
        (stage,) = build_without_memory(run, groups)
        found = {whole.name: (whole.axis, whole.pieces) for whole in whole_parameters(stage, groups)}
    layer = "decoder.layers.1."
    # Widths of `tiny`: 96 of an expert and of the shared one, 384 of the dense FFN, 4 heads of 48 and of 32.
    for name, width in ((f"{layer}mlp.experts.7.linear_fc1.weight", 96),
                        (f"{layer}mlp.shared_experts.linear_fc1.weight", 96),
                        ("decoder.layers.0.mlp.linear_fc1.weight", 384)):
        half = width // 2
        assert found[name] == (0, (LocalSlice(0, rank * half, half), LocalSlice(half, width + rank * half, half))), name
    assert found[f"{layer}mlp.experts.7.linear_fc2.weight"] == (1, (LocalSlice(0, rank * 48, 48),))
    assert found[f"{layer}self_attention.linear_q_up_proj.weight"] == (0, (LocalSlice(0, rank * 96, 96),))
    assert found[f"{layer}self_attention.linear_proj.weight"] == (1, (LocalSlice(0, rank * 64, 64),))
    assert found[f"{layer}self_attention.linear_kv_down_proj.weight"] == (None, ())
