"""Step times: published numbers, sums, monotonicity, and the bounds of a search."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.config.parallel import COMMUNICATION_SMS, ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.run_cost import main_phase, only_phase, sensitivities
from dsv3_megatron.planning.time.operations import WorkPart
from dsv3_megatron.planning.time.step_time import _plan_and_costs, least_update, step_seconds, step_time
from dsv3_megatron.planning.time.work import Setting, WorkTable, sm_share_beside_communication
from tests.unit.planning.small_run import small_run


@pytest.fixture(scope="module")
def v3():
    run = preset("dsv3-671b").override(pipeline_schedule="dualpipe", fp8="blockwise",
                                       recompute_granularity="selective")
    return only_phase(run, main_phase(run))


def test_published_speeds_agree_with_one_another(v3) -> None:
    """272.8B tokens a day on 2048 devices are 180.2K GPU-hours per 1T tokens and 19.93 s a step."""
    assert 2048 * 24 / 0.2728 == pytest.approx(180.2e3, rel=1e-3)
    assert v3.training.tokens_per_step / (272.8e9 / 86400) == pytest.approx(19.926, rel=1e-3)


def test_a_pair_of_four_moe_layers_takes_the_published_time(v3, h800) -> None:
    """129.0 ms in DeepSeek's profile of an overlapped pair; products forward and attention are from other sources."""
    layer = WorkTable(v3, dataclasses.replace(h800, imbalance=1.0)).layer(10)
    assert 4 * layer.pair(layer)[0] == pytest.approx(0.1290, rel=0.03)
    seconds, exchange = layer.pair(layer)
    assert exchange < seconds, "all of the all-to-all is hidden"


def test_deepseek_v3_on_2048_h800(v3, h800) -> None:
    """Within 5% of the published 180.2K GPU-hours per 1T tokens; docs/planning says from what."""
    step = step_time(v3, h800)
    assert 0.95 < step.gpu_hours_per_trillion_tokens / 180.2e3 < 1.05
    assert step.num_microbatches == 120
    assert step.mfu(is_causal=False) > step.mfu(with_mtp=True) > step.mfu() > 0.38


@pytest.mark.parametrize("changes", [
    {}, {"pipeline_schedule": "zb1p"}, {"pipeline_schedule": "dualpipe"}, {"pipeline_schedule": "dualpipev"},
    {"fp8": "blockwise"}, {"num_virtual_stages_per_pipeline_rank": 2}, {"recompute_granularity": "full"}])
def test_parts_add_up_and_both_ways_agree(changes) -> None:
    run, setting = small_run(**changes), Setting(find_hardware("h800"), 64)
    step = step_time(run, setting)
    parts = step.breakdown()
    hidden, hidden_update = parts.pop("hidden_all_to_all"), parts.pop("hidden_update")
    assert sum(parts.values()) == pytest.approx(step.seconds, rel=1e-6)
    assert all(value >= 0 for value in parts.values())
    assert (hidden > 0) == run.parallel.schedule.startswith("dualpipe")
    assert hidden_update > 0
    behind = step_time(run.override(overlap_grad_reduce=False, overlap_param_gather=False), setting)
    assert behind.update.hidden == 0 and behind.update.total == pytest.approx(step.update.total + hidden_update)
    assert least_update(run, setting) <= step.update.total
    assert step_seconds(run, setting) == pytest.approx(step.seconds, rel=1e-9)


