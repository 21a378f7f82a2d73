"""The estimate as a whole: what it needs, how it moves, and what it says of DeepSeek-V3 on 2048 GPUs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from typing import Any

import pytest

from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.memory.estimate import RankMemory, estimate_memory, kept_by_name
from dsv3_megatron.planning.memory.remedies import advise, describe
from dsv3_megatron.planning.memory.settings import model_precisions
from dsv3_megatron.planning.time.operations import Shape
from dsv3_megatron.planning.time.work import Setting
from dsv3_megatron.reports.model_table import describe_model


def run_of(name: str = "tiny", **settings: Any) -> RunConfig:
    return preset(name).override(**{"precision": "fp32", **settings})


def peak(run: RunConfig, world_size: int | None = None, **options: Any) -> int:
    return max(rank.peak_bytes for rank in estimate_memory(run, world_size, device="cpu", **options))


def report_run(**settings: Any) -> RunConfig:
    """The report's layout at its full batch."""
    return preset("dsv3-671b").override(
        phases=(), global_batch_size=15360, train_iters=1000, precision="bf16", pipeline_schedule="dualpipe",
        fp8="blockwise", recompute_granularity="selective", **settings)


def test_no_torch_is_needed() -> None:
    code = ("import sys; from dsv3_megatron.config.presets import preset; "
            "from dsv3_megatron.planning.memory.remedies import advise; advise(preset('tiny')); "
            "assert 'torch' not in sys.modules and 'megatron' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_device_must_be_known() -> None:
    with pytest.raises(ValueError, match="device='tpu' of a memory estimate must be one of cuda, cpu"):
        estimate_memory(run_of(), device="tpu")


@pytest.mark.parametrize("way", ["p2p", "all_gather", "a2a"])
def test_ranks_that_share_a_sequence_keep_a_part_of_it_each(way: str) -> None:
    """What is kept of a micro-batch, and latents of all ranks where they are gathered; rotary tables are whole."""
    long = preset("dsv3-671b").override(
        phases=(), stop_after_phase=None, lr_warmup_iters=0, seq_length=32768, max_position_embeddings=32768,
        pipeline_schedule="1f1b", fp8="none", recompute_granularity=None, micro_batch_size=1, global_batch_size=1024)
    whole, split = (estimate_memory(long.override(context_parallel_size=ranks, cp_comm_type=way), 2048)[3]
                    for ranks in (1, 4))
    assert whole.buffer_bytes == split.buffer_bytes
    layers, tokens = len(split.layer_ids), 32768 // 4
    whole_kept, kept = dict(whole.kept_by_chunk[0]), dict(split.kept_by_chunk[0])
    for name in ("query", "hidden states", "experts gate and up", "attention input"):
        assert kept[name] * 4 == whole_kept[name]
    assert kept["rotations of a part"] == layers * tokens * 64 * 4
    assert kept.get("latents of all ranks", 0) == (layers * 32768 * 576 * 2 if way == "all_gather" else 0)
    assert kept.get("passed latents", 0) == (0 if way == "a2a" else layers * tokens * 576 * 2)
    keys = layers * tokens * 128 * 192 * 2
    assert kept.get("key", 0) == (keys if way == "a2a" else 0)
    if way == "all_gather":
        narrow = estimate_memory(long.override(context_parallel_size=4, cp_comm_type=way, cp_fp8_latents=True), 2048)[3]
        assert dict(narrow.kept_by_chunk[0])["latents of all ranks"] == layers * 32768 * 656


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize("changes", [{}, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, {
    "pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipe", "global_batch_size": 16, "ema_decay": 0.9}])
def test_bytes_between_steps_are_those_of_the_model_table(changes: dict[str, Any], precision: str) -> None:
    """The estimate and --print-model tell the bytes of a rank to the byte alike, their buffers' padding counted."""
    run = run_of(precision=precision, **changes)
    told = describe_model(run, 4, as_json=True)
    assert isinstance(told, dict)
    for rank, row in zip(estimate_memory(run, 4), told["ranks"], strict=True):
        assert (rank.parameter_bytes, rank.gradient_bytes, rank.optimizer_bytes, rank.host_bytes) == (
            row["weight_bytes"], row["gradient_bytes"], row["optimizer_bytes"], row["host_bytes"])


def test_auto_is_what_the_device_is_planned_with() -> None:
    for device, precision in (("cuda", "bf16"), ("cpu", "fp32")):
        auto, named = (estimate_memory(run_of(precision=name), 1, device=device) for name in ("auto", precision))
        assert auto == named
    h800 = find_hardware("h800")
    cpu = dataclasses.replace(h800, figures={**h800.figures, "is_cpu": next(iter(h800.figures.values()))})
    for hardware, precision in ((h800, "bf16"), (cpu, "fp32")):
        assert Setting(hardware, 1).precision(run_of(precision="auto")) == precision
        assert Shape.of(run_of(precision="auto"), is_cpu=hardware.is_cpu).plain_kind == precision


def test_components_add_up_and_kept_tensors_are_named() -> None:
    (rank,) = estimate_memory(run_of(), device="cpu")
    assert rank.peak_action == "B0" and rank.num_kept == (1,)
    assert sum(kept_by_name(rank).values()) == rank.activation_bytes
    assert rank.peak_bytes == rank.state_bytes + rank.activation_bytes + rank.working_bytes
    # Of the two heads, probabilities of 512 tokens for 2048 words.
    assert kept_by_name(rank)["probabilities of the head"] == 2 * 512 * 2048 * 4


def test_settings_that_save_memory_do() -> None:
    base = peak(run_of())
    assert peak(run_of(recompute_granularity="full")) < peak(run_of(recompute_granularity="selective")) < base
    assert peak(run_of(precision="bf16")) < base
    assert peak(run_of(micro_batch_size=1)) < base < peak(run_of(micro_batch_size=4))
    assert peak(run_of(), 4) < base  # ZeRO-1
    bf16 = run_of(precision="bf16")
    assert peak(bf16.override(exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")) < peak(bf16)


def test_imbalance_adds_the_experts_rows() -> None:
    run = run_of(expert_model_parallel_size=2)
    balanced, twice = (peak(run, imbalance=imbalance) for imbalance in (1.0, 2.0))
    model, rows = run.model, 512 * run.model.moe_router_topk
    kept_per_layer = rows * (model.hidden_size + 2 * model.moe_ffn_hidden_size) * 4
    assert twice - balanced >= 4 * kept_per_layer  # 3 layers and the MTP module


def test_the_average_is_on_the_host() -> None:
    plain, averaged = (estimate_memory(run_of(ema_decay=decay), 2, device="cpu")[0] for decay in (0.0, 0.9))
    assert averaged.peak_bytes == plain.peak_bytes and plain.host_bytes == 0
    assert averaged.host_bytes == pytest.approx(averaged.num_parameters * 4 / 2, rel=0.01)


def test_dualpipe_holds_two_copies() -> None:
    settings = {"pipeline_model_parallel_size": 2, "global_batch_size": 16}
    one = estimate_memory(run_of(pipeline_schedule="1f1b", **settings), device="cpu")
    two = estimate_memory(run_of(pipeline_schedule="dualpipe", **settings), device="cpu")
    embedding = 2048 * 128  # the last stage uses the first one's
    assert two[0].num_parameters == two[1].num_parameters == sum(rank.num_parameters for rank in one) - embedding


def test_layers_that_are_not_cut_evenly_show() -> None:
    uneven = estimate_memory(run_of(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|tttmL"),
                             device="cpu")
    even = estimate_memory(run_of(pipeline_model_parallel_size=2), device="cpu")
    assert uneven[1].peak_bytes > even[1].peak_bytes and uneven[0].peak_bytes < even[0].peak_bytes


def test_deepseek_v3_on_2048_gpus() -> None:
    """Sanity of the report's run: 16 ranks that mirror each other, each with its 20B-parameter optimizer share."""
    ranks = estimate_memory(report_run(), 2048)
    assert len(ranks) == 16
    for near, far in zip(ranks[:8], reversed(ranks[8:]), strict=True):
        assert near.peak_bytes == pytest.approx(far.peak_bytes, rel=1e-3)
    inner: RankMemory = ranks[3]
    # Two stages of four MoE layers with four local experts each, beside what every rank has whole.
    assert inner.num_parameters == pytest.approx(3.27e9, rel=0.01)
    assert inner.parameter_bytes == pytest.approx(2 * inner.num_parameters, rel=1e-3)
    assert inner.gradient_bytes == 2 * inner.parameter_bytes
    # BF16 moments and fp32 masters: 8 bytes a parameter, experts over 2 x 2 ranks, the rest over 2 x 128.
    assert 2.0e9 < inner.optimizer_bytes < 3.5e9
    # DualPipe: PP + 1 chunks, one of which is under way.
    assert sum(inner.num_kept) in (16, 17)
    # The report's GPUs have 80 GB.
    assert max(rank.peak_bytes for rank in ranks) < 78e9
    without = estimate_memory(report_run().override(recompute_granularity=None), 2048)[3]
    assert without.activation_bytes > 1.2 * inner.activation_bytes


def test_an_estimate_is_quick_once_its_passes_are_known() -> None:
    run = report_run()
    estimate_memory(run, 2048)
    started = time.process_time()
    for _ in range(20):
        estimate_memory(run, 2048)
    assert (time.process_time() - started) / 20 < 0.01  # about 0.6 ms on one core


def test_advice_is_what_estimating_again_gives() -> None:
    run = run_of("laptop")
    advice = advise(run, 2, device="cpu")
    assert advice.worst.peak_bytes == peak(run, 2)
    assert list(advice.components)[0] == "activations"
    assert sum(advice.components.values()) == advice.worst.peak_bytes
    assert [remedy.saved_bytes for remedy in advice.remedies] == sorted(
        (remedy.saved_bytes for remedy in advice.remedies), reverse=True)
    for remedy in advice.remedies:
        assert remedy.peak_bytes == peak(run.override(**remedy.changes), 2)
        assert remedy.saved_bytes == advice.worst.peak_bytes - remedy.peak_bytes > 0
    names = {name for remedy in advice.remedies for name in remedy.changes}
    assert {"recompute_granularity", "micro_batch_size", "precision"} <= names
    lines = describe(advice)
    assert lines[0].startswith("pipeline rank 0 is the fullest: ") and "activations" in lines[0]
    assert any(line.startswith("--recompute-granularity full --recompute-modules: ") for line in lines)


@pytest.mark.parametrize("is_installed", [False, True])
def test_auto_modules_are_those_that_the_run_would_take_here(is_installed: bool, monkeypatch: pytest.MonkeyPatch
                                                             ) -> None:
    monkeypatch.setattr("dsv3_megatron.planning.memory.settings._engine_is_installed", lambda: is_installed)
    auto, local, engine = (estimate_memory(report_run(transformer_impl=impl), 2048)
                           for impl in ("auto", "local", "transformer_engine"))
    assert local != engine and auto == (engine if is_installed else local)


def test_the_experts_gate_and_up_are_kept_in_fp8_by_local_modules_and_as_they_are_by_the_engines() -> None:
    """An inner rank of DeepSeek-V3: 16 chunks of four layers, 8 rows a token, 2 x 2048 numbers a row."""
    local, engine = (kept_by_name(estimate_memory(report_run(transformer_impl=impl), 2048)[3])
                     for impl in ("local", "transformer_engine"))
    rows, width = 16 * 4 * 4096 * 8, 2 * 2048
    assert local["experts gate and up in FP8"] == rows * (width + width // 128 * 4)
    assert "experts gate and up" not in local and "experts active in FP8" not in local
    assert engine["experts gate and up"] == rows * width * 2
    assert engine["experts active in FP8"] == rows * (width // 2 + width // 2 // 128 * 4)


def test_no_fp8_copy_is_kept_of_what_is_there_in_backward_anyway() -> None:
    """Of what attention keeps, and of norms that are made again; without recomputation the copies are smaller."""
    for settings in ({"recompute_granularity": "selective"}, {"recompute_granularity": None}):
        inner = estimate_memory(report_run().override(transformer_impl="local", **settings), 2048)[3]
        kept = kept_by_name(inner)
        made_again = {f"{name} in FP8" for name in ("attention input", "FFN input", "normed latent",
                                                    "normed query latent")}
        assert made_again.isdisjoint(kept) is (settings["recompute_granularity"] == "selective")
        # 16,384 numbers a token of each of four layers, in BF16 and in no other form.
        assert kept["attention result"] == sum(inner.num_kept) * 4 * 4096 * 16384 * 2
        assert not {"attention result in FP8", "shared experts active in FP8", "wide router weight"} & kept.keys()
    padded = kept_by_name(estimate_memory(report_run(transformer_impl="local", attention_backend="flash"), 2048)[3])
    assert padded["context in FP8"] == sum(inner.num_kept) * 4 * 4096 * (16384 * 3 // 2 + 128 * 4)


def test_swiglus_input_takes_half_in_fp8() -> None:
    """The dense layers' gate and up of DeepSeek-V3's first stage: 3 layers of 4096 tokens, 2 x 18432 numbers."""
    narrow, wide = (estimate_memory(report_run(transformer_impl="local", fp8_swiglu_input=form), 2048)[0]
                    for form in ("e4m3", "bf16"))
    numbers = 3 * 4096 * 2 * 18432
    assert narrow.kept_by_chunk[0]["FFN gate and up in FP8"] == numbers + numbers // 128 * 4
    assert wide.kept_by_chunk[0]["FFN gate and up"] == numbers * 2
    assert "FFN active in FP8" not in wide.kept_by_chunk[0] and wide.peak_bytes > narrow.peak_bytes


# -- FP8, layer by layer ---------------------------------------------------------------------------------------------

V3_1F1B = {"phases": (), "global_batch_size": 15360, "train_iters": 1000, "precision": "bf16", "fp8": "blockwise",
           "pipeline_schedule": "1f1b", "recompute_granularity": None}


def test_an_override_of_one_layer_changes_its_rank_alone_by_the_exact_bytes() -> None:
    """Layer 60's down-projection of queries in BF16: 4096 tokens of its input, and no FP8 copy of its weight."""
    base, changed = (estimate_memory(preset("dsv3-671b").override(**V3_1F1B, fp8_override=override), 2048)
                     for override in ([], ["decoder.layers.60.self_attention.linear_q_down_proj=bf16"]))
    assert 60 in base[15].layer_ids and base[15].num_kept == (1,)
    assert changed[:15] == base[:15]
    narrow, wide = 4096 * (7168 + 7168 // 128 * 4), 4096 * 7168 * 2
    assert changed[15].activation_bytes - base[15].activation_bytes == wide - narrow
    weight = 2 * 1536 * 7168 + (1536 // 128) * (7168 // 128) * 4  # twice: as it is and turned round
    assert base[15].fp8_weight_bytes - changed[15].fp8_weight_bytes == weight


def test_the_mtp_module_has_its_own_precisions() -> None:
    base, changed, other = (
        estimate_memory(preset("dsv3-671b").override(**V3_1F1B, fp8_override=override), 2048)
        for override in ([], ["mtp.*.linear_q_down_proj=bf16"], ["mtp.*.eh_proj=fp8"]))
    assert changed[:15] == base[:15] == other[:15]
    narrow, wide = 4096 * (7168 + 7168 // 128 * 4), 4096 * 7168 * 2
    assert changed[15].activation_bytes - base[15].activation_bytes == wide - narrow
    # eh_proj keeps two hidden states side by side, and the table has it in BF16.
    assert base[15].activation_bytes - other[15].activation_bytes == 2 * (wide - narrow)


@pytest.mark.parametrize("settings", [
    {"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv", "global_batch_size": 16}], ids=str)
@pytest.mark.parametrize("module", ["*", "mlp.*experts.*", "self_attention.*"])
def test_overrides_of_layers_add_up_to_that_of_all(settings: dict[str, Any], module: str) -> None:
    """What a micro-batch leaves behind: each layer's difference is its own, so one by one they make the whole."""
    def kept(overrides: list[str]) -> list[int]:
        ranks = estimate_memory(run_of(precision="bf16", fp8="blockwise", fp8_override=overrides, **settings),
                                device="cpu")
        return [sum(chunk.values()) for rank in ranks for chunk in rank.kept_by_chunk]

    base = kept([])
    names = [f"decoder.layers.{layer}" for layer in range(4)] + ["mtp.layers.0.mtp_model_layer"]
    patterns = [f"{name}.{module}=bf16" for name in names if not ("experts" in module and name.endswith("s.0"))]
    alone = [kept([pattern]) for pattern in patterns]
    together = kept(patterns)
    assert together != base
    for chunk, size in enumerate(base):
        assert together[chunk] - size == sum(one[chunk] - size for one in alone)


def test_tokens_travel_in_fp8_to_the_experts_that_take_it() -> None:
    """A layer whose experts are in BF16 sends BF16, whatever the others send, as in `model/fp8_modules.py`."""
    def ways(overrides: list[str]) -> list[bool]:
        run = run_of(fp8="blockwise", fp8_override=overrides)
        precisions = model_precisions(run.fp8, run.model)
        return [layer.sends_fp8 for layer in (*precisions.decoder, *precisions.mtp)]

    assert ways([]) == [False, True, True, True, True]  # the first layer is dense
    assert ways(["decoder.layers.2.mlp.experts.linear_fc1=bf16"]) == [False, True, False, True, True]
    assert ways(["mtp.*=bf16"]) == [False, True, True, True, False]
