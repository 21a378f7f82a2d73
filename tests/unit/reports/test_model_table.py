"""The printed table: figures, alignment, stable JSON keys, speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.metrics.rank_state import rank_states
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.reports.model_table import model_table


def table_of(name: str, world_size: int | None = None, as_json: bool = False, **changes: object) -> str:
    run = preset(name).override(**changes)
    return model_table(run, world_size, stage_layouts(run.model, run.parallel), as_json)


def row(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(start + " "))
    return line[len(start):].split()


def test_dsv3_671b_text() -> None:
    text = table_of("dsv3-671b", 2048)
    assert row(text, "routed_experts") == ["44,040,192", "14,848", "464", "653,908,770,816", "20,434,649,088"]
    assert row(text, "main model")[:2] == ["671,026,404,352", "37,552,282,624"]
    assert row(text, "MTP, unique") == ["11,610,067,968", "688,100,352"]
    assert row(text, "activated, without the embedding table") == ["36,625,603,584"]
    assert "250.46 GF   281.16 GF" in text and "9.69 GF    0.50 GF   10.19 GF" in text
    assert "on 2048 ranks: TP 1, PP 16, EP 64, expert-TP 1, DP 128, expert-DP 2" in text
    assert "embedding + 0-3" in text and "MTP + head" in text
    assert max(map(len, text.splitlines())) <= 120


def test_columns_are_aligned() -> None:
    lines = [line for line in table_of("dsv3-671b").splitlines() if line.startswith(("component", "attention", "head"))]
    assert len({len(line) for line in lines}) == 1


def test_json_keys_are_stable() -> None:
    summary = json.loads(table_of("dsv3-671b", 2048, as_json=True))
    assert list(summary) == ["preset", "parameters", "flops_per_token", "layout", "ranks"]
    assert list(summary["parameters"]) == [
        "components", "mtp_components", "parts", "main_total", "main_active", "main_active_without_embedding",
        "mtp_total", "mtp_active", "total"]
    assert list(summary["parameters"]["components"][0]) == [
        "part", "name", "parameters_per_unit", "num_units", "num_active_units", "total", "active"]
    assert list(summary["flops_per_token"]) == [
        "seq_length", "main_linear", "main_attention_causal", "main_causal", "main_noncausal", "mtp_linear",
        "mtp_attention_causal", "mtp_causal", "mtp_noncausal", "training_causal"]
    assert list(summary["ranks"][0]) == [
        "pipeline_rank", "stages", "layer_ids", "dense_parameters", "expert_parameters", "weight_bytes",
        "gradient_bytes", "optimizer_bytes", "total_bytes", "host_bytes"]
    assert summary["parameters"]["main_total"] == 671_026_404_352
    assert summary["parameters"]["mtp_total"] == 11_610_067_968
    assert summary["flops_per_token"]["main_causal"] == 250_455_926_784
    assert len(summary["ranks"]) == 16
    assert sum(len(rank["layer_ids"]) for rank in summary["ranks"]) == 2 * 61, "DualPipe has two copies"


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("depth", [0, 1])
def test_every_preset_prints(name: str, depth: int) -> None:
    text = table_of(name, mtp_num_layers=depth)
    assert ("MTP, unique" in text) == bool(depth)
    assert json.loads(table_of(name, as_json=True, mtp_num_layers=depth))["preset"] == name


def test_chunks_are_shown_apart() -> None:
    text = table_of("tiny", 4, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
    assert "embedding + 0 | 2" in text and "1 | 3 + MTP + head" in text


def test_answers_in_under_a_second() -> None:
    code = ("from dsv3_megatron.config.presets import preset; "
            "from dsv3_megatron.reports.model_table import model_table; "
            "from dsv3_megatron.parallel.layout import stage_layouts; r = preset('dsv3-671b');"
            "print(model_table(r, 2048, stage_layouts(r.model, r.parallel)))")
    times = []
    for _ in range(2):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0


def test_ranks_that_share_sequences_share_what_replicas_share() -> None:
    """The optimizer's state of a weight is divided over all ranks that hold it, whatever data they read."""
    changes = {"context_parallel_size": 4, "global_batch_size": 8}
    split, replicated = preset("tiny").override(**changes), preset("tiny").override(global_batch_size=8)
    assert rank_states(split, 8, precision="bf16") == rank_states(replicated, 8, precision="bf16")
    text = table_of("tiny", 8, **changes)
    assert "TP 1, CP 4, PP 1, EP 1, expert-TP 1, DP 2, expert-DP 8" in text
    assert "split over the context- and data-parallel ranks" in text
    assert json.loads(table_of("tiny", 8, as_json=True, **changes))["layout"]["context_parallel_size"] == 4