@pytest.mark.parametrize("depth", [1, 2])
def test_hidden_states_of_all_depths_take_longer_between_the_last_stages(depth: int) -> None:
    """Twice or three times the bytes over the same wire; the loss apart also makes the longest stage shorter."""
    setting = Setting(find_hardware("h800"), 64)
    layers = "t" * 9
    run, together = (small_run(mtp_num_layers=depth, pipeline_model_parallel_layout=layout) for layout in (
        f"E{layers}|{layers}|{layers}{'m' * depth}|L", f"E{layers}|{layers}|{layers}|{'m' * depth}L"))
    step = step_time(run, setting)
    assert sum(value for name, value in step.breakdown().items() if not name.startswith("hidden")
               ) == pytest.approx(step.seconds, rel=1e-6)
    assert step_seconds(run, setting) == pytest.approx(step.seconds, rel=1e-9)
    costs = {}
    for name, each in (("apart", run), ("together", together)):
        table = WorkTable(each, setting)
        costs[name] = _plan_and_costs(each, setting, table, table.stages(), 8)[1]
    latency = setting.hardware["network_latency"]
    assert costs["together"].p2p_of_boundary == {} and costs["apart"].p2p == costs["together"].p2p > latency
    longer = latency + (1 + depth) * (costs["apart"].p2p - latency)
    assert costs["apart"].p2p_of_boundary == {2: pytest.approx(longer)}


def test_interleaved_pairs_hide_all_to_alls() -> None:
    setting = Setting(find_hardware("h800"), 64)
    alone, pairs = (step_time(small_run(num_virtual_stages_per_pipeline_rank=2,
                                        overlap_moe_expert_parallel_comm=overlaps), setting)
                    for overlaps in (False, True))
    assert alone.breakdown()["hidden_all_to_all"] == 0 < pairs.breakdown()["hidden_all_to_all"]
    assert pairs.seconds < alone.seconds


def test_without_a_pipeline_a_step_is_its_micro_batches() -> None:
    run = dataclasses.replace(small_run(), parallel=ParallelConfig(expert_model_parallel_size=8))
    setting = Setting(find_hardware("h800"), 64)
    (work,) = WorkTable(run, setting).stages()
    step = step_time(run, setting)
    assert step.bubble == 0 and step.num_microbatches == 8
    assert step.pipeline == pytest.approx(8 * sum(one.alone for one in work.alone.values()))


@pytest.mark.parametrize("schedule", ["auto", "dualpipe"])
def test_more_of_a_resource_is_never_slower(schedule: str) -> None:
    run, setting = small_run(pipeline_schedule=schedule, fp8="blockwise"), Setting(find_hardware("h800"), 64)
    changes = sensitivities(run, setting, factor=1.5)
    worse = {"communication_sms", "nvlink_latency", "network_latency", "routed_rows_deviation"}
    assert {"fp8_flops", "bf16_flops", "memory_bandwidth"} <= set(changes)
    for name, change in changes.items():
        assert (change > 0) if name in worse else (change < 0), name


def test_imbalance_costs_time_and_is_more_in_a_layer_than_over_a_pair(v3, h800) -> None:
    table = WorkTable(v3, h800)
    assert 1 < table.shared_shape.imbalance < table.shape.imbalance < 1.3
    times = [step_seconds(v3, dataclasses.replace(h800, imbalance=imbalance)) for imbalance in (1.0, 1.1, 1.3)]
    assert times == sorted(times) and times[0] < times[2]


def test_hardware_of_other_kinds() -> None:
    run = small_run()
    times = {name: step_seconds(run, Setting(find_hardware(name), 64)) for name in ("a100", "h800", "h100", "b200")}
    assert times["a100"] > times["h800"] >= times["h100"] > times["b200"]


def test_the_multiprocessors_for_communication_are_the_runs(v3, h800) -> None:
    """What is set changes only work beside communication; what is left open is the machine's figure, 20 on Hopper."""
    layers = {count: WorkTable(v3.override(num_communication_sms=count), h800).layer(10) for count in (None, 0, 20, 40)}
    products = {count: layer.shared[WorkPart.FORWARD].products for count, layer in layers.items()}
    assert products[0] < products[20] < products[40] and products[None] == products[20]
    assert len({layer.alone[WorkPart.FORWARD].products for layer in layers.values()}) == 1
    for name in ("h800", "h100", "h200"):
        assert find_hardware(name)["communication_sms"] == COMMUNICATION_SMS
    assert sm_share_beside_communication(ParallelConfig(), find_hardware("h800")) == 1
