"""The search of layouts: its bounds, and what it finds against trying everything."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.run_cost import main_phase, only_phase
from dsv3_megatron.planning.search import Layout, _Bounds, _splits, search
from dsv3_megatron.planning.time.step_time import step_seconds
from dsv3_megatron.planning.time.work import Setting
from tests.unit.planning.small_run import small_run


def test_bounds_of_the_search_are_below_the_simulated_times() -> None:
    run, setting = small_run(fp8="blockwise"), Setting(find_hardware("h800"), 64)
    bounds, checked = _Bounds(setting), 0
    for schedule, stages in (("1f1b", 1), ("interleaved", 2), ("zb1p", 1), ("zbv", 1), ("dualpipe", 1),
                             ("dualpipev", 1)):
        for pp, ep in ((2, 8), (4, 16)):
            layout = Layout(pp, 1, ep, schedule, stages, 1, None)
            candidate = layout.apply(run)
            # Imbalance is taken as linear, and a table of products is not quite.
            assert bounds.of(candidate, layout) <= 1.005 * step_seconds(candidate, setting), layout
            checked += 1
    assert checked == 12


def test_the_search_finds_what_trying_everything_finds() -> None:
    run = only_phase(preset("tiny"), main_phase(preset("tiny"))).override(global_batch_size=8, precision="bf16")
    setting = Setting(find_hardware("h800"), 4)
    result = search(run, setting, num_best=5)
    everything = search(run, setting, num_best=10_000)
    assert not [rejected for rejected in everything.rejected if rejected.kind == "slower"]
    assert len(everything.ranked) > 50
    assert [found.step.seconds for found in result.ranked] == pytest.approx(
        [found.step.seconds for found in everything.ranked[:5]], rel=1e-9)
    for one in (result, everything):
        assert one.num_layouts == len(one.ranked) + sum(rejected.count for rejected in one.rejected)
        assert all(rejected.reason for rejected in one.rejected)
    assert result.num_simulated < everything.num_simulated


def test_no_layout_fits() -> None:
    run = only_phase(preset("tiny"), main_phase(preset("tiny"))).override(precision="bf16")
    small = find_hardware("h800").figures["memory_bytes"].value / 1e6
    h800 = find_hardware("h800")
    figures = {**h800.figures, "memory_bytes": dataclasses.replace(h800.figures["memory_bytes"], value=small / 1e3)}
    result = search(run, Setting(dataclasses.replace(h800, figures=figures), 4))
    assert not result.ranked and result.rejected_by_kind()["memory"] > 0
    assert "layouts that the rules allow need more memory" in result.why_none()
    assert "GB of 0.0" in result.why_none()


def test_long_sequences_are_split_too() -> None:
    """Parts are of 4K to 16K tokens; a short sequence is split only where the run's is."""
    run = only_phase(preset("tiny"), main_phase(preset("tiny"))).override(precision="bf16", global_batch_size=8)
    for length, own, expected in ((4096, 1, [1]), (4096, 2, [1, 2]), (8192, 1, [1, 2]), (32768, 1, [1, 2, 4, 8]),
                                  (131072, 1, [1, 8, 16, 32])):
        long = run.override(seq_length=length, max_position_embeddings=length, context_parallel_size=own)
        assert _splits(long, 64) == expected
    long = run.override(seq_length=8192, max_position_embeddings=8192)
    found = search(long, Setting(find_hardware("h800"), 2), num_best=1000)
    split = [one for one in found.ranked if one.layout.cp == 2]
    assert split and all("--context-parallel-size 2" in one.flags for one in split)
    assert " CP2 " in split[0].layout.describe() and split[0].layout.apply(long).parallel.context_parallel_size == 2
