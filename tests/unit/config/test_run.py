"""Runs as values: every section hashes, equal runs hash equal, and a field that phases change is declared once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.past import SCHEDULE_FIELDS
from dsv3_megatron.config.phases import Phase, WrittenPhase
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.run import SECTIONS, RunConfig
from dsv3_megatron.config.training import WITHOUT_PHASES

LISTS = {"data_path": ["0.5", "a", "0.5", "b"], "valid_data_path": ["c"], "fp8": "blockwise",
         "fp8_override": ["*.linear_proj=bf16"], "recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
# As they were written by hand before they were declared in one place.
CHANGED = {"seq_length", "micro_batch_size", "global_batch_size", "lr", "mtp_loss_scaling_factor",
           "moe_router_bias_update_rate", "rope_type", "rotary_scaling_factor", "original_max_position_embeddings",
           "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "max_position_embeddings", "data_path",
           "valid_data_path", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
           "cp_comm_type", "expert_model_parallel_size", "pipeline_schedule", "num_virtual_stages_per_pipeline_rank"}
OF_ONE_PHASE = {"train_iters", "min_lr", "lr_warmup_iters", "lr_decay_style", "lr_decay_iters"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_section_hashes_and_equal_runs_hash_equal(name: str, tmp_path: Path) -> None:
    run = preset(name).override(**LISTS)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run.as_dict()), encoding="utf-8")
    for other in (preset(name).override(**LISTS), parse_command(["--config", str(path)]).run):
        assert other == run and other is not run and hash(other) == hash(run)
        for section in SECTIONS:
            assert hash(getattr(other, section)) == hash(getattr(run, section))
    assert len({run, preset(name), run.override(data_path=["d"])}) == 3


def test_a_list_that_was_given_stays_the_callers() -> None:
    paths = ["a", "b"]
    run = preset("tiny").override(data_path=paths)
    paths.append("c")
    assert run.data.data_path == ("a", "b") and run.as_dict()["data"]["data_path"] == ["a", "b"]


def test_what_phases_change_and_what_they_replace() -> None:
    own = {field.name for field in dataclasses.fields(WrittenPhase)}
    assert {field.name for field in dataclasses.fields(Phase)} - own == CHANGED
    assert set(WITHOUT_PHASES) == OF_ONE_PHASE
    # A checkpoint holds these: another name would be missing in the checkpoints that are there.
    assert set(SCHEDULE_FIELDS) == {"phases"} | OF_ONE_PHASE | {
        "seq_length", "global_batch_size", "lr", "mtp_loss_scaling_factor", "moe_router_bias_update_rate"}


def test_a_phases_field_is_its_sections_with_nothing_said() -> None:
    declared = {field.name: field for section in SECTIONS.values() for field in dataclasses.fields(section)}
    for field in dataclasses.fields(Phase):
        if field.name in CHANGED:
            assert field.default is None and field.metadata == declared[field.name].metadata
            assert str(field.type).removesuffix(" | None") == str(declared[field.name].type)


def test_a_run_in_python_takes_phases_as_files_have_them() -> None:
    table = {"name": "a", "train_iters": 3, "data_path": ["x"], "lr": "1e-3"}
    run: RunConfig = preset("tiny").override(phases=[table])
    assert run.training.phases == (Phase("a", train_iters=3, data_path=("x",), lr=1e-3),)
    assert dataclasses.replace(run.training.phases[0], lr=2e-3).lr == 2e-3
