"""A Hugging Face checkpoint in the modules of a run, under any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv3_megatron.certification.weight_names import router_bias_name, whole_from_reference
from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.pretrained import load_hugging_face
from dsv3_megatron.model.build import build_stages
from dsv3_megatron.model.global_names import whole_parameters
from dsv3_megatron.optim.router_bias import routers
from dsv3_megatron.parallel.groups import create_groups
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import merge, small_run
from tests.hugging_face import config_json, dequantized, published_weights, quantized, write_checkpoint

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "one process": (1, {}),
    "PP2xEP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "TP2xEP2xETP2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2,
                         "expert_tensor_parallel_size": 2}),
    "interleaved PP2": (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "ZBV PP2, the loss apart": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv",
                                    "pipeline_model_parallel_layout": "Ett|tt|m|L"}),
}


def load_and_report(folder: Path, changes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Every parameter and router bias of this rank's stages by global name, NaN where another rank has the value."""
    run = small_run(**changes)
    groups = create_groups(run.parallel, run.training.seed)
    stages, _config = build_stages(run, groups, precision="fp32")
    load_hugging_face(folder, list(stages), groups)
    state: dict[str, torch.Tensor] = {}
    for stage in stages:
        for whole in whole_parameters(stage, groups):
            full = torch.full(whole.shape, torch.nan)
            whole.put(full, whole.local)
            assert whole.name not in state or torch.equal(state[whole.name], full)
            state[whole.name] = full
    state |= {f"bias {row}": router.expert_bias for row, router in routers(stages, run.model.num_layers)}
    return state


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gets_the_checkpoint(tmp_path, name):
    ranks, changes = LAYOUTS[name]
    model = small_run().model
    weights = quantized(published_weights(model))
    folder = write_checkpoint(tmp_path / "hf", config_json(model), weights)
    state = merge(run_ranks(ranks, load_and_report, folder, changes))
    expected = {name: value.float() for name, value in dequantized(weights).items()}
    for parameter, value in state.items():
        if parameter.startswith("bias "):
            assert torch.equal(value, expected[router_bias_name(int(parameter[5:]))])
        else:
            assert torch.equal(value, whole_from_reference(parameter, expected, model.num_layers)), parameter


def load_into_another_model(folder: Path) -> list[str]:
    messages = []
    groups = create_groups(small_run().parallel, 1)
    for changes in ({"hidden_size": 64}, {"q_lora_rank": None}):
        run = small_run(**changes)
        stages, _config = build_stages(run, groups, precision="fp32")
        try:
            load_hugging_face(folder, list(stages), groups)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_another_architecture(tmp_path):
    model = small_run().model
    folder = write_checkpoint(tmp_path / "hf", config_json(model), published_weights(model))
    shape, missing = run_ranks(1, load_into_another_model, folder)[0]
    assert "make shape [128, 32], this model's embedding.word_embeddings.weight has [128, 64]" in shape
    assert "has no tensor for this model's parameter decoder.layers.0.self_attention.linear_q_proj.weight" in missing
